"""Noise schedules: how much of the picture and how much noise there is at time t.

    x_t = alpha(t) x_0 + sigma(t) noise,    t in [0, 1], clean at t = 0

A schedule is the pair (alpha, sigma). All that solvers and weights ask of it follows from the
log signal-to-noise ratio log(alpha^2 / sigma^2), which strictly falls in t.

Variance-preserving schedules (alpha^2 + sigma^2 = 1) are given as in Ho, Jain, Abbeel 2020,
"Denoising Diffusion Probabilistic Models", by T variances beta_1..beta_T: at t = k / T,

    alpha^2 = prod_{i <= k} (1 - beta_i)                                        (their eq. 4)

exactly, and between two steps log alpha^2 is linear in t: the continuous diffusion whose beta is
constant during each step (Song et al. 2021, "Score-Based Generative Modeling through SDEs",
appendix B). The straight schedule, alpha = 1 - t and sigma = t, is that of Liu, Gong, Liu 2023,
"Flow Straight and Fast", and Lipman et al. 2023, "Flow Matching for Generative Modeling".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Schedule(ABC):
    """A map from times to (alpha, sigma) whose signal-to-noise ratio strictly falls."""

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at times t in [0, 1], in the shape and type of t."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time at which the log signal-to-noise ratio is `log_snr`."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2); infinite where there is no noise."""
        alpha, sigma = self(t)
        return 2 * (alpha.log() - sigma.log())


class Straight(Schedule):
    """The straight line from picture to noise: alpha = 1 - t, sigma = t."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1 - t, t)."""
        return 1 - t, t

    def time(self, log_snr: Tensor) -> Tensor:
        """Return 1 / (1 + alpha / sigma)."""
        return torch.sigmoid(-log_snr / 2)


class Betas(Schedule):
    """The variance-preserving schedule of a table of step variances.

    Args:
        betas: (T,) variances, each in (0, 1).
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.double()
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be a non-empty row of numbers strictly between 0 and 1")
        self.steps = len(betas)
        zero = torch.zeros(1, dtype=torch.float64)
        self.log_alpha2 = torch.cat([zero, torch.log1p(-betas).cumsum(0)])  # (T + 1,)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Interpolate log alpha^2 between the steps around t."""
        table = self.log_alpha2.to(t.device)
        place = t.double() * self.steps
        below = place.floor().clamp(0, self.steps - 1).long()
        log_alpha2 = torch.lerp(table[below], table[below + 1], place - below)
        alpha = (log_alpha2 / 2).exp()
        sigma = (-torch.expm1(log_alpha2)).sqrt()
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def time(self, log_snr: Tensor) -> Tensor:
        """Invert the interpolation."""
        table = self.log_alpha2.to(log_snr.device)
        log_alpha2 = -torch.nn.functional.softplus(-log_snr.double())
        after = torch.searchsorted(-table, -log_alpha2).clamp(1, self.steps)
        step = table[after] - table[after - 1]
        place = after - 1 + (log_alpha2 - table[after - 1]) / step
        return (place / self.steps).clamp(0, 1).to(log_snr.dtype)


class Linear(Betas):
    """Betas even from `first` to `last`: Ho et al. 2020, section 4."""

    def __init__(self, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> None:
        super().__init__(torch.linspace(first, last, steps, dtype=torch.float64))


class Quadratic(Betas):
    """Square roots of the betas even from `first` to `last`: Ho et al. 2020, section 4.2."""

    def __init__(self, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> None:
        roots = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64)
        super().__init__(roots**2)


class Constant(Betas):
    """One beta for all steps: Ho et al. 2020, section 4.2.

    The default leaves as little signal at t = 1 as the linear schedule does.
    """

    def __init__(self, steps: int = 1000, beta: float = 0.01) -> None:
        super().__init__(torch.full((steps,), beta, dtype=torch.float64))


class Cosine(Betas):
    """alpha^2 = cos^2 of an angle even in t: Nichol & Dhariwal 2021, eq. 17.

    Args:
        steps: T.
        offset: s of the paper; keeps the first betas from vanishing.
        largest: betas are cut off there, so that some signal is left at t = 1.
    """

    def __init__(self, steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> None:
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha2 = ((t + offset) / (1 + offset) * math.pi / 2).cos() ** 2
        super().__init__((1 - alpha2[1:] / alpha2[:-1]).clamp(max=largest))
