"""Grids: the times that a solver visits, from noise to picture.

A grid is a function `(schedule, steps) -> (steps + 1,)` falling float64 times, from 1 to 0. Most
are even in some function of sigma / alpha, so that they suit every schedule alike; the last step,
to sigma = 0, is then the step to x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trilemma.diffusion.schedules import Betas, Schedule

Grid = Callable[[Schedule, int], Tensor]
"""(schedule, steps) -> (steps + 1,) falling float64 times, from 1 to 0."""

NOISIEST, CLEANEST = 80.0, 0.002
"""sigma / alpha between which the grids in log-SNR and of Karras et al. lie (their table 1)."""


def even_time(schedule: Schedule, steps: int) -> Tensor:
    """Return times even in t."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def trailing(schedule: Schedule, steps: int) -> Tensor:
    """Return times even in t, at whole steps of a table of betas.

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2: for
    models trained at whole steps only. Theirs called leading, which begins after t = 1 where the
    picture is no longer all noise, is the flaw that they tell of.

    Raises:
        ValueError: more steps than the table has.
    """
    times = even_time(schedule, steps)
    if not isinstance(schedule, Betas):
        return times
    if steps > schedule.steps:
        raise ValueError(
            f"steps is {steps}, and the grid trailing has the schedule's {schedule.steps} at most; "
            "take fewer, or the grid even_time"
        )
    return (times * schedule.steps).round() / schedule.steps


def even_share(schedule: Schedule, steps: int) -> Tensor:
    """Return times even in u = sigma / (alpha + sigma)."""
    ratio = _noisiest(schedule, math.inf)
    share = torch.linspace(1 / (1 + 1 / ratio), 0, steps + 1, dtype=torch.float64)[1:-1]
    return _at(schedule, share / (1 - share))


def even_log_snr(schedule: Schedule, steps: int) -> Tensor:
    """Return times even in log(sigma / alpha), then 0."""
    first, last = math.log(_noisiest(schedule, NOISIEST)), math.log(CLEANEST)
    return _at(schedule, torch.linspace(first, last, steps, dtype=torch.float64)[1:].exp())


def karras(schedule: Schedule, steps: int) -> Tensor:
    """Return times even in (sigma / alpha)^(1/7), then 0: Karras et al. 2022, eq. 5."""
    first, last = _noisiest(schedule, NOISIEST) ** (1 / 7), CLEANEST ** (1 / 7)
    return _at(schedule, torch.linspace(first, last, steps, dtype=torch.float64)[1:] ** 7)


def _noisiest(schedule: Schedule, limit: float) -> float:
    """Return sigma / alpha at t = 1, or `limit` where that is less."""
    alpha, sigma = (float(v) for v in schedule(torch.ones((), dtype=torch.float64)))
    return min(sigma / alpha if alpha else math.inf, limit)


def _at(schedule: Schedule, ratio: Tensor) -> Tensor:
    """Return 1, the times of the given sigma / alpha, 0."""
    return torch.cat([ratio.new_ones(1), schedule.time(-2 * ratio.log()), ratio.new_zeros(1)])


def given(times: Sequence[float], steps: int) -> Tensor:
    """Return a grid told time by time.

    Raises:
        ValueError: times that do not fall from at most 1 to 0, or not in so many steps.
    """
    grid = torch.tensor(times, dtype=torch.float64)
    falls = grid.ndim == 1 and len(grid) > 1 and bool((grid.diff() < 0).all())
    if not (falls and grid[0] <= 1 and grid[-1] == 0):
        raise ValueError(f"grid is {times}; expected times that fall from 1 to 0")
    if len(grid) != steps + 1:
        raise ValueError(
            f"the grid has {len(grid) - 1} steps, and steps is {steps}; expected the same number"
        )
    return grid


GRIDS: dict[str, Grid] = {
    "even_time": even_time,
    "trailing": trailing,
    "even_share": even_share,
    "even_log_snr": even_log_snr,
    "karras": karras,
}


def times_of(grid: str | Sequence[float], schedule: Schedule, steps: int) -> Tensor:
    """Return the times (steps + 1,) of a grid that is named, or told time by time.

    Raises:
        ValueError: an unknown name; as `given`.
    """
    if not isinstance(grid, str):
        return given(grid, steps)
    if grid not in GRIDS:
        raise ValueError(f"grid '{grid}' is not known; expected one of {', '.join(GRIDS)}")
    return GRIDS[grid](schedule, steps)
