"""Bits per dimension: the scale, the noise, and where they are told."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from trilemma import sampling
from trilemma.batch import Rng, dequantise, to_float, to_uint8
from trilemma.data import Dataset
from trilemma.evaluation import describe, likelihood
from trilemma.metrics.likelihood import bits_per_dimension
from trilemma.model import HasLikelihood, Model

SHAPE = (1, 4, 4)


class Told(Model):
    """Tells the same log probability of each number of every picture."""

    discrete, bound = False, False

    def __init__(self, nats, discrete=False, bound=False):
        super().__init__()
        self.nats, self.discrete, self.bound = nats, discrete, bound
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def phases(self):
        return []

    def log_prob(self, image):
        self.seen.append(image)
        return torch.full((len(image),), self.nats * image[0].numel())


def images(count=5):
    return (torch.arange(count * 16) * 3 % 256).to(torch.uint8).view(count, *SHAPE)


def test_an_even_density_takes_eight_bits():
    assert torch.allclose(
        bits_per_dimension(Told(-math.log(2)), images()), torch.tensor(8.0).double()
    )
    even = Told(-math.log(256), discrete=True)
    assert torch.allclose(bits_per_dimension(even, images()), torch.tensor(8.0).double())


def test_discrete_models_see_the_picture_and_others_its_cells():
    discrete, dense = Told(-1.0, discrete=True), Told(-1.0)
    bits_per_dimension(discrete, images(), batch=2)
    assert torch.equal(torch.cat(discrete.seen), to_float(images()))
    bits_per_dimension(dense, images(), batch=2)
    seen = torch.cat(dense.seen)
    assert torch.equal(((seen + 1) * 128).floor().to(torch.uint8), images())
    assert seen.min() > -1 and seen.max() < 1
    bits_per_dimension(other := Told(-1.0), images(), batch=5)
    assert torch.equal(torch.cat(other.seen), seen), "noise depends on the batch"


def test_cells_fill_the_interval_and_come_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    low = dequantise(to_float(levels), torch.zeros(1, 1, 16, 16)).flatten()
    assert low[0] == -1 and torch.allclose(low.diff(), torch.tensor(1 / 128))
    noise = Rng([3]).uniform(1, 16, 16)
    spread = dequantise(to_float(levels), noise)
    assert torch.equal(to_uint8(spread * 256 / 255), levels)


def dataset(count=30):
    return Dataset("squares", "test", "f", images(count).numpy())


def trained(model):
    recipe = {"run": {"recipe": "told"}, "model": {}, "train": {}}
    return sampling.Trained(model.eval(), recipe, {"shape": SHAPE}, {"seen": 1})


def test_a_run_tells_its_bits_with_their_protocol():
    told = likelihood(trained(Told(-math.log(2), bound=True)), dataset())
    assert told["bits_per_dim"] == pytest.approx(8)
    assert told["bits_are"] == "an upper bound"
    assert told["bits_of"] == "30 pictures of squares, test"
    assert likelihood(trained(Told(-1.0)), dataset())["bits_are"] == "exact"
    result = {"scores": {}, "likelihood": told, "protocol": {}, "warnings": []}
    assert "bits per dim" in [*describe(result).columns[0].cells]


class ByClass(Told):
    """Likes class 0: there are two and it has the probability of each given picture."""

    shares = torch.tensor([0.75, 0.25])

    def log_prob(self, image, label=None):
        self.seen.append(image)
        given = self.shares.log()[:, None] if label is None else self.shares.log()[label][None]
        each = given - image[0].numel() * math.log(256) + torch.zeros(1, len(image))
        return each.logsumexp(0) - math.log(len(each))


def test_one_class_bounds_the_sum_over_classes():
    model = ByClass(0.0, discrete=True)
    run = trained(model)
    run.recipe["model"]["classes"], run.data["label_names"] = 2, ["a", "b"]
    data, label = dataset(), np.zeros(30, dtype=np.int64)
    exact = likelihood(run, data)
    assert exact["bits_are"] == "exact"
    assert exact["bits_per_dim"] == pytest.approx(8 + math.log2(2) / 16)  # 0.75 + 0.25 over 2
    labelled = replace(data, label=label, label_names=["a", "b"])
    bound = likelihood(run, labelled)
    assert bound["bits_per_dim"] == pytest.approx(8 + math.log2(2 / 0.75) / 16)
    assert bound["bits_are"] == f"at most {1 / 16:.2g} too high"
    assert 0 <= bound["bits_per_dim"] - exact["bits_per_dim"] <= 1 / 16
    assert likelihood(run, replace(labelled, label_names=["b", "a"])) == exact, "others' classes"


def test_models_without_likelihood_tell_none():
    class Silent(Model):
        def phases(self):
            return []

    assert not isinstance(Silent(), HasLikelihood)
    assert likelihood(trained(Silent()), dataset()) is None
