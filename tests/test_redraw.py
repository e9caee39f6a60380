"""Variations, inpainting, outpainting, repairs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tiny
from trilemma import cli, data, redraw, sampling, training
from trilemma.batch import Condition, Rng
from trilemma.codecs import Pixels
from trilemma.diffusion import schedules
from trilemma.diffusion.grids import even_share
from trilemma.errors import UserError
from trilemma.models.diffusion import Diffusion

PLACE = torch.arange(4)
COVARIANCE = 0.06 * 0.8 ** (PLACE[:, None] - PLACE).abs()
MEAN = torch.tensor([0.2, -0.1, 0.1, 0.0])


class Gaussian(nn.Module):
    """The expected picture of four correlated pixels, as a network with the target `image`."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x, time, embedded):
        alpha, sigma = (float(v[0]) for v in self.schedule(time))
        noisy = alpha**2 * COVARIANCE + sigma**2 * torch.eye(4)
        gain = alpha * COVARIANCE @ torch.linalg.inv(noisy)
        x = x.flatten(1) * (alpha**2 + sigma**2) ** 0.5
        return (MEAN + (x - alpha * MEAN) @ gain.T).view(-1, 1, 1, 4)


def gaussian(schedule=None):
    schedule = schedule or schedules.Straight()
    return Diffusion(Pixels((1, 1, 4)), Gaussian(schedule), None, schedule, target="image").eval()


@pytest.mark.parametrize("schedule", [schedules.Straight(), schedules.Linear()])
def test_what_is_painted_has_the_conditional_mean(schedule):
    n, known = 200, torch.tensor([0.5, 0.3])
    image = torch.cat([known, torch.full((2,), 9.0)]).expand(n, 1, 1, 4)  # hidden is not read
    mask = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(n, 1, 1, 4)
    gain = COVARIANCE[2:, :2] @ torch.linalg.inv(COVARIANCE[:2, :2])
    mean = MEAN[2:] + gain @ (known - MEAN[:2])
    spread = (COVARIANCE[2:, 2:] - gain @ COVARIANCE[:2, 2:]).diag().sqrt()
    errors = {}
    for times in (1, 12):
        model, rng = gaussian(schedule), Rng(range(n))
        drawn = model.inpaint(image, mask, Condition(n), rng, steps=20, resample=times)
        assert torch.equal(drawn[..., :2], image[..., :2]), "the known part is touched"
        errors[times] = (drawn[..., 2:].flatten(1).mean(0) - mean).abs().max().item()
    assert errors[12] < 0.06 < 0.08 < errors[1]
    assert (drawn[..., 2:].flatten(1).std(0) / spread).tolist() == pytest.approx([1, 1], abs=0.35)


def test_variations_keep_what_the_noise_left():
    """Of a Gaussian: x_0 and its variation are as correlated as if both were behind one x_t."""
    n, model = 800, gaussian()
    image = (MEAN + Rng(range(n)).normal(4) @ torch.linalg.cholesky(COVARIANCE).T).view(n, 1, 1, 4)
    flat = image.flatten(1)
    last = 2.0
    for strength in (0.05, 0.3, 0.6, 1.0):
        rng = Rng(range(10_000, 10_000 + n))
        drawn = model.vary(image, strength, Condition(n), rng, solver="heun", steps=20).flatten(1)
        torch.testing.assert_close(drawn.mean(0), MEAN, atol=0.04, rtol=0)
        torch.testing.assert_close(torch.cov(drawn.T), COVARIANCE, atol=0.015, rtol=0)
        alike = torch.corrcoef(torch.stack([flat[:, 0], drawn[:, 0]]))[0, 1].item()
        assert alike < last
        last = alike
    assert abs(last) < 0.1, "at strength 1 nothing is left"
    faint = model.vary(image, 0.01, Condition(n), Rng(range(n)), steps=20)
    torch.testing.assert_close(faint, image, atol=0.1, rtol=0)


def test_only_the_steps_below_the_strength_are_taken():
    model, calls = gaussian(), []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    image = torch.zeros(1, 1, 1, 4)
    model.vary(image, 0.5, Condition(1), Rng([0]), solver="euler", steps=10)
    assert len(calls) == 5, even_share(model.schedule, 10)
    calls.clear()
    model.vary(image, 1.0, Condition(1), Rng([0]), solver="euler", steps=10)
    assert len(calls) == 10
    with pytest.raises(ValueError, match="strength is 0"):
        model.vary(image, 0.0, Condition(1), Rng([0]))
    with pytest.raises(ValueError, match="expected at least 1"):
        model.inpaint(image, torch.ones(1, 1, 1, 4), Condition(1), Rng([0]), resample=0)
    with pytest.raises(ValueError, match=r"expected \(1, 1, 1, 4\)"):
        model.inpaint(image, torch.ones(1, 1, 2, 4), Condition(1), Rng([0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A function that gives a recipe's model, trained for two steps."""
    made, root = {}, tmp_path_factory.mktemp("runs")

    def get(name):
        if name not in made:
            changes, out = tiny.overrides(name), root / name
            training.train(name, folder, out=out, steps=2, overrides=changes, quiet=True)
            made[name] = sampling.load(out)
        return made[name]

    return get


@pytest.fixture(scope="module")
def images(folder):
    return data.pictures(folder / "class0", (3, tiny.SIZE, tiny.SIZE))[1][:3]


@pytest.mark.parametrize("name", ["quick-diffusion", "ddpm", "inpainting"])
def test_the_known_part_is_untouched_and_a_seed_is_a_picture(name, trained, images):
    model = trained(name)
    mask = torch.zeros(tiny.SIZE, tiny.SIZE, dtype=torch.bool)
    mask[3:9, 5:] = True
    options = {"steps": 2} if name == "inpainting" else {"steps": 2, "resample": 2}
    made = redraw.inpaint(model, images, mask, n=2, seed=4, **options)
    assert made.shape == (3, 2, *images.shape[1:]) and made.dtype == torch.uint8
    assert torch.equal(made[..., ~mask], images[:, None].expand_as(made)[..., ~mask])
    other = images.clone()
    other[..., mask] = 99  # what is hidden is not read
    alone = redraw.inpaint(model, other[1:2], mask, n=1, seed=6, **options)
    assert (alone[0, 0].int() - made[1, 0].int()).abs().max() <= 2
    wide = redraw.outpaint(model, images, (0, 3, 10, 20), n=2, **options)
    assert wide.shape == (3, 2, 3, tiny.SIZE + 3, tiny.SIZE + 30)
    kept = wide[..., : tiny.SIZE, 10 : 10 + tiny.SIZE]
    assert torch.equal(kept, images[:, None].expand_as(kept))


def test_a_model_trained_with_masks_is_told_the_mask(trained, images):
    """Its network is called once a step, without repetitions."""
    model, calls = trained("inpainting"), []
    handle = model.model.network.register_forward_hook(lambda *_: calls.append(1))
    mask = torch.zeros(tiny.SIZE, tiny.SIZE, dtype=torch.bool)
    mask[:8] = True
    redraw.inpaint(model, images, mask, steps=3)
    handle.remove()
    assert len(calls) == 3
    with pytest.raises(UserError, match="edit inpaint"):
        redraw.vary(model, images)


def test_windows_go_outwards_and_reach_the_borders():
    assert redraw._places(0, 0, 8) == [0]
    assert redraw._places(10, 3, 8) == [10, 6, 2, 0, 13]


def test_variations(trained, images):
    model = trained("quick-diffusion")
    made = redraw.vary(model, images, 0.5, n=2, seed=3, steps=3, label="class1")
    assert made.shape == (3, 2, *images.shape[1:]) and made.dtype == torch.uint8
    alone = redraw.vary(model, images[1:2], 0.5, n=1, seed=5, steps=3, label="class1")
    assert (alone[0, 0].int() - made[1, 0].int()).abs().max() <= 2
    faint = redraw.vary(trained("ddpm"), images, 0.01, steps=3)[:, 0].int()
    assert (faint - images.int()).abs().float().mean() < 10
    redraw.vary(model, images, 0.5, steps=2, guide="trilemma.guides:symmetry")


def test_what_cannot_be_redrawn_is_refused(trained, images):
    model, mask = trained("ddpm"), torch.ones(tiny.SIZE, tiny.SIZE, dtype=torch.bool)
    for strength in (0.0, 1.5):
        with pytest.raises(UserError, match="above|more than 0"):
            redraw.vary(model, images, strength)
    with pytest.raises(UserError, match="at least 1"):
        redraw.vary(model, images, n=0)
    with pytest.raises(UserError, match="trained without classes"):
        redraw.vary(model, images, label="class0")
    with pytest.raises(UserError, match="'resmaple'.*'resample'"):
        redraw.inpaint(model, images, mask, resmaple=3)
    for bad in (mask[:8], mask.float(), ~mask):
        with pytest.raises(UserError, match="expected booleans"):
            redraw.inpaint(model, images, bad)
    for margins in ((0, 0, 0, 0), (0, 0, -1, 3)):
        with pytest.raises(UserError, match="some above 0"):
            redraw.outpaint(model, images, margins)
    with pytest.raises(UserError, match="trained on uint8"):
        redraw.outpaint(model, images[:, :, :8], (0, 0, 0, 4))
    with pytest.raises(UserError, match="redraws no pictures"):
        redraw.vary(trained("quick-vae"), images)
    with pytest.raises(UserError, match="redraws no pictures"):
        redraw.inpaint(trained("quick-vae"), images, mask)
    with pytest.raises(UserError, match="train colourise"):
        redraw.repair(model, images)
    with pytest.raises(UserError, match="uint8 pictures of"):
        redraw.repair(trained("colourise"), images)
    with pytest.raises(UserError, match="without a source"):
        redraw.inpaint(trained("colourise"), images, mask)


def mask_file(path, size, box, mode="L"):
    values = np.zeros(size[::-1], np.uint8)
    left, top, right, bottom = box
    values[top:bottom, left:right] = 255
    image = Image.fromarray(values)
    if mode == "RGBA":  # transparent is drawn
        colour = Image.new("RGB", size, "red")
        colour.putalpha(Image.fromarray(255 - values))
        image = colour
    image.save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "RGBA"])
@pytest.mark.parametrize("size", [(16, 16), (64, 64), (4, 4)])
def test_masks_of_any_size(mode, size, folder, tmp_path):
    box = (size[0] // 2, 0, size[0], size[1] // 4)
    path = mask_file(tmp_path / "mask.png", size, box, mode)
    made = redraw.read_mask(path, folder / "class0", tiny.SIZE)
    expected = torch.zeros(tiny.SIZE, tiny.SIZE, dtype=torch.bool)
    expected[:4, 8:] = True
    assert torch.equal(made, expected)


def test_masks_are_turned_upright_and_may_be_opaque(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is on the right
    for name, mode, more in (("turned.png", "L", {"exif": exif}), ("opaque.png", "RGBA", {})):
        mask = Image.new("L", (40, 20))
        mask.paste(255, (0, 0, 40, 10))
        mask.convert(mode).save(tmp_path / name, **more)
    tall, wide = (tmp_path / name for name in ("tall.png", "wide.png"))
    Image.new("RGB", (20, 40)).save(tall)
    Image.new("RGB", (40, 20)).save(wide)
    turned = redraw.read_mask(tmp_path / "turned.png", tall, 8)
    assert turned[:, 4:].all() and not turned[:, :4].any()
    opaque = redraw.read_mask(tmp_path / "opaque.png", wide, 8)
    assert opaque[:4].all() and not opaque[4:].any()
    Image.new("1", (15000, 15000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="cannot be read: decompression bomb"):
        redraw.read_mask(tmp_path / "bomb.png", wide, 8)


def test_masks_are_cut_as_their_pictures_are(tmp_path):
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "wide.png")
    path = mask_file(tmp_path / "mask.png", (80, 40), (0, 0, 40, 40))
    made = redraw.read_mask(path, tmp_path / "wide.png", 8)
    assert made[:, :4].all() and not made[:, 4:].any()


def test_bad_masks_are_refused(tmp_path):
    picture = tmp_path / "wide.png"
    Image.new("RGB", (40, 20), "blue").save(picture)
    square = mask_file(tmp_path / "square.png", (40, 40), (0, 0, 9, 9))
    with pytest.raises(UserError, match="make it 40 x 20, or of these proportions"):
        redraw.read_mask(square, picture, 8)
    black = mask_file(tmp_path / "black.png", (40, 20), (0, 0, 0, 0))
    with pytest.raises(UserError, match="must be white"):
        redraw.read_mask(black, picture, 8)
    (tmp_path / "no.png").write_bytes(b"no picture")
    for name in ("no.png", "not_there.png"):
        with pytest.raises(UserError, match="cannot be read"):
            redraw.read_mask(tmp_path / name, picture, 8)


def test_commands(trained, folder, tmp_path, monkeypatch, capsys):
    run, pictures = trained("quick-diffusion").path, folder / "class0"

    def call(verb, run, *arguments):
        words = ["edit", verb, run, pictures, "--out", tmp_path / verb, "--json", *arguments]
        monkeypatch.setattr("sys.argv", ["trilemma", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capsys.readouterr().err
        made = json.loads(capsys.readouterr().out)
        facts = json.loads(Image.open(made["images"][0]).text["trilemma"])
        assert facts["edit"] == verb and Image.open(made["grid"]).size[0] > 16
        return len(made["images"]), facts

    mask = mask_file(tmp_path / "mask.png", (32, 32), (0, 0, 16, 32))
    count, facts = call("vary", run, "--strength", 0.4, "-n", 2, "--steps", 2, "--label", "class1")
    assert count == 14 and facts["strength"] == 0.4 and facts["sample"]["guidance"] == 1.5
    count, facts = call("inpaint", run, "--mask", mask, "-n", 1, "--steps", 2, "--resample", 2)
    assert count == 7 and facts["sample"] == {"guidance": 1.0, "steps": 2, "resample": 2}
    assert facts["mask"] == str(mask)
    count, facts = call("outpaint", run, "--right", 4, "--steps", 2, "--resample", 1)
    assert count == 7 and facts["margins"] == [0, 0, 0, 4]
    count, facts = call("repair", trained("colourise").path, "-n", 2, "--steps", 2)
    assert count == 14 and facts["source"] == "grey"
    count, facts = call("repair", trained("super-resolution").path, "--steps", 2)
    assert count == 7 and facts["source"] == "small"
