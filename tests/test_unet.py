"""The U-Net, and the layers it shares, against plain float32 references."""

import pytest
import torch
import torch.nn.functional as F

from trilemma.networks.layers import Embedded, GroupNorm, attend, upsample_conv
from trilemma.networks.unet import UNet


def small(**options):
    """A U-Net of two levels whose zero-initialised layers speak too."""
    torch.manual_seed(0)
    network = UNet(
        **{
            "in_channels": 3,
            "out_channels": 3,
            "channels": 16,
            "multipliers": (1, 2),
            "blocks": 1,
            "attention": (4,),
            "size": 8,
            **options,
        }
    )
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def test_defaults_are_the_cifar10_network_of_ddpm():
    with torch.device("meta"):
        network = UNet(in_channels=3, out_channels=3)
    assert sum(p.numel() for p in network.parameters()) == 35_746_307


def test_a_new_network_answers_zero():
    network = UNet(3, 2, channels=16, multipliers=(1, 2), attention=(4,), size=8)
    out = network(torch.randn(2, 3, 8, 8), torch.rand(2))
    assert out.shape == (2, 2, 8, 8)
    assert not out.any()


@pytest.mark.parametrize("options", [{}, {"patch": 2}, {"head_channels": 8}, {"attention": (8, 4)}])
def test_every_parameter_learns(options):
    network = small(**options)
    network(torch.randn(2, 3, 8, 8), torch.rand(2)).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_time_and_condition_are_heard():
    network = small(in_channels=5, embedding_dim=24)
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7])
    image, vector = torch.randn(2, 2, 8, 8), torch.randn(2, 24)
    out = network(x, time, Embedded(vector=vector, image=image))
    for other in (
        network(x, time + 0.1, Embedded(vector=vector, image=image)),
        network(x, time, Embedded(vector=vector + 1, image=image)),
        network(x, time, Embedded(vector=vector, image=image + 1)),
        network(x, time, Embedded(image=image)),
    ):
        assert not torch.allclose(out, other, atol=1e-3)


def test_an_image_does_not_see_its_batch():
    network = small()
    x, time = torch.randn(3, 3, 8, 8), torch.rand(3)
    assert torch.allclose(network(x, time)[1:2], network(x[1:2], time[1:2]), atol=1e-5)


def test_other_sizes_than_the_trained_one():
    network = small()
    assert network(torch.randn(1, 3, 12, 16), torch.rand(1)).shape == (1, 3, 12, 16)


@pytest.mark.parametrize("size", [28, 3])
def test_an_unusable_size_names_usable_ones(size):
    with pytest.raises(ValueError, match=r"multiples of 8; use (24 or 32|8)$"):
        UNet(3, 3, size=size)
    with pytest.raises(ValueError, match="multiples of 2"):
        small()(torch.randn(1, 3, 7, 8), torch.rand(1))


def test_bfloat16_and_channels_last_agree_with_float32():
    network = small()
    x, time = torch.randn(4, 3, 8, 8), torch.rand(4)

    def run(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = network(x, time).float()
        gradients = torch.autograd.grad(out.square().mean(), list(network.parameters()))
        return out, torch.cat([g.flatten() for g in gradients])

    expected, exact = run(False)
    network.to(memory_format=torch.channels_last)
    same, layout = run(False)
    assert torch.allclose(same, expected, atol=1e-4)
    assert F.cosine_similarity(layout, exact, dim=0) > 0.9999
    rounded, gradients = run(True)
    assert (rounded - expected).norm() < 0.02 * expected.norm()
    assert F.cosine_similarity(gradients, exact, dim=0) > 0.995


def test_upsampling_and_convolution_in_one():
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64)
    out = upsample_conv(x, weight, bias)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    assert torch.allclose(out, expected)
    up = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, (x, weight), up),
        torch.autograd.grad(expected, (x, weight), up),
        strict=True,
    ):
        assert torch.allclose(got, wanted)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_is_a_softmax_average(dtype, tolerance):
    q, k, v = torch.randn(3, 2, 4, 9, 8).to(dtype).unbind(0)
    weights = torch.softmax(q.double() @ k.double().mT / 8**0.5, dim=-1)
    expected = weights @ v.double()
    assert torch.allclose(attend(q, k, v).double(), expected, atol=tolerance)


def test_group_norm_counts_in_float32():
    x = (torch.randn(2, 8, 32, 32) + 30).bfloat16()
    norm = GroupNorm(8, groups=2)
    groups = x.double().view(2, 2, -1)
    centred = groups - groups.mean(2, keepdim=True)
    expected = centred / centred.square().mean(2, keepdim=True).sqrt()
    out = norm(x)
    assert out.dtype == torch.float32
    assert torch.allclose(out.double().view(2, 2, -1), expected, atol=1e-3)
