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

The three diffusions of Song et al. 2021, whose x_t given x_0 are their eq. 29:

    VE        alpha = 1                 sigma^2 = s^2 (growth^t - 1)
    VP        log alpha = -B(t) / 2     sigma^2 = 1 - alpha^2,      B(t) = integral of beta
    sub-VP    log alpha = -B(t) / 2     sigma   = 1 - alpha^2
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


class VarianceExploding(Schedule):
    """The picture stays and noise grows on it, in even steps of log sigma: the VE diffusion.

    A geometric sigma(t)^2 less sigma(0)^2, so that there is none at t = 0: Song et al. 2021,
    appendix C. Above `smallest`, t is linear in log sigma as c_noise is of Karras et al. 2022,
    "Elucidating the Design Space of Diffusion-Based Generative Models", table 1, whose range is
    0.002 to 80.

    Args:
        smallest: s; below it, steps are even in sigma^2 rather than in log sigma.
        largest: sigma at t = 1; as far as two pictures can be apart: Song & Ermon 2020, "Improved
            Techniques for Training Score-Based Generative Models", technique 1.
    """

    def __init__(self, smallest: float = 0.01, largest: float = 50.0) -> None:
        if not 0 < smallest < largest:
            raise ValueError(
                f"smallest is {smallest} and largest {largest}; expected 0 < smallest < largest"
            )
        self.smallest, self.growth = smallest, math.log1p((largest / smallest) ** 2)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1, sigma)."""
        sigma = self.smallest * torch.expm1(self.growth * t.double()).sqrt()
        return torch.ones_like(t), sigma.to(t.dtype)

    def time(self, log_snr: Tensor) -> Tensor:
        """Return log(1 + (sigma / smallest)^2), scaled to 1 at the largest."""
        log_ratio2 = -log_snr.double() - 2 * math.log(self.smallest)
        t = torch.nn.functional.softplus(log_ratio2) / self.growth
        return t.clamp(max=1).to(log_snr.dtype)


class VariancePreserving(Schedule):
    """beta(t) even from `first` to `last`, in continuous time: the VP diffusion.

    The limit of `Linear` at ever more steps: T times its betas are these.

    Args:
        first: beta(0).
        last: beta(1).
    """

    def __init__(self, first: float = 0.1, last: float = 20.0) -> None:
        if not 0 < first < last:
            raise ValueError(f"first is {first} and last {last}; expected 0 < first < last")
        self.first, self.slope = first, last - first

    def _log_alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        return -t * (self.first + self.slope * t / 2) / 2

    def _solve(self, log_alpha: Tensor) -> Tensor:
        """Return the time at which log alpha is this; 1 where it is less than at any time."""
        root = (self.first**2 - 4 * self.slope * log_alpha).sqrt()
        t = -4 * log_alpha / (self.first + root)
        return torch.where(log_alpha > -(2 * self.first + self.slope) / 4, t, 1.0)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return exp(-B / 2) and what makes their squares sum to 1."""
        log_alpha = self._log_alpha(t)
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()
        return log_alpha.exp().to(t.dtype), sigma.to(t.dtype)

    def time(self, log_snr: Tensor) -> Tensor:
        """Solve the quadratic B(t) = -log alpha^2."""
        log_alpha = -torch.nn.functional.softplus(-log_snr.double()) / 2
        return self._solve(log_alpha).to(log_snr.dtype)


class SubVP(VariancePreserving):
    """The alpha of the VP diffusion with less noise on the way: sigma = 1 - alpha^2."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return exp(-B / 2) and 1 - exp(-B)."""
        log_alpha = self._log_alpha(t)
        sigma = -torch.expm1(2 * log_alpha)
        return log_alpha.exp().to(t.dtype), sigma.to(t.dtype)

    def time(self, log_snr: Tensor) -> Tensor:
        """Solve sinh(-log alpha) = sigma / (2 alpha), then the quadratic."""
        half = (-log_snr.double() / 2).exp() / 2
        log_alpha = -torch.asinh(half)
        return self._solve(log_alpha).to(log_snr.dtype)


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


class Sigmoid(Betas):
    """alpha^2 falls as a sigmoid: Jabri, Fleet, Chen 2022, "Scalable Adaptive Computation".

    Args:
        steps: T.
        start: the sigmoid's argument at t = 0.
        end: and at t = 1.
        width: tau of the paper: divides the argument.
        largest: betas are cut off there, so that some signal is left at t = 1.
    """

    def __init__(
        self,
        steps: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        width: float = 1.0,
        largest: float = 0.999,
    ) -> None:
        argument = torch.linspace(start, end, steps + 1, dtype=torch.float64) / width
        curve = argument.sigmoid()
        alpha2 = (curve[-1] - curve) / (curve[-1] - curve[0])
        super().__init__((1 - alpha2[1:] / alpha2[:-1]).clamp(max=largest))


class ZeroTerminal(Schedule):
    """A schedule of betas moved so that no signal is left at t = 1.

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1:
    after the first step, alpha is shifted by its last value and stretched. A model then learns how
    bright pictures are on the whole, which else it reads off the leftover; and the noise says
    nothing at t = 1, so that the target must be another.

    Args:
        schedule: to be moved.
    """

    def __init__(self, schedule: Betas) -> None:
        self.schedule = schedule
        if schedule.steps < 2:
            raise ValueError("one beta cannot be rescaled; expected a schedule of 2 steps or more")
        first, self.last = ((schedule.log_alpha2[i] / 2).exp().item() for i in (1, schedule.steps))
        self.first, self.stretch = first, first / (first - self.last)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the schedule's own in the first step, and the moved ones after it."""
        alpha, sigma = self.schedule(t.double())
        moved = (alpha - self.last) * self.stretch
        moved_sigma = ((1 - moved) * (1 + moved)).clamp(min=0).sqrt()
        after = alpha < self.first
        alpha, sigma = torch.where(after, moved, alpha), torch.where(after, moved_sigma, sigma)
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def time(self, log_snr: Tensor) -> Tensor:
        """Move back, then ask the schedule."""
        alpha = (-torch.nn.functional.softplus(-log_snr.double()) / 2).exp()
        own = alpha / self.stretch + self.last
        own_log_snr = 2 * own.log() - torch.log((1 - own) * (1 + own))
        log_snr2 = torch.where(alpha < self.first, own_log_snr, log_snr.double())
        return self.schedule.time(log_snr2).to(log_snr.dtype)
