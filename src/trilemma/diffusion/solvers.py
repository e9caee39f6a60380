"""Solvers: from noise to a picture by a sequence of times, given a denoiser.

Each is a generator `(denoise, x, times, schedule, rng, **own)`: `denoise(x, t)` gives the expected
x_0 (B, ...), `times` fall from times[0] to 0, and x after each step is yielded. With
x_t = alpha x_0 + sigma noise, every x_0 implies noise = (x_t - alpha x_0) / sigma. A solver's own
options are its keyword-only arguments.

Here are those that look at one step alone; `multistep` has those that remember.

- ddpm: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", eq. 6-7.
- ddim: Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models", eq. 12.
- euler_ancestral: Euler's step to less noise than the next level has, the rest fresh: Crowson 2022,
  "k-diffusion"; the transition of ddim with eta 1.
- euler, heun: of the probability-flow equation in a frame of `levels`. Heun: Karras et al. 2022,
  "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 1, with s_churn
  algorithm 2 (both there in the unscaled frame).

- consistency: Song, Dhariwal, Chen, Sutskever 2023, "Consistency Models", algorithm 1.

A solver is no better than its times: each has its own default grid in `SOLVERS`.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trilemma.batch import Rng
from trilemma.diffusion.grids import Grid, even_log_snr, even_share, even_time, karras
from trilemma.diffusion.guidance import Denoiser
from trilemma.diffusion.levels import STRAIGHT, UNSCALED, Level, combine, levels, steps
from trilemma.diffusion.multistep import (
    adams_bashforth,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    ipndm,
    lms,
    pndm,
    unipc,
)
from trilemma.diffusion.schedules import Schedule
from trilemma.diffusion.stochastic import langevin, predictor_corrector, reverse_sde

FRAMES = {"straight": STRAIGHT, "unscaled": UNSCALED}


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
    path = steps(schedule, times)
    noise = rng.normals(len(path) - 1, *x.shape[1:]) if eta else iter(())
    for level, after in path:
        x0 = denoise(x, level.t)
        step_variance = level.sigma**2 - (level.alpha / after.alpha * after.sigma) ** 2
        fresh = eta * after.sigma / level.sigma * max(step_variance, 0.0) ** 0.5
        kept = max(after.sigma**2 - fresh**2, 0.0) ** 0.5 / level.sigma
        terms = [(kept, x), (after.alpha - kept * level.alpha, x0)]
        x = combine(*terms, (fresh, next(noise))) if fresh else combine(*terms)
        yield x


def euler_ancestral(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    schedule: Schedule,
    rng: Rng,
    *,
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """Step by Euler beyond the next noise level, and back to it with fresh noise.

    In the unscaled frame, where s = sigma / alpha, the fresh noise has the deviation
    up = eta s_next sqrt(1 - (s_next / s)^2) and the step goes to sqrt(s_next^2 - up^2). An Euler
    step there goes to x_0 + s noise: that is ddim, on times of its own.
    """
    return ddim(denoise, x, times, schedule, rng, eta=eta)


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
    path = steps(schedule, times)
    noise = rng.normals(sum(after.sigma > 0 for _, after in path), *x.shape[1:])
    for level, after in path:
        x0 = denoise(x, level.t)
        ratio = after.sigma / level.sigma
        shrink = level.alpha / after.alpha  # x_t = shrink x_next + noise of step_variance
        step_variance = level.sigma**2 - (shrink * after.sigma) ** 2
        x = combine((shrink * ratio**2, x), (after.alpha * step_variance / level.sigma**2, x0))
        if after.sigma:
            scale = step_variance**0.5 * (1.0 if variance == "large" else ratio)
            fresh = next(noise)
            if variance == "learned" and share is not None:
                fresh = fresh * ratio ** -share()[: len(x)]
            x.add_(fresh, alpha=scale)
        yield x


def euler(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng
) -> Iterator[Tensor]:
    """Follow the flow by its slope at the beginning of each step.

    In a frame of `levels` the slope noise - k x_0 takes y = (1 - k v) x_0 + v noise to the next v
    with the same x_0 and noise: that is ddim, on times of its own.
    """
    return ddim(denoise, x, times, schedule, rng)


def consistency(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng
) -> Iterator[Tensor]:
    """Step to x_0 and put all noise of the next level on it anew.

    For consistency models, whose x_0 is a picture and not the mean of those that may lie behind;
    of any other model the pictures would be smooth.
    """
    path = steps(schedule, times)
    noise = rng.normals(len(path) - 1, *x.shape[1:])
    for level, after in path:
        x0 = denoise(x, level.t)
        x = combine((after.alpha, x0), (after.sigma, next(noise))) if after.sigma else x0
        yield x


def heun(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    schedule: Schedule,
    rng: Rng,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    frame: str = "straight",
) -> Iterator[Tensor]:
    """Follow the flow by the mean of its slopes at both ends of each step.

    Two network calls a step, one in the last (where the slope at the end is not defined).

    Args:
        denoise: the expected x_0.
        x: (B, ...) at times[0].
        times: (steps + 1,) falling to 0.
        schedule: of the model.
        rng: fresh noise.
        s_churn: over all steps, how much noise is added before stepping; 0 is deterministic.
        s_min: sigma / alpha below which none is added.
        s_max: above which none is added.
        s_noise: deviation of the noise added.
        frame: straight, or unscaled as in the paper.
    """
    if frame not in FRAMES:
        raise ValueError(f"frame '{frame}' is not known; expected one of {', '.join(FRAMES)}")
    k = FRAMES[frame]
    more = min(s_churn / (len(times) - 1), 2**0.5 - 1)  # gamma of the paper
    path = steps(schedule, times)
    fresh = rng.normals(len(path), *x.shape[1:]) if more else iter(())
    for level, after in path:
        if more and level.alpha and s_min <= level.sigma / level.alpha <= s_max:
            noisier = _noisier(schedule, level, 1 + more)
            added = (noisier.sigma / noisier.alpha) ** 2 - (level.sigma / level.alpha) ** 2
            scale = noisier.alpha * s_noise * max(added, 0.0) ** 0.5
            x = combine((noisier.alpha / level.alpha, x), (scale, next(fresh)))
            level = noisier
        x0 = denoise(x, level.t)
        kept = after.sigma / level.sigma
        reached = combine((kept, x), (after.alpha - kept * level.alpha, x0))  # by the first slope
        scale, scale_after = level.scale(k), after.scale(k)
        if scale and after.sigma:  # at all noise, the unscaled frame begins after this step
            # With v' - v = width, y' = y + width / 2 (x - scale x_0) / sigma + the same at the end.
            half = (after.sigma - level.sigma * scale_after / scale) / 2  # scale_after width / 2
            x = combine(
                (scale_after / scale + half / level.sigma, x),
                (-half * scale / level.sigma, x0),
                (half / after.sigma, reached),
                (-half * scale_after / after.sigma, denoise(reached, after.t)),
            )
        else:
            x = reached
        yield x


def _noisier(schedule: Schedule, level: Level, factor: float) -> Level:
    """Return the level where sigma / alpha is `factor` times as high, or t = 1 before that."""
    log_snr = 2 * math.log(level.alpha / level.sigma / factor)
    return levels(schedule, schedule.time(torch.tensor([log_snr], dtype=torch.float64)))[0]


class Solver(NamedTuple):
    """A solver and what to know of it.

    Attributes:
        steps: the generator function.
        grid: its own times.
        calls: network calls of one step.
        extra: calls of all steps beside those: heun's last step saves one.
        stochastic: it draws fresh noise whatever its options.
    """

    steps: Callable[..., Iterator[Tensor]]
    grid: Grid
    calls: int = 1
    extra: int = 0
    stochastic: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Its own options and their defaults; what only a model can give has none."""
        parameters = inspect.signature(self.steps).parameters.values()
        own = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
        return {name: default for name, default in own.items() if default is not None}


def check(name: str, own: Mapping[str, Any]) -> Solver:
    """Return a solver by name, to be called with options of its own.

    Raises:
        ValueError: there is no such solver, it has no such option, or not of this type.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver '{name}' is not known; expected one of {', '.join(SOLVERS)}")
    options = SOLVERS[name].options
    for key, value in own.items():
        if key not in options:
            listed = ", ".join(options) or "none"
            raise ValueError(f"solver {name} has no option '{key}'; it has {listed}")
        expected = type(options[key])
        fits = isinstance(value, (int, float) if expected is float else expected)
        if not fits or not (expected is str or value >= 0):
            raise ValueError(
                f"solver {name}'s option '{key}' is {value!r}; expected "
                f"{'' if expected is str else '0 or more, '}such as {options[key]!r}"
            )
    return SOLVERS[name]


def last(states: Iterator[Tensor]) -> Tensor:
    """Go all the way and return where it ends."""
    return deque(states, maxlen=1).pop()


SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(ddpm, even_time, stochastic=True),
    "ddim": Solver(ddim, even_time),
    "euler": Solver(euler, even_share),
    "euler_ancestral": Solver(euler_ancestral, karras, stochastic=True),
    "consistency": Solver(consistency, even_share, stochastic=True),
    "heun": Solver(heun, karras, calls=2, extra=-1),
    "pndm": Solver(pndm, even_time, extra=9),
    "ipndm": Solver(ipndm, even_time),
    "adams_bashforth": Solver(adams_bashforth, even_share),
    "lms": Solver(lms, karras),
    "dpmpp_2m": Solver(dpmpp_2m, even_log_snr),
    "dpmpp_3m": Solver(dpmpp_3m, even_share),
    "dpmpp_2m_sde": Solver(dpmpp_2m_sde, even_log_snr, stochastic=True),
    "unipc": Solver(unipc, even_log_snr),
    "langevin": Solver(langevin, even_log_snr, calls=5, stochastic=True),
    "sde": Solver(reverse_sde, even_log_snr, stochastic=True),
    "pc": Solver(predictor_corrector, even_log_snr, calls=2, extra=-1, stochastic=True),
}
