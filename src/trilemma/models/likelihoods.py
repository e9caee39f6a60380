"""What a decoder's output says of a picture: log p(x | z), summed over pixels and channels.

x lies in [-1, 1], y is the decoder's output, s one scale for all pixels, learned with the rest.

    likelihood            log p(x | z)
    gaussian              log N(x; y, s^2). At its best s^2 is the mean squared error, and no weight
                          between fit and KL is left to choose (Rybkin, Daniilidis, Levine 2021,
                          "Simple and Effective VAE Training with Calibrated Decoders", section 3).
    bernoulli             u y - softplus(y), u = (x + 1) / 2 in [0, 1]: for pictures that are nearly
                          black and white. For levels between it is no density; times
                          h / tanh h, h = y / 2, it is one on [-1, 1] (Loaiza-Ganem, Cunningham
                          2019, "The continuous Bernoulli: fixing a pervasive error in variational
                          autoencoders"). Training leaves that factor out, `log_prob` counts it.
    discretized-logistic  log P(k), k one of 256 levels: with F(u) = 1 / (1 + e^-u),
                          P(k) = F((x + 1/255 - y) / s) - F((x - 1/255 - y) / s), where the lowest
                          level reaches down to -infinity and the highest up to +infinity
                          (Kingma et al. 2016, "Improved Variational Inference with Inverse
                          Autoregressive Flow"; Salimans et al. 2017, "PixelCNN++", equation 2).

The first two are densities of x on the scale of [-1, 1], where a level is 2/255 wide; the third is
a probability of the 8-bit picture, at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_LEVEL = 1 / 255
"""Half the distance of neighbouring grey levels on [-1, 1]."""


def gaussian_log_prob(image: Tensor, output: Tensor, log_scale: Tensor) -> Tensor:
    """Log N(image; output, scale^2), from (B, C, H, W) to (B,) nats."""
    scaled = (image - output) * (-log_scale).exp()
    return -(0.5 * scaled.square() + log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def bernoulli_log_prob(image: Tensor, output: Tensor) -> Tensor:
    """Log likelihood (B,) of images in [-1, 1], taken as grey levels in [0, 1], under logits."""
    level = (image + 1) / 2
    return (level * output - F.softplus(output)).flatten(1).sum(1)


def continuous_bernoulli_log_prob(image: Tensor, output: Tensor) -> Tensor:
    """Log density (B,) on [-1, 1] of the continuous Bernoulli distribution with these logits."""
    half = output.abs().clamp(min=1e-2) / 2  # below, h / tanh h is 1 to four digits
    return bernoulli_log_prob(image, output) + (half / half.tanh()).log().flatten(1).sum(1)


def discretized_logistic(image: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of 8-bit levels, given in [-1, 1], under logistics; one for each number.

    F(b) - F(a) = F(b) F(-a) (1 - e^(a - b)), of which no factor cancels, however far the tails.
    """
    inverse = (-log_scale).exp()
    below = F.logsigmoid((image + HALF_LEVEL - mean) * inverse)  # log F(b)
    above = F.logsigmoid((mean - image + HALF_LEVEL) * inverse)  # log F(-a)
    between = (-torch.expm1(-2 * HALF_LEVEL * inverse)).log()
    lowest, highest = image < HALF_LEVEL - 1, image > 1 - HALF_LEVEL
    inside = torch.where(highest, above, below + above + between)
    return torch.where(lowest, below, inside)


def discretized_logistic_log_prob(image: Tensor, output: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability (B,) of 8-bit images, given in [-1, 1], under a logistic around `output`."""
    return discretized_logistic(image, output, log_scale).flatten(1).sum(1)


@dataclass(frozen=True)
class Likelihood:
    """One row of the table above; functions of image, output (B, C, H, W) and log scale to (B,).

    Attributes:
        fit: what training maximises, in nats.
        log_prob: the log density on [-1, 1], or, if `discrete`, the log probability.
        mean: the image in [-1, 1] that an output stands for.
        start: where its log scale begins to learn; None without a scale.
        discrete: it tells the probability of the 8-bit picture.
    """

    fit: Callable[[Tensor, Tensor, Tensor], Tensor]
    log_prob: Callable[[Tensor, Tensor, Tensor], Tensor]
    mean: Callable[[Tensor], Tensor]
    start: float | None
    discrete: bool


LIKELIHOODS = {
    "gaussian": Likelihood(
        fit=gaussian_log_prob,
        log_prob=gaussian_log_prob,
        mean=lambda output: output.clamp(-1, 1),
        start=-1.0,
        discrete=False,
    ),
    "bernoulli": Likelihood(
        fit=lambda image, output, _: bernoulli_log_prob(image, output),
        log_prob=lambda image, output, _: continuous_bernoulli_log_prob(image, output),
        mean=lambda output: (output / 2).tanh(),
        start=None,
        discrete=False,
    ),
    "discretized-logistic": Likelihood(
        fit=discretized_logistic_log_prob,
        log_prob=discretized_logistic_log_prob,
        mean=lambda output: output.clamp(-1, 1),
        start=-2.0,
        discrete=True,
    ),
}
