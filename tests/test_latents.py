"""Diffusion on the latents of a trained first stage: laws of the codec, and the run around it."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import tiny
from trilemma import checkpoint, data, edit, recipe, sampling, training
from trilemma.batch import to_float, to_uint8
from trilemma.codecs import Latents
from trilemma.errors import Interrupted, UserError
from trilemma.model import Frozen


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return data.load(tiny.pictures(tmp_path_factory.mktemp("pictures"), 40), split="all")


@pytest.fixture(scope="module", params=["kl-f4", "vq-f4", "vqvae"])
def stage(request, pictures, tmp_path_factory):
    """The folder of a trained first stage."""
    out = tmp_path_factory.mktemp("stage") / "run"
    fit(request.param, pictures, out)
    return out


def fit(name, pictures, out, *changes, **options):
    changes = [*tiny.overrides(name), *changes]
    options = {"steps": 4, "seed": 1, "quiet": True, **options}
    return training.train(name, pictures, out=out, overrides=changes, **options)


def using(stage):
    channels = sampling.load(stage).model.latent_shape[0]
    widths = [f"model.network.{way}_channels={channels}" for way in ("in", "out")]
    return [f'model.codec.stage.path="{stage}"', *widths]


@pytest.fixture(scope="module")
def drawing(stage, pictures, tmp_path_factory):
    """A model of its latents."""
    return fit("latent-diffusion", pictures, tmp_path_factory.mktemp("runs") / "l", *using(stage))


def test_there_and_back_is_the_first_stages_own(drawing, stage, pictures):
    images, codec = pictures.tensor(slice(8)), drawing.model.codec
    back = codec.decode(codec.encode(to_float(images)))
    wanted = edit.reconstruct(sampling.load(stage), images)
    assert (to_uint8(back).int() - wanted.int()).abs().max() <= 1
    assert codec.shape == codec.encode(to_float(images)).shape[1:]
    other = codec.encode(torch.zeros(2, 3, 8, 16))
    assert other.shape == (2, *codec.space(8, 16)) and codec.decode(other).shape == (2, 3, 8, 16)
    with pytest.raises(ValueError, match=r"expected \(B, 3, h, w\)"):
        codec.encode(torch.zeros(2, 1, 16, 16))


def test_latents_have_mean_0_and_deviation_1(drawing, pictures):
    x = drawing.model.codec.encode(to_float(pictures.tensor(slice(None))))
    assert x.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)
    assert x.mean((0, 2, 3)).abs().max() < 1e-3
    assert drawing.model.codec.deviation != 1


def test_the_measure_is_the_same_whatever_the_seed(drawing, stage, pictures, tmp_path):
    changes = [*using(stage), "train.batch=4"]
    other = fit("latent-diffusion", pictures, tmp_path / "b", *changes, seed=2, steps=1)
    for name in ("mean", "deviation"):
        one, two = (getattr(m.model.codec, name) for m in (drawing, other))
        assert torch.equal(one, two)


def test_a_run_goes_on_when_its_first_stage_is_gone(pictures, tmp_path):
    def stop(trained, elapsed):
        raise Interrupted("as by Ctrl-C")

    stage = tmp_path / "stage"
    fit("kl-f4", pictures, stage)
    changes = [*using(stage), "train.save_every=0"]
    whole = fit("latent-diffusion", pictures, tmp_path / "whole", *changes)
    with pytest.raises(Interrupted):
        fit("latent-diffusion", pictures, tmp_path / "parts", *changes, probe=stop, probes=2)
    theirs = checkpoint.read_model(stage)[0]
    shutil.rmtree(stage)
    parts = fit("latent-diffusion", pictures, tmp_path / "parts", *changes, resume=True)
    one, two = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    loaded = sampling.load(tmp_path / "whole")
    assert torch.equal(loaded.sample(3, seed=3, steps=2), whole.sample(3, seed=3, steps=2))
    ours = checkpoint.read_model(tmp_path / "whole")[0]
    for name, tensor in theirs.items():
        assert torch.equal(ours[f"codec.stage.module.{name}"], tensor), name


def test_latents_of_noise_and_back(drawing, pictures):
    """The noise of a picture is as long as a latent is; noise on a picture is refused."""
    images = pictures.tensor(slice(2))
    noise = edit.encode(drawing, images)
    assert noise.shape == (2, *drawing.model.codec.shape)
    assert edit.decode(drawing, noise).shape == images.shape
    with pytest.raises(UserError, match="latent-diffusion removes no noise: it knows noise on lat"):
        edit.denoise(drawing, images, 0.3)


def test_what_is_no_first_stage_is_named(pictures, tmp_path):
    with pytest.raises(ValueError, match="a trained Linear, whose latents are no grid"):
        Latents(Frozen(nn.Linear(2, 2)), (3, 16, 16))
    fit("ae", pictures, tmp_path / "ae", steps=1)
    spec = recipe.override(
        recipe.load("latent-diffusion"), [f'model.codec.stage.path="{tmp_path / "ae"}"']
    )
    with pytest.raises(UserError, match="a trained AE, whose latents are no grid"):
        recipe.build(recipe.resolve(spec, training.facts(pictures))["model"])


class Blind(nn.Module):
    """A first stage that sees nothing."""

    latent_shape = (2, 4, 4)

    def encode(self, image):
        return torch.full((len(image), *self.latent_shape), 3.0)

    def decode(self, latent):
        return latent


def test_latents_that_tell_nothing_are_named(pictures):
    model = nn.ModuleDict({"codec": Latents(Frozen(Blind()), pictures.shape)})
    with pytest.raises(UserError, match="all pictures to the same latents"):
        training.measure(model, pictures)
