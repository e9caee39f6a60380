"""Solvers that shake: annealed Langevin dynamics, the reverse SDE, predictor and corrector.

Generators like those of `solvers`, and registered there. The score of the noisy pictures is what
their denoiser knows of them: grad log p(x_t) = (alpha x_0 - x_t) / sigma^2 (Tweedie's formula).

A Langevin move at one noise level, of relative size e,

    x <- x + e sigma^2 score + sqrt(2 e) sigma noise

leaves p(x_t) as it is, up to a variance too large by 1 / (1 - e / 2) at most.

- langevin: Song & Ermon 2019, "Generative Modeling by Estimating Gradients of the Data
  Distribution", algorithm 1, with the last denoising of Song & Ermon 2020, "Improved Techniques for
  Training Score-Based Generative Models", section 3.4. Their step epsilon is 2 e sigma_L^2.
- sde: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential
  Equations", eq. 6, by Euler and Maruyama.
- pc: their algorithms 2 to 5: a predictor's step, then Langevin moves at the level reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from trilemma.batch import Rng
from trilemma.diffusion.guidance import Denoiser
from trilemma.diffusion.levels import combine, steps
from trilemma.diffusion.schedules import Schedule


def langevin(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    schedule: Schedule,
    rng: Rng,
    *,
    moves: int = 5,
    size: float = 0.3,
) -> Iterator[Tensor]:
    """Move about at each noise level, from the highest to the lowest, then denoise once.

    Args:
        denoise: the expected x_0.
        x: (B, ...) at times[0].
        times: (steps + 1,) falling to 0; all but the last are levels.
        schedule: of the model.
        rng: fresh noise.
        moves: network calls at each level; the last of all denoises.
        size: e of a move.
    """
    path = steps(schedule, times)
    noise = rng.normals(moves * len(path) - 1, *x.shape[1:])
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in path:
        for _ in range(moves if sigma_next else moves - 1):
            fresh = (2 * size) ** 0.5 * sigma
            x = combine((1 - size, x), (size * alpha, denoise(x, t)), (fresh, next(noise)))
        if not sigma_next:
            x = denoise(x, t)
        else:  # the same picture and the same noise on it, at another scale
            x = x * (alpha_next / alpha if alpha else sigma_next / sigma)
        yield x


def reverse_sde(
    denoise: Denoiser, x: Tensor, times: Tensor, schedule: Schedule, rng: Rng
) -> Iterator[Tensor]:
    """Follow the reverse SDE with its drift and noise at the beginning of each step.

    In terms of the schedule, dx = f x dt + g dw has f dt = d log alpha and, with the log
    signal-to-noise ratio l, g^2 dt = -sigma^2 dl: so a step of the paper's VE and VP diffusions is
    the paper's. Steps longer than 2 in l are unstable, as those of any explicit method.
    """
    path = steps(schedule, times)
    noise = rng.normals(len(path) - 1, *x.shape[1:])
    for (t, alpha, sigma), (_, alpha_next, sigma_next) in path:
        x0 = denoise(x, t)
        if not sigma_next:
            x = x0
        elif not alpha:  # x_t knows nothing of x_0: the step is infinitely long, its end known
            x = combine((alpha_next, x0), (sigma_next, next(noise)))
        else:
            gain = 2 * math.log(alpha_next * sigma / (alpha * sigma_next))
            kept = 1 + math.log(alpha_next / alpha) - gain
            x = combine((kept, x), (gain * alpha, x0), (gain**0.5 * sigma, next(noise)))
        yield x


def predictor_corrector(
    denoise: Denoiser,
    x: Tensor,
    times: Tensor,
    schedule: Schedule,
    rng: Rng,
    *,
    snr: float = 0.16,
) -> Iterator[Tensor]:
    """Step as ddpm with the large variance does, then make one Langevin move.

    That step is the paper's reverse diffusion predictor (its appendix E). The move is to have the
    ratio `snr` of the score's part to the noise's; algorithm 4 measures the score for it, averaged
    over the batch. Here its norm is taken to be that of noise, D^(1/2) / sigma, which it nearly is
    in many dimensions, so that a picture does not depend on its batch: e = 2 snr^2. Two network
    calls a step, one in the last.

    Args:
        denoise: the expected x_0.
        x: (B, ...) at times[0].
        times: (steps + 1,) falling to 0.
        schedule: of the model.
        rng: fresh noise.
        snr: r of the paper; 0.16 there for the VE, VP and sub-VP diffusions of CIFAR-10.
    """
    path = steps(schedule, times)
    noise = rng.normals(2 * (len(path) - 1), *x.shape[1:])
    for (t, alpha, sigma), (t_next, alpha_next, sigma_next) in path:
        x0 = denoise(x, t)
        shrink = alpha / alpha_next  # x_t = shrink x_next + noise of step_variance
        step_variance = sigma**2 - (shrink * sigma_next) ** 2
        kept = shrink * (sigma_next / sigma) ** 2
        x = combine((kept, x), (alpha_next * step_variance / sigma**2, x0))
        if sigma_next:
            x.add_(next(noise), alpha=step_variance**0.5)
            size, x0 = 2 * snr**2, denoise(x, t_next)
            fresh = 2 * snr * sigma_next
            x = combine((1 - size, x), (size * alpha_next, x0), (fresh, next(noise)))
        yield x
