"""Convolutions as matrix products: PyTorch's numbers and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trilemma import device
from trilemma.networks import products

CPU = torch.device("cpu")
CASES = [  # (height, width), kernel, stride, padding
    ((7, 7), (4, 4), (2, 2), (1, 1)),
    ((3, 3), (4, 4), (2, 2), (1, 1)),
    ((5, 6), (3, 2), (1, 3), (0, 1)),
    ((4, 4), (4, 4), (1, 1), (0, 0)),
    ((2, 3), (1, 1), (2, 2), (0, 0)),
]


@pytest.fixture
def everywhere(monkeypatch):
    for least in ("WEIGHTS_PER_PIXEL", "LEARNING"):
        monkeypatch.setattr(products, least, 1e-9)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("size, kernel, stride, padding", CASES)
def test_a_convolution_is_pytorchs_with_first_and_second_derivatives(size, kernel, stride, padding):
    x, weight, bias = draw(2, 3, *size), draw(2, 3, *kernel), draw(2)
    expected = F.conv2d(x, weight, bias, stride, padding)
    torch.testing.assert_close(products.conv2d(x, weight, bias, stride, padding), expected)

    def mine(x, weight, bias):
        return products.conv2d(x, weight, bias, stride, padding)

    assert torch.autograd.gradcheck(mine, (x, weight, bias))
    assert torch.autograd.gradgradcheck(mine, (x[:1], weight[:1], bias[:1]))


@pytest.mark.parametrize("more", [(0, 0), (1, 0)])
@pytest.mark.parametrize("size, kernel, stride, padding", CASES)
def test_a_transposed_one_too(size, kernel, stride, padding, more):
    if more[0] >= stride[0]:
        pytest.skip("PyTorch refuses as much")
    x, weight, bias = draw(2, 2, *size), draw(2, 3, *kernel), draw(3)
    expected = F.conv_transpose2d(x, weight, bias, stride, padding, more)
    found = products.conv_transpose2d(x, weight, bias, stride, padding, more)
    torch.testing.assert_close(found, expected)

    def mine(x, weight, bias):
        return products.conv_transpose2d(x, weight, bias, stride, padding, more)

    assert torch.autograd.gradcheck(mine, (x, weight, bias))
    assert torch.autograd.gradgradcheck(mine, (x[:1], weight, bias))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1, bias=False)),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ConvTranspose2d(8, 3, 3, 2, 1, 1),
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_network_keeps_its_outputs_gradients_and_names(everywhere, dtype, tolerance):
    plain, changed = network(), copy.deepcopy(device.prepare(network(), CPU, dtype))
    assert list(plain.state_dict()) == list(changed.state_dict())
    taken = []
    for net in (plain, changed):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with device.autocast(dtype, CPU):
            out = net(x)
        assert out.dtype == dtype
        out.float().square().mean().backward()
        taken.append([out.float(), x.grad, *(p.grad for p in net.parameters())])
    for expected, found in zip(*taken, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()
        assert found.dtype == torch.float32


def test_only_many_weights_on_few_pixels_are_products(monkeypatch):
    used = []
    monkeypatch.setattr(products, "conv2d", lambda x, *rest: used.append(x.shape[-1]))
    layer = nn.Conv2d(256, 256, 3, padding=1)
    products.use(layer)
    for side in (2, 4, 16):
        layer(torch.zeros(1, 256, side, side))
    assert used == [2]
    with device.autocast(torch.bfloat16, CPU):  # where a product gains most for the weights
        layer(torch.zeros(1, 256, 4, 4))
        layer.requires_grad_(False)(torch.zeros(1, 256, 4, 4))
    assert used == [2, 4]


def test_a_copy_computes_with_its_own_weights(everywhere):
    first = nn.ConvTranspose2d(2, 2, 3)
    products.use(first)
    second = copy.deepcopy(first)
    nn.init.zeros_(second.weight)
    nn.init.zeros_(second.bias)
    x = torch.ones(1, 2, 3, 3)
    assert second(x).abs().max() == 0 < first(x).abs().max()
