"""Where a solver stands, and the frames in which it follows the flow.

With y = x / (alpha + k sigma) and v = sigma / (alpha + k sigma), y = (1 - k v) x_0 + v noise, so
the probability-flow equation is dy/dv = noise - k x_0, whatever the schedule. In the straight
frame, k = 1, v runs from at most 1 to 0; the unscaled one, k = 0, is that of Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models" (their alpha is 1), and does not
reach a level without any picture, alpha = 0.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from trilemma.diffusion.schedules import Schedule

STRAIGHT, UNSCALED = 1.0, 0.0


class Level(NamedTuple):
    """A time and its alpha and sigma, as Python numbers, which keep float64's precision."""

    t: float
    alpha: float
    sigma: float

    def noise(self, x: Tensor, x0: Tensor) -> Tensor:
        """Return the noise that x here holds if the picture is x0."""
        return combine((1 / self.sigma, x), (-self.alpha / self.sigma, x0))

    def scale(self, k: float) -> float:
        """Return alpha + k sigma."""
        return self.alpha + k * self.sigma


def combine(*terms: tuple[float, Tensor]) -> Tensor:
    """Return the sum of weights times tensors: one pass over memory for each, one new tensor."""
    (weight, first), *others = terms
    total = weight * first
    for weight, tensor in others:
        total.add_(tensor, alpha=weight)
    return total


def levels(schedule: Schedule, times: Tensor) -> list[Level]:
    """Return the level of each time (N,)."""
    times = times.double()
    alpha, sigma = schedule(times)
    each = zip(times.tolist(), alpha.tolist(), sigma.tolist(), strict=True)
    return [Level(*level) for level in each]


def steps(schedule: Schedule, times: Tensor) -> list[tuple[Level, Level]]:
    """Return the level before and after each step of times (N + 1,)."""
    path = levels(schedule, times)
    return list(zip(path, path[1:], strict=False))
