"""Improved DDPM: the recipe's network, learned variances and the bound in bits per dimension."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from trilemma import data, training
from trilemma.batch import Condition, to_float
from trilemma.errors import UserError
from trilemma.model import HasCostlyLikelihood

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
