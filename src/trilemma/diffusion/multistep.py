"""Solvers that remember: a step extrapolates from what the denoiser said at the steps before.

Generators as in `solvers`; one network call a step, but for pndm's first three. Most integrate the
polynomial through the remembered values exactly, and differ in which values, over which variable,
against which weight:

| solver | values | variable | weight |
|---|---|---|---|
| adams_bashforth | noise - x_0 | v = sigma / (alpha + sigma) | 1 |
| lms | noise | v = sigma / alpha | 1 |
| dpmpp_3m, unipc | x_0 | l = log(alpha / sigma) | exp(l) |

The last is x = (sigma_next / sigma) x + sigma_next int exp(l) x_0(l) dl, the probability-flow
equation with its linear part solved: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling
of Diffusion Probabilistic Models", proposition 4.1. Its step to sigma = 0 is infinitely long in l:
x_0 is then the last one told.

A multistep method begins at order 1 and takes one more with each step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from trilemma.batch import Rng
from trilemma.diffusion.guidance import Denoiser
from trilemma.diffusion.levels import STRAIGHT, UNSCALED, Level, combine, levels, steps
from trilemma.diffusion.schedules import Schedule

POINTS, SHARES = np.polynomial.legendre.leggauss(32)  # exact for the polynomials, and to 1e-13 for
# the exponentials of steps up to 20 in log(alpha / sigma)

PURE = 1000.0  # sigma / alpha above which x holds too little picture to take a given noise from it

EVEN = {  # Adams-Bashforth on even steps, newest value first
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _integrals(
    nodes: Sequence[float],
    low: float,
    high: float,
    weight: Callable[[np.ndarray], np.ndarray] = np.ones_like,
) -> list[float]:
    """Return how much the value at each node counts in an integral of the polynomial through all.

    The integral is over [low, high], of the polynomial times `weight`.
    """
    at = (low + high) / 2 + (high - low) / 2 * POINTS
    weights = (high - low) / 2 * SHARES * weight(at)
    found = []
    for i, node in enumerate(nodes):
        basis = np.ones_like(at)
        for other in (*nodes[:i], *nodes[i + 1 :]):
            basis = basis * (at - other) / (node - other)
        found.append(float((weights * basis).sum()))
    return found


def _known(name: str, order: int, highest: int) -> int:
    if order not in range(1, highest + 1):
        raise ValueError(f"{name}'s order is {order}; expected 1 to {highest}")
    return order


def _adams(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, k: float, order: int
) -> Iterator[Tensor]:
    """Adams-Bashforth with steps of any size, in a frame of `levels`."""
    nodes: deque[float] = deque(maxlen=order)  # newest first
    slopes: deque[Tensor] = deque(maxlen=order)
    for level, after in steps(schedule, times):
        x0 = denoise(x, level.t)
        scale, scale_after = level.scale(k), after.scale(k)
        if not scale:  # all noise: the frame begins after this step, which goes by noise and x_0
            x = _onward(x, x0, level, after)
            yield x
            continue
        nodes.appendleft(level.sigma / scale)
        slopes.appendleft(combine((1 / level.sigma, x), (-scale / level.sigma, x0)))
        weights = _integrals(list(nodes), nodes[0], after.sigma / scale_after)
        moves = [(scale_after * w, slope) for w, slope in zip(weights, slopes, strict=True)]
        x = combine((scale_after / scale, x), *moves)
        yield x


def adams_bashforth(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng, *, order: int = 4
) -> Iterator[Tensor]:
    """Follow the flow by the polynomial through its last slopes in the straight frame.

    Hairer, Norsett, Wanner 1993, "Solving Ordinary Differential Equations I", section III.5.

    Args:
        denoise: the expected x_0.
        x: (B, ...) at times[0].
        times: (steps + 1,) falling to 0.
        schedule: of the model.
        rng: not used.
        order: slopes remembered, 1 (which is euler) to 4.
    """
    order = _known("adams_bashforth", order, 4)
    return _adams(denoise, x, times, schedule, STRAIGHT, order)


def lms(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng, *, order: int = 4
) -> Iterator[Tensor]:
    """Follow the flow by the polynomial through the last noises over sigma / alpha.

    Crowson 2022, "k-diffusion" (`sample_lms`); arguments as `adams_bashforth`.
    """
    return _adams(denoise, x, times, schedule, UNSCALED, _known("lms", order, 4))


def _onward(x: Tensor, x0: Tensor, level: Level, after: Level) -> Tensor:
    """Go from one level to another with the noise that x holds if the picture is x0, as ddim."""
    kept = after.sigma / level.sigma
    return combine((kept, x), (after.alpha - kept * level.alpha, x0))


def _transfer(
    x: Tensor, noises: Iterable[tuple[float, Tensor]], level: Level, after: Level
) -> Tensor:
    """Go from one level to another with a weighted sum of noises as the noise that x holds.

    The "transfer part" of Liu et al. 2022.
    """
    kept = after.alpha / level.alpha
    gain = after.sigma - kept * level.sigma
    return combine((kept, x), *((gain * weight, noise) for weight, noise in noises))


def _pseudo(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, warm: int
) -> Iterator[Tensor]:
    """Average noises as Adams-Bashforth does on even steps, then step as ddim does.

    The first `warm` steps average over the step itself, as the classical Runge-Kutta method does.
    """
    noises: deque[Tensor] = deque(maxlen=4)  # newest first
    halves = levels(schedule, (times[1:] + times[:-1]) / 2)
    for (level, after), half in zip(steps(schedule, times), halves, strict=True):
        x0 = denoise(x, level.t)
        if level.sigma > PURE * level.alpha:
            x = _onward(x, x0, level, after)
            yield x
            continue
        noise = level.noise(x, x0)
        noises.appendleft(noise)
        average = list(zip(EVEN[len(noises)], noises, strict=True))
        if len(noises) <= warm and after.sigma:
            x2 = _transfer(x, [(1.0, noise)], level, half)
            noise2 = half.noise(x2, denoise(x2, half.t))
            x3 = _transfer(x, [(1.0, noise2)], level, half)
            noise3 = half.noise(x3, denoise(x3, half.t))
            x4 = _transfer(x, [(1.0, noise3)], level, after)
            noise4 = after.noise(x4, denoise(x4, after.t))
            average = [(1 / 6, noise), (1 / 3, noise2), (1 / 3, noise3), (1 / 6, noise4)]
        x = _transfer(x, average, level, after)
        yield x


def pndm(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng
) -> Iterator[Tensor]:
    """Step as ddim does with an average of noises: three steps of four calls, then of one.

    Liu, Ren, Lin, Zhao 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", F-PNDM:
    of order 2 for all its four noises, as they show, and meant for times even in t. Where
    next to no picture is left at t = 1, the first step is ddim's.
    """
    return _pseudo(denoise, x, times, schedule, warm=3)


def ipndm(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng
) -> Iterator[Tensor]:
    """As pndm, beginning with averages of one, two and three noises: one call a step.

    Zhang & Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator", iPNDM.
    """
    return _pseudo(denoise, x, times, schedule, warm=0)


def _half_log_snr(level: Level) -> float:
    """Return log(alpha / sigma), infinite at the ends."""
    if not level.sigma:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha else -math.inf


def dpmpp_2m(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng
) -> Iterator[Tensor]:
    """Extrapolate x_0 in log-SNR from this step and the last, then step as ddim does.

    Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """
    return dpmpp_2m_sde(denoise, x, times, schedule, rng, eta=0.0)


def dpmpp_2m_sde(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng, *, eta: float = 1.0
) -> Iterator[Tensor]:
    """As dpmpp_2m, of the reverse diffusion instead of the flow: noise is renewed on the way.

    Lu et al. 2022, "DPM-Solver++", SDE-DPM-Solver++(2M).

    Args:
        denoise: the expected x_0.
        x: (B, ...) at times[0].
        times: (steps + 1,) falling to 0.
        schedule: of the model.
        rng: fresh noise.
        eta: how fast the noise is renewed; 1 is the reverse diffusion, 0 is dpmpp_2m.
    """
    previous, last = None, -math.inf
    path = steps(schedule, times)
    noise = rng.normals(len(path) - 1, *x.shape[1:]) if eta else iter(())
    for level, after in path:
        x0 = denoise(x, level.t)
        now, then = _half_log_snr(level), _half_log_snr(after)
        shrink = math.exp(-eta * (then - now)) if eta else 1.0  # 0 where the step is infinite
        kept = after.sigma / level.sigma * shrink
        gain = after.alpha - kept * level.alpha
        terms = [(kept, x), (gain, x0)]
        if previous is not None and after.sigma and last > -math.inf:
            beyond = gain * (then - now) / (2 * (now - last))  # by x_0 less the one before
            terms[1:] = [(gain + beyond, x0), (-beyond, previous)]
        if eta and after.sigma:
            terms.append((after.sigma * (1 - shrink**2) ** 0.5, next(noise)))
        x = combine(*terms)
        previous, last = x0, now
        yield x


def _weights(nodes: Sequence[float], low: float, high: float) -> list[float]:
    """Return the integrals of `_integrals` against exp(l - high), l = log(alpha / sigma)."""
    if len(nodes) == 1:
        return [-math.expm1(low - high)]  # 1 where either end is infinite
    return _integrals(nodes, low, high, lambda at: np.exp(at - high))


def _data(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    schedule: Schedule,
    order: int,
    *,
    correct: bool,
    variant: str = "bh2",
) -> Iterator[Tensor]:
    """Integrate the polynomial through the last x_0 in log-SNR, and again with the next if told to.

    At each level the state is first corrected by what the denoiser says there, then goes on from
    the corrected one. Over two values B(h) / 2 stands for the exact weight of their difference: h
    in the variant bh1, 1 - exp(-h) in bh2.
    """
    nodes: deque[float] = deque(maxlen=order)  # newest first
    values: deque[Tensor] = deque(maxlen=order)
    path = steps(schedule, times)
    before, start, used = path[0][0], x, 1
    for i, (level, after) in enumerate(path):
        x0 = denoise(x, level.t)
        now, then = _half_log_snr(level), _half_log_snr(after)
        if correct and nodes:
            told = [now, *list(nodes)[:used]]
            weights = _weights(told, nodes[0], now)
            if used == 1:
                half = _half(now - nodes[0], variant)
                weights = [half, -math.expm1(nodes[0] - now) - half]
            x = combine(
                (level.sigma / before.sigma, start),
                (level.alpha * weights[0], x0),
                *((level.alpha * w, v) for w, v in zip(weights[1:], values, strict=False)),
            )
        nodes.appendleft(now)
        values.appendleft(x0)
        used = min(len(nodes), len(path) - i)  # down to 1 in the last step, infinite in log-SNR
        told = list(nodes)[:used]
        weights = _weights(told, now, then)
        if used == 2:
            more = _half(then - now, variant) * (then - now) / (now - told[1])
            weights = [-math.expm1(now - then) + more, -more]
        before, start = level, x
        moves = [(after.alpha * w, value) for w, value in zip(weights, values, strict=False)]
        x = combine((after.sigma / level.sigma, x), *moves)
        if now == -math.inf:  # no polynomial reaches there
            nodes.clear()
            values.clear()
        yield x


def _half(h: float, variant: str) -> float:
    """Return B(h) / 2."""
    return h / 2 if variant == "bh1" else -math.expm1(-h) / 2


def dpmpp_3m(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng
) -> Iterator[Tensor]:
    """As dpmpp_2m, with a parabola through three x_0, integrated exactly.

    The form that goes by this name in other packages takes half of the parabola's last term, which
    makes it of order 2.
    """
    return _data(denoise, x, times, schedule, 3, correct=False)


def unipc(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    schedule: Schedule,
    rng: Rng,
    *,
    order: int = 2,
    variant: str = "bh2",
) -> Iterator[Tensor]:
    """Predict as dpmpp does, and correct with the x_0 told at the next level at no further call.

    Zhao, Bai, Rao, Zhou, Lu 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling
    of Diffusion Models", algorithms 1 and 2 on x_0: of order + 1 by the corrector.

    Args:
        denoise: the expected x_0.
        x: (B, ...) at times[0].
        times: (steps + 1,) falling to 0.
        schedule: of the model.
        rng: not used.
        order: x_0 remembered, 1 to 3; the paper takes 3, and 2 under guidance.
        variant: bh1 or bh2, how two values are weighed.
    """
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant '{variant}' is not known; expected bh1 or bh2")
    order = _known("unipc", order, 3)
    return _data(denoise, x, times, schedule, order, correct=True, variant=variant)
