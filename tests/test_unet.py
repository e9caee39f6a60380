"""The U-Net, and the layers it shares, against plain float32 references."""

import pytest
import torch
import torch.nn.functional as F

from trilemma.networks.layers import Embedded, GroupNorm, attend, upsample_conv
from trilemma.networks.unet import ResidualBlock, UNet


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


# Dhariwal & Nichol 2021, table 4 and appendix I: 296 M for 64 pixels, 422 M for 128; class
# embeddings are not the network's.
@pytest.mark.parametrize(
    "size, channels, multipliers, blocks, published",
    [(64, 192, (1, 2, 3, 4), 3, 296e6), (128, 256, (1, 1, 2, 3, 4), 2, 422e6)],
)
def test_scale_shift_and_biggan_make_the_network_of_adm(
    size, channels, multipliers, blocks, published
):
    with torch.device("meta"):
        network = UNet(
            3,
            6,
            channels,
            multipliers,
            blocks,
            attention=(32, 16, 8),
            size=size,
            head_channels=64,
            norm="scale-shift",
            resample="biggan",
        )
    count = sum(p.numel() for p in network.parameters()) + 1000 * 4 * channels
    assert count == pytest.approx(published, rel=0.002)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_new_adm_block_resamples_and_nothing_else(rescale):
    x, e = torch.randn(2, 8, 4, 4), torch.randn(2, 5)
    change = {"scale_shift": True, "rescale": rescale}
    down = ResidualBlock(8, 8, 5, 0.0, resample=lambda h: F.avg_pool2d(h, 2), **change)
    scale = 0.5**0.5 if rescale else 1.0
    torch.testing.assert_close(down(x, e), scale * F.avg_pool2d(x, 2))
    torch.nn.init.zeros_(down.norm_out.weight)  # then nothing but the shift is left of h
    torch.nn.init.normal_(down.conv_out.weight)
    h = F.silu(down.shift(e)[:, 8:, None, None] + down.norm_out.bias[:, None, None])
    expected = scale * (F.avg_pool2d(x, 2) + down.conv_out(h.expand(2, 8, 2, 2)))
    torch.testing.assert_close(down(x, e), expected)


def test_what_does_not_fit_is_explained():
    with pytest.raises(ValueError, match="norm 'batch' is not one of shift, scale-shift"):
        small(norm="batch")
    with pytest.raises(ValueError, match="resample 'nearest' is not one of conv, biggan"):
        small(resample="nearest")


def test_a_new_network_answers_zero():
    network = UNet(3, 2, channels=16, multipliers=(1, 2), attention=(4,), size=8)
    out = network(torch.randn(2, 3, 8, 8), torch.rand(2))
    assert out.shape == (2, 2, 8, 8)
    assert not out.any()


ADM = {"norm": "scale-shift", "resample": "biggan", "head_channels": 8, "attention": (8, 4)}


@pytest.mark.parametrize(
    "options",
    [{}, {"patch": 2}, {"head_channels": 8}, {"attention": (8, 4)}, ADM, {**ADM, "rescale": True}],
)
def test_every_parameter_learns(options):
    network = small(**options)
    network(torch.randn(2, 3, 8, 8), torch.rand(2)).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("options", [{}, ADM])
def test_time_and_condition_are_heard(options):
    network = small(in_channels=5, embedding_dim=24, **options)
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


@pytest.mark.parametrize("options", [{}, ADM])
def test_an_image_does_not_see_its_batch(options):
    network = small(**options)
    x, time = torch.randn(3, 3, 8, 8), torch.rand(3)
    assert torch.allclose(network(x, time)[1:2], network(x[1:2], time[1:2]), atol=1e-5)


def test_other_sizes_than_the_trained_one():
    network = small()
    assert network(torch.randn(1, 3, 12, 16), torch.rand(1)).shape == (1, 3, 12, 16)


@pytest.mark.parametrize("options", [{}, ADM, {"patch": 2}])
def test_sides_that_cannot_be_halved_are_continued_by_their_last_pixels(options):
    network = small(**options)
    torch.nn.init.normal_(network.conv_out.weight)
    m = network.multiple
    x, time = torch.randn(1, 3, 2 * m - 1, m + 1), torch.rand(1)
    whole = torch.cat([x, x[:, :, -1:]], dim=2)
    whole = torch.cat([whole, whole[..., -1:].expand(-1, -1, -1, m - 1)], dim=3)
    drawn = network(x, time)
    assert drawn.shape == x.shape
    torch.testing.assert_close(drawn, network(whole, time)[..., : 2 * m - 1, : m + 1])


def test_attention_is_at_the_size_that_continued_pictures_have():
    told = [
        level.attention is not None for level in UNet(1, 1, size=28).down if hasattr(level, "block")
    ]
    assert told == [False, False, True, True, False, False, False, False]


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
@pytest.mark.parametrize("learns", [False, True])
def test_attention_is_a_softmax_average(dtype, tolerance, learns):
    q, k, v = torch.randn(3, 2, 4, 9, 8).to(dtype).requires_grad_(learns).unbind(0)
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


def renamed(name):
    """The name in diffusers' UNet2DModel of a parameter of our network of two levels."""
    where = {
        "down.0": "down_blocks.0.resnets.0",
        "down.1": "down_blocks.0.downsamplers.0.conv",
        "down.2": "down_blocks.1.resnets.0",
        "middle.0": "mid_block.resnets.0",
        "middle.1": "mid_block.resnets.1",
        "up.0": "up_blocks.0.resnets.0",
        "up.1": "up_blocks.0.resnets.1",
        "up.2": "up_blocks.0.upsamplers.0",
        "up.3": "up_blocks.1.resnets.0",
        "up.4": "up_blocks.1.resnets.1",
        "time.0": "time_embedding.linear_1",
        "time.2": "time_embedding.linear_2",
        "norm_out": "conv_norm_out",
    }
    part = {
        "norm_in": "norm1",
        "conv_in": "conv1",
        "shift": "time_emb_proj",
        "norm_out": "norm2",
        "conv_out": "conv2",
        "skip": "conv_shortcut",
    }
    for ours, theirs in where.items():
        if name.startswith(ours + "."):
            rest = name[len(ours) + 1 :]
            if rest.startswith("attention."):
                theirs = theirs.replace("resnets", "attentions")
                rest = rest.removeprefix("attention.").replace("norm.", "group_norm.")
                return f"{theirs}.{rest}".replace(".out.", ".to_out.0.")
            head, _, tail = rest.removeprefix("block.").partition(".")
            return f"{theirs}.{part.get(head, head)}.{tail}".rstrip(".")
    return name


@pytest.mark.slow
def test_parity_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        norm_eps=1e-6,
    )
    ours = small(head_channels=8)
    for module in ours.modules():
        if isinstance(module, GroupNorm):
            module.groups = 4
    state = {}
    for name, value in ours.state_dict().items():
        name = renamed(name)
        if ".qkv." in name:
            for key, third in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("qkv", f"to_{key}")] = third
        else:
            state[name] = value
    theirs.load_state_dict(state)
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([0.0, 0.75])
    expected = theirs(x, 1000 * time).sample
    assert expected.std() > 0.1
    assert torch.allclose(ours(x, time), expected, atol=1e-5)
