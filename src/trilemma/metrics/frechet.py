"""The Fréchet distance between two sets of features, taken as Gaussians.

Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter 2017, "GANs Trained by a Two Time-Scale Update
Rule Converge to a Local Nash Equilibrium", equation 6:

    d^2 = |mu_a - mu_b|^2 + Tr(Sigma_a + Sigma_b - 2 (Sigma_a Sigma_b)^(1/2))

On Inception features it is the FID. On an intermediate feature map it is the sFID (Nash, Menick,
Dieleman, Battaglia 2021, "Generating Images with Sparse Representations", section 4.1).

With any factors Sigma = A A^T the last trace is the sum of the singular values of A_a^T A_b. No
square root of a non-symmetric matrix is taken: with few samples, where the covariance is singular,
that is where a straightforward implementation loses its digits or turns complex.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FEW = 2000  # images on either side below which the distance is said to be rough


def rough(drawn: int, real: int) -> list[str]:
    """Return what is to be said of distances between so many images: nothing, or a warning."""
    if min(drawn, real) >= FEW:
        return []
    return [
        f"{drawn} drawn and {real} real images are few: distances come out too large and vary; "
        f"compare them only with scores at the same counts, better {FEW} or more"
    ]


@dataclass(frozen=True)
class Statistics:
    """What the Fréchet distance needs of a set of features, in float64.

    Attributes:
        mean: (D,).
        covariance: (D, D), the unbiased estimate.
    """

    mean: Tensor
    covariance: Tensor

    @cached_property
    def factor(self) -> Tensor:
        """A (D, R) with A A^T = covariance, R its numerical rank."""
        values, vectors = torch.linalg.eigh(self.covariance)
        floor = values[-1] * len(values) * torch.finfo(values.dtype).eps
        keep = values > floor
        return vectors[:, keep] * values[keep].sqrt()


def statistics(features: Tensor) -> Statistics:
    """Estimate the mean and covariance of features (N, D), N at least 2."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features are (N, D) with N at least 2, not {tuple(features.shape)}")
    x = features.double()
    mean = x.mean(0)
    x = x - mean
    return Statistics(mean, x.T @ x / (len(x) - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return the squared Fréchet distance d^2 of two Gaussians, the number quoted as FID."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} numbers are not alike")
    cross = a.factor.T @ b.factor  # (R_a, R_b)
    overlap = torch.linalg.svdvals(cross).sum()
    distance = (a.mean - b.mean).square().sum()
    distance += a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return distance.clamp(min=0).item()
