"""What makes a checkpoint draw faster: off, or where it cannot matter, it changes nothing."""

import dataclasses
import math

import pytest
import torch

from trilemma import device
from trilemma.batch import Rng
from trilemma.diffusion.schedules import Quadratic
from trilemma.errors import UserError
from trilemma.networks.flux import Flux
from trilemma.networks.layers import Embedded, GroupNorm, Reuse
from trilemma.networks.mmdit import MMDiT
from trilemma.networks.spatial_unet import SpatialUNet
from trilemma.networks.tiny_autoencoder import TinyAutoencoder
from trilemma.networks.token_merging import merging
from trilemma.stable import flow, packing
from trilemma.stable.pipeline import StableDiffusion
from trilemma.stable.rectified import Flux1, StableDiffusion3
from trilemma.stable.schedule import Spacing

CPU = torch.device("cpu")
UNET = {"channels": (32, 64), "blocks": 1, "text_dim": 16, "heads": (4, 4)}
VERSIONS = {
    "1": UNET | {"transformers": (1, 0)},
    "XL": UNET | {"transformers": (0, 2), "linear": True, "vector_dim": 16, "numbers": 6},
}


def read(texts):
    """Draw what stands for each text: the same for the same text."""
    at = [torch.Generator().manual_seed(sum(map(ord, text))) for text in texts]
    tokens = torch.stack([torch.randn(7, 16, generator=each) for each in at])
    return Embedded(vector=tokens.mean(1), tokens=tokens)


def drawn(network):
    """Draw all weights anew, so that none is 0 or 1."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(0, 0.5 * weight[0].numel() ** -0.5)
            if weight.ndim == 1:
                weight.add_(0.3)
    return network.eval().requires_grad_(False)


def stable(version):
    torch.manual_seed(0)
    coder = drawn(TinyAutoencoder(8, (1, 1), (1, 1)))
    unet = drawn(SpatialUNet(**VERSIONS[version]))
    spacing = Spacing(Quadratic(1000, 0.00085, 0.012))
    return StableDiffusion(unet, coder, read, spacing, 16, False, torch.float32, CPU)


def rectified(kind):
    torch.manual_seed(0)
    told = {"patch": 2, "width": 16, "depth": 3, "heads": 2, "text_dim": 16, "pooled_dim": 16}
    coder = drawn(TinyAutoencoder(8, (1, 1), (1, 1), latent=16))
    if kind == "flux":
        network = Flux(**told, singles=3, axes=(2, 2, 4), guided=False)
        model = Flux1(drawn(network), coder, flow.Shift(), None, None, size=16)
    else:
        network = MMDiT(**told, table=8, size=8)
        model = StableDiffusion3(drawn(network), coder, flow.Shift(), (), None, size=16)
    model.embed = read
    return model


MODELS = {name: (stable, name) for name in VERSIONS}
MODELS |= {name: (rectified, name) for name in ("sd3", "flux")}


@pytest.fixture(params=MODELS)
def model(request):
    make, name = MODELS[request.param]
    return make(name)


def draw(model, **options):
    name = "true_guidance" if isinstance(model, Flux1) else "guidance"
    options = {name: 4.0, "steps": 4} | options
    return model.draw(["a pear", "an apple"], Rng([1, 2]), **options)


def test_off_they_change_nothing(model):
    off = {"reuse_blocks": 1, "guidance_interval": (0, math.inf)}
    off |= {"merge_tokens": 0.0} if isinstance(model, StableDiffusion) else {}
    exact = draw(model)
    assert torch.equal(draw(model, **off), exact)
    assert exact.std() > 1e-3


def test_guidance_nowhere_is_none(model):
    told = {"true_guidance" if isinstance(model, Flux1) else "guidance": 1.0}
    assert torch.equal(draw(model, guidance_interval=(1e6, 1e7)), draw(model, **told))
    assert not torch.equal(draw(model, guidance_interval=(0.5, 2)), draw(model, **told))


def test_deep_blocks_are_computed_in_one_step_of_so_many(model):
    network = model.unet if isinstance(model, StableDiffusion) else model.network
    deep = {SpatialUNet: "mid_block", MMDiT: "blocks.1", Flux: "singles.0"}[type(network)]
    calls = []
    network.get_submodule(deep).register_forward_hook(lambda *_: calls.append(1))
    exact = draw(model, steps=5)
    assert len(calls) == 5
    far = (draw(model, steps=5, reuse_blocks=2) - exact).abs().max()
    assert len(calls) == 5 + 3 and 0 < far < 1
    calls.clear()
    draw(model, steps=4, reuse_blocks=4, guidance_interval=(0, 1))
    assert len(calls) == 2  # anew where guidance begins or ends: the batch is another


def test_reused_at_the_same_place_it_is_the_same():
    unet, x = stable("1").unet, torch.randn(2, 4, 8, 8)
    time, text, reuse = torch.full((2,), 0.5), read(["a", "b"]), Reuse(2)
    exact = unet(x, time, text)
    for _ in range(3):
        assert torch.equal(unet(x, time, text, reuse=reuse), exact)
    for network in (rectified("sd3").network, rectified("flux").network):
        x, reuse = torch.randn(2, 16, 8, 8), Reuse(2)
        exact = network(x, time, text)
        for _ in range(3):
            torch.testing.assert_close(network(x, time, text, reuse=reuse), exact)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_both_texts_share_is_computed_once(version):
    """x is given once for two texts, and all is as if it were given twice."""
    unet = stable(version).unet
    x, time, texts = torch.randn(2, 4, 8, 6), torch.tensor([0.5, 0.25]), read(["a", "b", "c", "d"])
    numbers = torch.rand(4, 6) if version == "XL" else None
    twice = unet(torch.cat([x, x]), torch.cat([time, time]), texts, numbers)
    torch.testing.assert_close(unet(x, time, texts, numbers), twice, atol=1e-5, rtol=1e-5)
    rows = []
    unet.conv_in.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    unet(x, time, texts, numbers)
    assert rows == [4 if version == "XL" else 2]  # whose time embedding has the text in it


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_places_that_are_equal_are_merged_and_spread_without_loss(size):
    cells = torch.randn(2, (size[0] + 1) // 2, (size[1] + 1) // 2, 8)
    x = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : size[0], : size[1]].flatten(1, 2)
    for share in (0.25, 0.5, 0.75):
        merged, spread = merging(x, size, share)
        few = merged(x)
        assert few.shape[1] == max(x.shape[1] - round(share * x.shape[1]), cells[0, ..., 0].numel())
        torch.testing.assert_close(spread(few), x)


def test_those_most_alike_are_merged():
    x = torch.randn(1, 16, 8)
    merged, spread = merging(x, (4, 4), 2 / 16)
    again = spread(merged(x))
    moved = (again - x).abs().amax(2)[0] > 1e-6
    assert moved.sum() <= 4 and merged(x).shape == (1, 14, 8)
    torch.testing.assert_close(merged(x).mean(1), merged(again).mean(1))


def test_merging_all_that_is_equal_changes_no_picture():
    """With every cell of equal places, attention over one of each is attention over all."""
    block = stable("1").unet.down_blocks[0].attentions[0].transformer_blocks[0]
    x = torch.randn(2, 3, 4, 32).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    text = torch.randn(2, 7, 16)
    exact, merged = block(x, text), block(x, text, (6, 8), 0.75)
    torch.testing.assert_close(merged, exact, atol=1e-5, rtol=1e-5)


def test_merging_acts_on_the_largest_attentions(monkeypatch):
    from trilemma.networks import spatial_unet

    sizes = []

    def watched(x, size, share):
        sizes.append(tuple(size))
        return merging(x, size, share)

    monkeypatch.setattr(spatial_unet, "merging", watched)
    for version, calls in (("1", 3), ("XL", 6)):
        sizes.clear()
        model = stable(version)
        draw(model, steps=1, merge_tokens=0.5)
        side = {"1": 8, "XL": 4}[version]
        assert sizes == [(side, side)] * calls


def test_what_cannot_be_is_told(model):
    with pytest.raises(UserError, match="reuse_blocks is 0; expected 1, for never, or more"):
        draw(model, reuse_blocks=0)
    with pytest.raises(UserError, match=r"guidance_interval is \[3, 1\]"):
        draw(model, guidance_interval=(3, 1))
    none = {"true_guidance" if isinstance(model, Flux1) else "guidance": 1.0}
    with pytest.raises(UserError, match="there is none; give a guidance above 1"):
        draw(model, guidance_interval=(0, 1), **none)
    with pytest.raises(UserError, match="guidance_rescale says .*there is none"):
        draw(model, guidance_rescale=0.5, **none)
    with pytest.raises(UserError, match="a negative text acts by classifier-free guidance"):
        draw(model, negative="blue", **none)
    with pytest.raises(UserError, match="guidance is nan; expected a finite number"):
        draw(model, **dict.fromkeys(none, math.nan))
    if isinstance(model, StableDiffusion):
        with pytest.raises(UserError, match=r"merge_tokens is 0\.9; expected 0, for none, to"):
            draw(model, merge_tokens=0.9)


@pytest.mark.skipif(not packing.pays(CPU, torch.bfloat16), reason="no bfloat16 in oneDNN here")
def test_packed_weights_change_nothing_but_rounding(model):
    network = model.unet if isinstance(model, StableDiffusion) else model.network
    channels = 4 if isinstance(model, StableDiffusion) else 16
    x, time, text = torch.randn(2, channels, 8, 8), torch.full((2,), 0.5), read(["a", "b"])
    rest = (torch.rand(2, 6),) if getattr(network, "numbers", 0) else ()
    exact = network(x, time, text, *rest)
    for layer in network.modules():
        if not isinstance(layer, torch.nn.LayerNorm | GroupNorm):
            for weight in layer.parameters(recurse=False):
                weight.data = weight.data.bfloat16()

    def run():
        with device.autocast(torch.bfloat16, CPU):
            return network(x, time, text, *rest).float()

    plain = run()
    packing.pack(network)
    packed = run()
    off = (plain - exact).norm() / exact.norm()
    assert 1e-4 < off < 0.1
    assert (packed - plain).norm() / exact.norm() < 1.5 * off
    assert (packed - exact).norm() / exact.norm() < 1.5 * off


def test_the_command_hands_them_on(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from trilemma.cli import app
    from trilemma.stable import load

    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(load, "load", lambda *_, **__: dataclasses.replace(stable("1")))
    asked = ["sample", str(tmp_path), "--text", "a pear", "--steps", "2", "--json"]
    fast = ["--reuse-blocks", "2", "--merge-tokens", "0.5", "--guidance-interval", "0.1,5"]
    done = CliRunner().invoke(app, [*asked, *fast, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    from PIL import Image

    told = Image.open(tmp_path / "out" / "00000.png").text["trilemma"]
    assert '"reuse_blocks": 2, "merge_tokens": 0.5' in told
    assert '"guidance_interval": [0.1, 5.0]' in told
    monkeypatch.setattr(load, "load", lambda *_, **__: rectified("sd3"))
    done = CliRunner().invoke(app, [*asked, *fast, "--out", str(tmp_path / "out")])
    assert "cannot be sampled with merge_tokens; this checkpoint takes text" in str(done.exception)
