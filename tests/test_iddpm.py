"""Improved DDPM: the recipe's network, learned variances and the bound in bits per dimension."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

import tiny
from trilemma import checkpoint, data, training
from trilemma.batch import Batch, Condition, Rng, to_float
from trilemma.codecs import Pixels
from trilemma.diffusion.schedules import Linear
from trilemma.diffusion.times import Uniform
from trilemma.errors import UserError
from trilemma.model import HasCostlyLikelihood
from trilemma.models.diffusion import Diffusion

STEPS = 12
SHORT = [f"model.schedule.steps={STEPS}", f"model.times.steps={STEPS}"]


@pytest.fixture(scope="module", params=[1, 3])
def trained(request, tmp_path_factory):
    """A tiny run on grey pictures, or on coloured ones."""
    folder = tiny.pictures(tmp_path_factory.mktemp("pictures"))
    pictures = data.load(folder, split="all", channels=request.param)
    changes = [*tiny.overrides("iddpm"), *SHORT, "train.batch=16", "train.log_every=1"]
    out = tmp_path_factory.mktemp("runs") / "iddpm"
    fitted = training.train("iddpm", pictures, out=out, steps=4, quiet=True, overrides=changes)
    return fitted, pictures


def test_the_network_says_a_variance_for_each_number(trained):
    fitted, pictures = trained
    channels = pictures.shape[0]
    assert fitted.recipe["model"]["network"]["out_channels"] == 2 * channels
    x = to_float(pictures.tensor(slice(3)))
    embedded = fitted.model.conditioner.nothing(Condition(3))
    assert fitted.model.denoise(x, 0.5, embedded).shape == x.shape
    assert fitted.model.share.shape == x.shape


def test_the_bound_is_finite_and_of_every_picture(trained):
    fitted, pictures = trained
    model = fitted.model
    assert isinstance(model, HasCostlyLikelihood) and model.discrete and model.bound
    assert model.likelihood_calls == STEPS
    nats = model.log_prob(to_float(pictures.tensor(slice(4))))
    bits = -nats / (math.log(2) * math.prod(pictures.shape))
    assert nats.shape == (4,) and torch.isfinite(bits).all() and (bits > 0).all()


def test_it_draws_with_the_variance_it_learned(trained):
    fitted, pictures = trained
    assert fitted.sample_defaults["variance"] == "learned"
    drawn = fitted.sample(4, steps=5)
    assert drawn.shape == (4, *pictures.shape)
    small = fitted.sample(4, steps=5, variance="small")
    assert not torch.equal(drawn, small)
    assert fitted.sample(2, solver="dpmpp_2m", steps=3).shape == (2, *pictures.shape)
    with pytest.raises(UserError, match="cannot be sampled with 'variance'"):
        fitted.sample(2, solver="dpmpp_2m", steps=3, variance="learned")


BOUND = [
    *("model.loss=bound", "model.times.type=diffusion.times.Importance", "model.times.history=2"),
    *("model.schedule.steps=4", "model.times.steps=4", "train.batch=16", "train.log_every=1"),
]


def fit(folder, out, *more, **options):
    pictures = data.load(folder, split="all", channels=1)
    changes = [*tiny.overrides("iddpm"), *BOUND, *more]
    return training.train("iddpm", pictures, out=out, quiet=True, overrides=changes, **options)


def state(out):
    tensors, _ = checkpoint.read(out / "training" / "state.safetensors")
    return tensors


def test_times_drawn_by_importance_resume_exactly(tmp_path):
    folder = tiny.pictures(tmp_path / "pictures")
    fit(folder, tmp_path / "whole", steps=6)
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert told[0]["known"] < told[-1]["known"] == 1  # importance has begun
    assert 0 < told[-1]["visited"] < 1 and told[-1]["loss"] == told[-1]["bound"]
    fit(folder, tmp_path / "parts", steps=3)
    fit(folder, tmp_path / "parts", steps=6, resume=True)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert any("times.losses" in name for name in whole)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_importance_does_not_depend_on_how_a_batch_is_split(tmp_path):
    folder = tiny.pictures(tmp_path / "pictures")
    fit(folder, tmp_path / "whole", steps=5)
    fit(folder, tmp_path / "parts", "train.accumulate=4", steps=5)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    for name in whole:
        if "times" in name:
            torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_two_processes_keep_the_history_of_one(tmp_path):
    tiny.pictures(tmp_path / "pictures", count=40)
    changes = [*tiny.overrides("iddpm"), *BOUND, "train.precision=fp32"]
    more = [word for change in changes for word in ("--set", change.replace(" ", ""))]
    more += ["--data", str(tmp_path / "pictures"), "--steps", "6", "--device", "cpu"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += ["--master_addr=127.0.0.1", "--master_port=29631", "-m", "trilemma"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for out, launch in (("one", ["-m", "trilemma"]), ("two", torchrun)):
        run = [sys.executable, *launch, "train", "iddpm", "--out", str(tmp_path / out), *more]
        subprocess.run(run, check=True, env=environ, capture_output=True)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert torch.equal(one["model.times.told"], two["model.times.told"])
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)


class Blank(torch.nn.Module):
    """Expects grey pictures behind all noise, and a variance half way in between."""

    def forward(self, x, time, embedded):
        return torch.zeros(len(x), 2, *x.shape[2:])


def test_the_bound_as_a_loss_is_the_bound_that_is_told():
    """The mean over all steps of what training estimates is `log_prob`'s, but for L_T."""
    schedule, x0 = Linear(4, 0.1, 0.5), to_float(torch.arange(128).view(2, 1, 8, 8).byte())
    options = {"target": "image", "learn_variance": True, "loss": "bound"}
    model = Diffusion(Pixels((1, 8, 8)), Blank(), None, schedule, times=Uniform(4), **options)
    found = []
    for step in range(1, 5):
        model.times = lambda rng, schedule, t=step / 4: torch.full((len(rng),), t)
        found.append(model.loss(Batch(x0, Condition(2), 0, Rng(range(2))))["loss"])
    alpha, sigma = schedule(torch.ones(()))
    last = 0.5 * (alpha / sigma) ** 2 * x0.square().mean() / math.log(2)
    bits = -model.log_prob(x0).mean() / (math.log(2) * 64)
    assert (sum(found) / 4 + last).item() == pytest.approx(bits.item(), rel=1e-4)


def test_a_bound_without_steps_is_refused():
    with pytest.raises(ValueError, match="loss 'bound' are of steps"):
        Diffusion(Pixels((1, 8, 8)), torch.nn.Identity(), loss="bound")
