"""Which times the training visits.

Uniform over steps: Ho, Jain, Abbeel 2020, algorithm 1. Logit-normal: Esser et al. 2024, "Scaling
Rectified Flow Transformers for High-Resolution Image Synthesis", eq. 19; on the straight schedule
it makes log(sigma / alpha) normal. Log-normal: the same on every schedule, Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models", section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.batch import Rng
from trilemma.diffusion.schedules import Schedule


class Uniform:
    """Times even in (0, 1), or over 1/T, 2/T, ..., 1.

    Args:
        steps: T; None for continuous times.
    """

    def __init__(self, steps: int | None = None) -> None:
        self.steps = steps

    def __call__(self, rng: Rng, schedule: Schedule) -> Tensor:
        """Draw (B,) times."""
        u = rng.uniform()
        return u if self.steps is None else (u * self.steps).ceil() / self.steps


class LogitNormal:
    """Times whose logit is normal: the middle of the way is visited most.

    Args:
        mean: of the logit; above 0 favours noisy times.
        std: of the logit.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean, self.std = mean, std

    def __call__(self, rng: Rng, schedule: Schedule) -> Tensor:
        """Draw (B,) times."""
        return torch.sigmoid(self.mean + self.std * rng.normal())


class LogNormal:
    """Times at which log(sigma / alpha) is normal, whatever the schedule.

    Args:
        mean: of log(sigma / alpha); the default is that of Karras et al.
        std: of log(sigma / alpha).
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        self.mean, self.std = mean, std

    def __call__(self, rng: Rng, schedule: Schedule) -> Tensor:
        """Draw (B,) times."""
        return schedule.time(-2 * (self.mean + self.std * rng.normal()))
