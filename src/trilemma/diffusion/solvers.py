"""Solvers: from noise to a picture by a sequence of times, given a denoiser.

Each is a generator `(denoise, x, times, schedule, rng, **own)`: `denoise(x, t)` gives the expected
x_0 (B, ...), `times` fall from times[0] to 0, and x after each step is yielded. With
x_t = alpha x_0 + sigma noise, every x_0 implies noise = (x_t - alpha x_0) / sigma.

- ddpm: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", eq. 6-7.
- ddim: Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models", eq. 12.
- euler, heun: of the probability-flow equation in the frame where every schedule is straight,
  y = x / (alpha + sigma), u = sigma / (alpha + sigma), so y = (1 - u) x_0 + u noise and
  dy/du = noise - x_0. Heun: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based
  Generative Models", algorithm 1 (there in the frame of alpha = 1).
- dpmpp_2m: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
  Probabilistic Models", algorithm 2.

A solver is no better than its times: each has its own default grid in `SOLVERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.batch import Rng
from trilemma.diffusion.guidance import Denoiser
from trilemma.diffusion.schedules import Schedule
from trilemma.diffusion.schedules import levels as _levels
from trilemma.diffusion.stochastic import langevin, predictor_corrector, reverse_sde

Grid = Callable[[Schedule, int], Tensor]
"""(schedule, steps) -> (steps + 1,) falling float64 times, from 1 to 0."""

NOISIEST, CLEANEST = 80.0, 0.002
"""sigma / alpha between which the grids in log-SNR and of Karras et al. lie (their table 1)."""


def even_time(schedule: Schedule, steps: int) -> Tensor:
    """Return times even in t."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


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


def ddim(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    schedule: Schedule,
    rng: Rng,
    *,
    eta: float = 0.0,
) -> Iterator[Tensor]:
    """Step to x_0 and back to the next noise level, with a share of the noise fresh.

    Args:
        denoise: the expected x_0.
        x: (B, ...) at times[0].
        times: (steps + 1,) falling to 0.
        schedule: of the model.
        rng: fresh noise.
        eta: 0 is deterministic, 1 renews as much noise as ddpm's small variance.
    """
    levels = _levels(schedule, times)
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in zip(levels, levels[1:], strict=False):
        x0 = denoise(x, t)
        noise = (x - alpha * x0) / sigma
        step_variance = sigma**2 - (alpha / alpha_next * sigma_next) ** 2
        fresh = eta * sigma_next / sigma * max(step_variance, 0.0) ** 0.5
        x = alpha_next * x0 + max(sigma_next**2 - fresh**2, 0.0) ** 0.5 * noise
        if fresh:
            x = x + fresh * rng.normal(*x.shape[1:])
        yield x


def ddpm(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    schedule: Schedule,
    rng: Rng,
    *,
    variance: str = "small",
    share: Callable[[], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Draw each next x from the posterior given x_0: ancestral sampling.

    Args:
        denoise: the expected x_0.
        x: (B, ...) at times[0].
        times: (steps + 1,) falling to 0.
        schedule: of the model.
        rng: fresh noise.
        variance: "small", the posterior's (beta tilde), "large", the forward step's (beta), or
            "learned", between them in log: Nichol & Dhariwal 2021, eq. 15.
        share: says, of the last call of `denoise`, the share (B, ...) of the large one.
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"variance '{variance}' is not known; expected small, large or learned")
    if variance == "learned" and share is None:
        raise ValueError("variance 'learned' needs a model that has learned it; use small or large")
    levels = _levels(schedule, times)
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in zip(levels, levels[1:], strict=False):
        x0 = denoise(x, t)
        shrink = alpha / alpha_next  # x_t = shrink x_next + noise of step_variance
        step_variance = sigma**2 - (shrink * sigma_next) ** 2
        x = (shrink * sigma_next**2 * x + alpha_next * step_variance * x0) / sigma**2
        if sigma_next:
            small = step_variance * (sigma_next / sigma) ** 2
            scale: float | Tensor = (step_variance if variance == "large" else small) ** 0.5
            if variance == "learned" and share is not None:
                scale = scale * (sigma_next / sigma) ** -share()[: len(x)]
            x = x + scale * rng.normal(*x.shape[1:])
        yield x


def euler(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng
) -> Iterator[Tensor]:
    """Follow the flow by its slope at the beginning of each step."""
    levels = _levels(schedule, times)
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in zip(levels, levels[1:], strict=False):
        x0 = denoise(x, t)
        slope = (x - alpha * x0) / sigma - x0
        share, share_next = sigma / (alpha + sigma), sigma_next / (alpha_next + sigma_next)
        y = x / (alpha + sigma) + (share_next - share) * slope
        x = y * (alpha_next + sigma_next)
        yield x


def heun(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng
) -> Iterator[Tensor]:
    """Follow the flow by the mean of its slopes at both ends of each step.

    Two network calls a step, one in the last (where the slope at the end is not defined).
    """
    levels = _levels(schedule, times)
    for (t, alpha, sigma), (t_next, alpha_next, sigma_next) in zip(
        levels, levels[1:], strict=False
    ):
        x0 = denoise(x, t)
        slope = (x - alpha * x0) / sigma - x0
        share, share_next = sigma / (alpha + sigma), sigma_next / (alpha_next + sigma_next)
        y, width = x / (alpha + sigma), share_next - share
        scale_next = alpha_next + sigma_next
        x = (y + width * slope) * scale_next
        if sigma_next:
            x0 = denoise(x, t_next)
            slope_next = (x - alpha_next * x0) / sigma_next - x0
            x = (y + width * (slope + slope_next) / 2) * scale_next
        yield x


def dpmpp_2m(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng
) -> Iterator[Tensor]:
    """Extrapolate x_0 in log-SNR from this step and the last, then step as ddim does."""
    levels = _levels(schedule, times)
    half_log_snr = (schedule.log_snr(times.double()) / 2).tolist()
    previous = None
    for i, (t, alpha, sigma) in enumerate(levels[:-1]):
        _, alpha_next, sigma_next = levels[i + 1]
        x0 = denoise(x, t)
        ahead = x0
        if previous is not None and sigma_next:  # the step to 0 is infinitely long in log-SNR
            h = half_log_snr[i + 1] - half_log_snr[i]
            h_last = half_log_snr[i] - half_log_snr[i - 1]
            ahead = x0 + h / (2 * h_last) * (x0 - previous)
        x = sigma_next / sigma * x + (alpha_next - sigma_next * alpha / sigma) * ahead
        previous = x0
        yield x


class Solver(NamedTuple):
    """A solver and what to know of it.

    Attributes:
        steps: the generator function.
        grid: its own times.
        calls: network calls of one step (the last step may save one).
    """

    steps: Callable[..., Iterator[Tensor]]
    grid: Grid
    calls: int = 1


SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(ddpm, even_time),
    "ddim": Solver(ddim, even_time),
    "euler": Solver(euler, even_share),
    "heun": Solver(heun, karras, calls=2),
    "dpmpp_2m": Solver(dpmpp_2m, even_log_snr),
    "langevin": Solver(langevin, even_log_snr, calls=5),
    "sde": Solver(reverse_sde, even_log_snr),
    "pc": Solver(predictor_corrector, even_log_snr, calls=2),
}
GRIDS: dict[str, Grid] = {
    "even_time": even_time,
    "even_share": even_share,
    "even_log_snr": even_log_snr,
    "karras": karras,
}
