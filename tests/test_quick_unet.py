"""The small U-Net: shapes, what it depends on, its errors."""

import pytest
import torch

from trilemma.networks.layers import Embedded
from trilemma.networks.quick_unet import QuickUNet


def network(size=16, **options):
    torch.manual_seed(0)
    options = {"channels": (16, 24), "blocks": (1, 2), "embedding_dim": 32, **options}
    net = QuickUNet(3, 3, size, **options)
    for parameter in net.parameters():  # the zeros it starts with would hide everything
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return net


@pytest.mark.parametrize("size", [16, 20, 28, 32, 64])
@pytest.mark.parametrize(
    "channels,blocks", [((16,), (2,)), ((16, 24), (1, 2)), ((8, 16, 24), (2, 1, 1))]
)
def test_shapes(size, channels, blocks):
    depth = 2 ** (len(channels) - 1)
    if size % depth:
        pytest.skip("not a multiple")
    x = torch.randn(2, 3, size, size)
    out = network(size, channels=channels, blocks=blocks)(x, torch.rand(2))
    assert out.shape == x.shape and out.isfinite().all()


@pytest.mark.parametrize(
    "size,patch", [(16, 1), (24, 2), (28, 2), (32, 2), (36, 2), (64, 4), (128, 8)]
)
def test_the_patch_keeps_the_map_small_and_whole(size, patch):
    net = network(size)
    assert net.patch == patch
    assert size % net.multiple == 0


def test_starts_at_zero():
    net = QuickUNet(1, 1, 16, channels=(16, 24), blocks=(1, 1))
    assert not net(torch.randn(2, 1, 16, 16), torch.rand(2)).any()


def test_depends_on_time_class_and_source():
    net = network()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.7])
    vector = torch.randn(2, 32)
    plain = net(x, t)
    assert not torch.allclose(plain, net(x, t.flip(0)))
    assert not torch.allclose(plain, net(x, t, Embedded(vector=vector)))
    torch.testing.assert_close(plain, net(x, t, Embedded()))
    wide = QuickUNet(6, 3, 16, channels=(16, 24), blocks=(1, 1))
    assert wide(x, t, Embedded(image=x)).shape == x.shape


def test_an_image_does_not_depend_on_its_batch():
    net = network()
    x, t, vector = torch.randn(3, 3, 16, 16), torch.rand(3), torch.randn(3, 32)
    whole = net(x, t, Embedded(vector=vector))
    torch.testing.assert_close(net(x[1:2], t[1:2], Embedded(vector=vector[1:2])), whole[1:2])


def test_every_pixel_sees_the_middle():
    net = network(28, channels=(16, 24), blocks=(2, 4))
    x = torch.randn(1, 3, 28, 28, requires_grad=True)
    net(x, torch.rand(1))[0, 0, 14, 14].backward()
    assert (x.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_and_precision_change_rounding_only(dtype):
    net = network()
    x, t, e = torch.randn(2, 3, 16, 16), torch.rand(2), Embedded(vector=torch.randn(2, 32))
    expected = net(x, t, e)
    last = network().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = last(x.to(memory_format=torch.channels_last), t, e)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1 * expected.std().item()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance)


def test_what_does_not_fit_is_explained():
    with pytest.raises(ValueError, match="15x15.*multiples of 2"):
        network(15)
    with pytest.raises(ValueError, match="16x18.*multiples of 4"):
        network(32)(torch.randn(1, 3, 16, 18), torch.rand(1))
    with pytest.raises(ValueError, match="channels names 2 levels and blocks 3"):
        network(blocks=(1, 1, 1))
