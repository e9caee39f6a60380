"""Likelihoods of pictures: densities integrate to 1, probabilities sum to 1, and tails hold."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal

from trilemma.batch import to_float
from trilemma.models.likelihoods import (
    LIKELIHOODS,
    bernoulli_log_prob,
    continuous_bernoulli_log_prob,
    discretized_logistic_log_prob,
    gaussian_log_prob,
)

SHAPE = (1, 8, 8)
LEVELS = to_float(torch.arange(256, dtype=torch.uint8)).view(256, 1, 1, 1)


def test_gaussian_and_bernoulli_are_torchs():
    torch.manual_seed(0)
    image, output = torch.rand(3, *SHAPE) * 2 - 1, torch.randn(3, *SHAPE)
    log_scale = torch.tensor(-0.7)
    expected = Normal(output, log_scale.exp()).log_prob(image).flatten(1).sum(1)
    assert torch.allclose(gaussian_log_prob(image, output, log_scale), expected, rtol=1e-5)
    binary = torch.where(image > 0, 1.0, -1.0)
    expected = Bernoulli(logits=output).log_prob((binary + 1) / 2).flatten(1).sum(1)
    assert torch.allclose(bernoulli_log_prob(binary, output), expected, rtol=1e-5)


@pytest.mark.parametrize("log_scale", [-7.0, -4.0, -1.0, 2.0])
@pytest.mark.parametrize("output", [-1.3, -1.0, 0.1234, 0.999, 30.0])
def test_discretized_logistic_sums_to_one_over_the_256_levels(output, log_scale):
    outputs = torch.full_like(LEVELS, output)
    log_prob = discretized_logistic_log_prob(LEVELS, outputs, torch.tensor(log_scale))
    assert log_prob.isfinite().all()
    assert log_prob.max() <= 1e-6
    assert log_prob.logsumexp(0).item() == pytest.approx(0, abs=1e-4)


def test_discretized_logistic_is_the_mass_of_each_level():
    """In float64, by the difference of the distribution function at the level's edges."""
    output, scale = 0.2, 0.3
    edges = ((torch.arange(1, 256).double() - 0.5) * 2 / 255 - 1 - output) / scale
    reached = torch.cat([torch.zeros(1), edges.sigmoid(), torch.ones(1)]).double()
    expected = reached.diff().log()
    outputs = torch.full_like(LEVELS, output)
    got = discretized_logistic_log_prob(LEVELS, outputs, torch.tensor(scale).log())
    assert torch.allclose(got.double(), expected, atol=1e-4)


def test_discretized_logistic_pulls_from_far_away():
    """Where the probability underflows, its log still has the slope 1 / scale."""
    output = torch.full((1, 1, 1, 1), 40.0, requires_grad=True)
    log_prob = discretized_logistic_log_prob(torch.zeros(1, 1, 1, 1), output, torch.tensor(-3.0))
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert output.grad.item() == pytest.approx(-math.exp(3), rel=1e-4)


@pytest.mark.parametrize("output", [-20.0, -1.0, 0.0, 1e-3, 0.02, 3.0, 20.0])
def test_continuous_bernoulli_is_a_density_on_the_scale_of_images(output):
    edges = torch.linspace(-1, 1, 20_001).double()
    image = ((edges[1:] + edges[:-1]) / 2).view(-1, 1, 1, 1)
    density = continuous_bernoulli_log_prob(image, torch.full_like(image, output)).exp()
    assert density.mean().item() * 2 == pytest.approx(1, abs=1e-4)


def test_gaussian_is_a_density_on_the_scale_of_images():
    image = torch.linspace(-3, 3, 20_001).double().view(-1, 1, 1, 1)
    output, log_scale = torch.full_like(image, 0.3), torch.tensor(-1.0).double()
    density = gaussian_log_prob(image, output, log_scale).exp()
    assert torch.trapezoid(density, image.flatten()).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_mean_images_are_in_range(name):
    mean = LIKELIHOODS[name].mean(torch.randn(100, *SHAPE) * 5)
    assert mean.abs().max() <= 1
