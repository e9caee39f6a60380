"""Editing: laws of the paths and of denoising, and every verb over every family."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from PIL import Image

import tiny
from trilemma import cli, data, drawing, edit, recipe, sampling, training
from trilemma.batch import Rng
from trilemma.codecs import Pixels
from trilemma.conditioning import Labels
from trilemma.diffusion.schedules import Cosine, Straight
from trilemma.errors import UserError
from trilemma.metrics.restoration import noise_deviation
from trilemma.model import HasCompletion, HasDenoising, HasLatents
from trilemma.models import inversion
from trilemma.models.diffusion import Diffusion


def test_spherical_keeps_the_length_and_walks_evenly():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    third = edit.spherical(a, b, 1 / 3)
    assert torch.allclose(third, 3 * torch.tensor([[math.cos(math.pi / 6), 0.5]]), atol=1e-6)
    assert torch.equal(edit.spherical(a, b, 0.0), a)
    assert torch.allclose(edit.spherical(a, b, 1.0), b, atol=1e-6)


def test_spherical_is_straight_where_there_is_no_angle():
    a = torch.tensor([[1.0, 2.0]])
    assert torch.allclose(edit.spherical(a, 3 * a, 0.5), 2 * a)
    latent = torch.randn(2, 3, 4, 4)
    assert edit.spherical(latent, latent + 1, 0.3).shape == latent.shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.captioned(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")

    def fit(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(out)  # beside the runs that other recipes need
            for needed in recipe.load(name)["about"]["needs"]:
                if needed.startswith("runs/"):
                    train(needed.removeprefix("runs/"), out / needed)
            return train(name, out / name)

    def train(name, out):
        if not out.exists():
            two = out.with_name(f"{name}-domains")
            pictures = tiny.domains(two) if tiny.translates(name) else folder
            training.train(
                name, pictures, out=out, steps=3, seed=1, quiet=True,
                overrides=tiny.overrides(name),
            )  # fmt: skip
        return sampling.load(out)

    return fit


@pytest.fixture(autouse=True)
def short_searches(monkeypatch):
    monkeypatch.setattr(inversion, "STARTS", 32)
    monkeypatch.setattr(inversion, "ROUNDS", ((2, 3), (1, 5)))


@pytest.mark.parametrize("name", recipe.names())
def test_every_verb_of_latents_over_every_family(name, folder, trained):
    model = trained(name)
    images = data.pictures(folder / "class0", model.data["shape"])[1][:4]
    if not isinstance(model.model, HasLatents) or model.repairs:
        with pytest.raises(UserError, match="no latents"):
            edit.reconstruct(model, images)
        return
    back = edit.reconstruct(model, images)
    assert back.shape == images.shape and back.dtype == torch.uint8
    ways = edit.interpolate(model, images[:2], images[2:4], steps=3)
    assert ways.shape == (2, 3, *images.shape[1:])
    ends = back.int()
    assert (ways[:, 0].int() - ends[:2]).abs().max() <= 2
    assert (ways[:, -1].int() - ends[2:]).abs().max() <= 2
    still = edit.arithmetic(model, images[:2], images[2:4], images[2:4], strength=5)
    assert (still.int() - ends[:2]).abs().max() <= 2
    scores, _ = edit.score(model, images)
    assert scores.shape == (len(images),) and scores.isfinite().all()
    with pytest.raises(ValueError, match=r"latents of shape \(2, 3\) were given; expected \(B, "):
        edit.decode(model, torch.zeros(2, 3))


@pytest.mark.parametrize("name", recipe.names())
def test_completion_over_every_family(name, folder, trained):
    model = trained(name)
    images = data.pictures(folder / "class0", model.data["shape"])[1][:2]
    if not isinstance(model.model, HasCompletion):
        with pytest.raises(UserError, match="completes no pictures; use an autoregressive"):
            edit.complete(model, images)
        return
    made = edit.complete(model, images, 0.75, n=2, seed=5)
    assert made.shape == (2, 2, *images.shape[1:]) and made.dtype == torch.uint8
    assert torch.equal(made[..., :12, :], images[:, None, :, :12].expand(-1, 2, -1, -1, -1))
    blank = images.clone()
    blank[:, :, 12:] = 7
    apart = edit.complete(model, blank[1:], 0.75, n=2, seed=7)
    assert (apart[0].int() - made[1].int()).abs().max() <= 2, "read below, or depends on its batch"
    for wrong, told in (
        ({"keep": 1.0}, "keep 16 of 16 rows"),
        ({"keep": float("nan")}, "keep 0 of 16 rows"),
        ({"n": 0}, "0 completions"),
        ({"label": "cat"}, "no class 'cat'"),
        ({"steps": 3}, "cannot be sampled with 'steps'"),
    ):
        with pytest.raises(UserError, match=told):
            edit.complete(model, images, **wrong)


@pytest.mark.parametrize("name", recipe.names())
def test_denoising_over_every_family(name, folder, trained):
    model = trained(name)
    images = data.pictures(folder / "class0", model.data["shape"])[1][:2]
    if recipe.load(name)["model"].get("codec", {}).get("type") == "codecs.Latents":
        with pytest.raises(UserError, match="removes no noise: it knows noise on latents"):
            edit.denoise(model, images)
    elif model.repairs:
        with pytest.raises(UserError, match="removes no noise; use denoising-ae"):
            edit.denoise(model, images)
    elif isinstance(model.model, HasDenoising):
        assert edit.denoise(model, images).shape == images.shape
    elif isinstance(model.model, HasLatents) and model.recipe["about"]["family"] != "flow":
        assert torch.equal(edit.denoise(model, images, 0.3), edit.reconstruct(model, images))
    else:
        with pytest.raises(UserError, match="removes no noise; use denoising-ae"):
            edit.denoise(model, images)


class _Gaussian(torch.nn.Module):
    """The exact straight-target network for pictures that are N(0, s^2)."""

    def __init__(self, spread, schedule, data_std):
        super().__init__()
        self.spread, self.schedule, self.data_std = spread, schedule, data_std

    def forward(self, x, t, embedded):
        alpha, sigma = (v[:, None, None, None] for v in self.schedule(t))
        x = x * (alpha**2 * self.data_std**2 + sigma**2).sqrt()
        variance = alpha**2 * self.spread**2 + sigma**2
        x0 = alpha * self.spread**2 / variance * x
        noise = sigma / variance * x
        return noise - x0


@pytest.mark.parametrize("schedule", [Straight(), Cosine()])
def test_diffusion_inverts_a_picture_into_its_noise(schedule):
    spread = 0.3
    network = _Gaussian(spread, schedule, 1.0)
    model = Diffusion(Pixels((1, 4, 4)), network, schedule=schedule, target="straight")
    image = spread * Rng(range(64)).normal(1, 4, 4)
    latent = model.encode(image)
    assert (latent - image / spread).abs().max() < 0.05, "the flow of a Gaussian only scales"
    assert (model.decode(latent) - image).abs().max() < 0.02


@pytest.mark.parametrize("schedule", [Straight(), Cosine()])
def test_diffusion_takes_noise_away_as_the_best_estimator_does(schedule):
    """Of N(0, s^2) under noise of deviation d: the mean s^2 / (s^2 + d^2) x."""
    spread = 0.3
    network = _Gaussian(spread, schedule, 1.0)
    model = Diffusion(Pixels((1, 4, 4)), network, schedule=schedule, target="straight")
    deviation = torch.tensor([0.0, 0.1, 0.3, 2.0])
    noisy = 0.3 * Rng(range(4)).normal(1, 4, 4)
    share = (spread**2 / (spread**2 + deviation**2))[:, None, None, None]
    assert torch.allclose(model.restore(noisy, deviation), share * noisy, atol=1e-3)


def test_the_strength_of_noise_is_measured_unless_it_is_told():
    network = _Gaussian(0.3, Straight(), 1.0)
    model = Diffusion(Pixels((1, 64, 64)), network, Labels(3, 8), Straight(), target="straight")
    spec = {"train": {"precision": "fp32"}, "run": {"recipe": "gaussian"}}
    trained = sampling.Trained(model, spec, {"shape": [1, 64, 64]}, {})
    noisy = edit.add_noise(torch.full((2, 1, 64, 64), 128, dtype=torch.uint8), 0.3)
    told, wrongly = (edit.denoise(trained, noisy, deviation).int() for deviation in (0.3, 0.05))
    assert (edit.denoise(trained, noisy).int() - told).abs().max() <= 8
    assert (wrongly - told).abs().max() > 30


def test_added_noise_is_of_its_deviation_and_measured():
    grey = torch.full((3, 1, 64, 64), 128, dtype=torch.uint8)
    noisy = edit.add_noise(grey, 0.2)
    assert abs(noisy.float().std() / 127.5 - 0.2) < 0.01
    assert (noise_deviation(noisy) / 127.5 - 0.2).abs().max() < 0.02
    assert torch.equal(edit.add_noise(grey[1:2], 0.2, seed=1), noisy[1:2])
    steps = torch.arange(65).repeat(3, 2, 9, 1)  # odd sizes, and a picture that is not flat
    assert torch.equal(noise_deviation(steps), torch.zeros(3))


def test_diffusion_that_needs_a_label_says_so():
    network = _Gaussian(0.3, Straight(), 1.0)
    model = Diffusion(
        Pixels((1, 4, 4)), network, Labels(3, 8, dropout=0.0), Straight(), target="straight"
    )
    with pytest.raises(ValueError, match="dropout"):
        model.encode(torch.zeros(1, 1, 4, 4))


def test_what_cannot_be_edited_is_refused(trained, folder):
    model = trained("vae")
    _, images, _ = data.pictures(folder / "class0", model.data["shape"])
    with pytest.raises(UserError, match="trained on uint8 pictures of"):
        edit.reconstruct(model, images[:, :, :8])
    with pytest.raises(UserError, match="at least one"):
        edit.reconstruct(model, images[:0])
    with pytest.raises(UserError, match="spherical, linear"):
        edit.interpolate(model, images[:1], images[1:2], path="curved")
    with pytest.raises(UserError, match="as many pictures"):
        edit.interpolate(model, images[:1], images[1:3])


def test_an_odd_picture_is_the_strangest(tmp_path):
    grey = torch.full((64, 1, 16, 16), 128, dtype=torch.uint8)
    grey += torch.randint(-20, 20, (64, 1, 1, 1), generator=torch.Generator().manual_seed(0)).byte()
    for i, image in enumerate(grey):
        drawing.to_pil(image).save(tmp_path / f"{i}.png")
    model = training.train(
        "vae", tmp_path, out=tmp_path / "run", steps=60, quiet=True, overrides=tiny.overrides("vae")
    )
    odd = grey[0].clone()
    odd[:, ::2] = 0
    scores, measure = edit.score(model, torch.stack([*grey[:5], odd]))
    assert scores.argmax() == 5 and "reconstruction" in measure


def test_pictures_of_one_file_and_of_a_folder_with_bad_files(folder, tmp_path):
    one = next(iter(sorted((folder / "class0").iterdir())))
    names, images, skipped = data.pictures(one, (3, 8, 8))
    assert names == [one.name] and images.shape == (1, 3, 8, 8) and not skipped
    Image.open(one).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    names, images, skipped = data.pictures(tmp_path, (1, 8, 8))
    assert names == ["good.png"] and images.shape == (1, 1, 8, 8) and "bad.png" in skipped
    (tmp_path / "good.png").unlink()
    with pytest.raises(UserError, match="no picture that can be used.*empty file"):
        data.pictures(tmp_path, (1, 8, 8))


def test_commands(folder, trained, tmp_path, monkeypatch, capsys):
    run, pictures = str(trained("vae").path), str(folder / "class0")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trilemma", *arguments, "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return json.loads(capsys.readouterr().out)

    out = ["--out", str(tmp_path / "out")]
    made = call("edit", "reconstruct", run, pictures, *out)
    assert len(made["images"]) == 7 and Image.open(made["grid"]).size[0] > 16
    for path in (made["images"][0], made["grid"]):
        assert json.loads(Image.open(path).text["trilemma"])["edit"] == "reconstruct"
    made = call("edit", "interpolate", run, pictures, pictures, "--steps", "3", *out)
    assert len(made["images"]) == 21
    more = ["--plus", str(folder / "class1"), "--minus", str(folder / "class2")]
    assert len(call("edit", "arithmetic", run, pictures, *more, *out)["images"]) == 7
    made = call("edit", "denoise", run, pictures, "--noise", "0.3", *out)
    assert len(made["images"]) == 7 and 12 < made["psnr_noisy"] < 20 and made["psnr"] > 0
    assert "psnr" not in call("edit", "denoise", run, pictures, *out)
    pixelcnn = str(trained("pixelcnn").path)
    more = ["--keep", "0.75", "-n", "2", "--temperature", "0.9", "--label", "class1"]
    made = call("edit", "complete", pixelcnn, pictures, *more, *out)
    assert len(made["images"]) == 14
    assert Image.open(made["grid"]).size[0] == 4 * 16 + 3 * 2, "given, two, original"
    facts = json.loads(Image.open(made["images"][0]).text["trilemma"])
    assert facts["sample"] == {"temperature": 0.9} and facts["keep"] == 0.75
    scores = call("score", run, pictures)["scores"]
    assert [row["score"] for row in scores] == sorted((r["score"] for r in scores), reverse=True)


def test_only_the_upper_part_can_be_kept(trained, folder, monkeypatch, capsys):
    command = ["edit", "complete", str(trained("pixelcnn").path), str(folder), "--out", "nowhere"]
    monkeypatch.setattr(sys, "argv", ["trilemma", *command, "--keep", "left"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "'left' cannot be kept" in capsys.readouterr().err
