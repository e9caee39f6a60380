"""How probable a picture is to a diffusion model: exactly by its flow, or a bound by its steps.

**By the flow.** The probability-flow equation is a continuous normalising flow, whose density
changes along it by the divergence of its velocity: Song et al. 2021, "Score-Based Generative
Modeling through Stochastic Differential Equations", eq. 39, with the divergence estimated by one
product with the Jacobian, e^T J e for random e of unit covariance (Hutchinson's estimator, eq. 40).

Any schedule is a circle in the frame y = x / (alpha^2 + sigma^2)^(1/2), where
y = cos(p) x_0 + sin(p) noise at the angle p = atan(sigma / alpha), so that

    dy/dp = cos(p) noise - sin(p) x_0 = (cos(p) y - x_0) / sin(p),

regular at pure noise (p = pi/2) too. Steps are even in w = log tan(c p), which is
log(sigma / alpha) but for the c just below 1 that makes it finite at pure noise. The flow begins at
sigma / alpha = 0.002, where sampling takes the picture to be clean.

**By the steps.** For a model of T steps, Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic
Models", eq. 5, bounds the probability of the 8-bit picture, -log P <= L_T + ... + L_1 + L_0, with
each step's distribution N(mean, variance) against the one that knows x_0; the last reads off a
level by the Gaussian's mass in its cell (eq. 13). The variance of a step lies between the
posterior's, small, and the forward step's, large: Nichol & Dhariwal 2021, "Improved Denoising
Diffusion Probabilistic Models", eq. 15, with a learned share v,

    variance = exp(v log(large) + (1 - v) log(small)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trilemma.batch import Condition, Rng, to_uint8
from trilemma.codecs import Pixels
from trilemma.diffusion.grids import CLEANEST
from trilemma.diffusion.guidance import Denoiser
from trilemma.diffusion.schedules import Schedule

if TYPE_CHECKING:
    from trilemma.models.diffusion import Diffusion

FARTHEST = 100.0  # tan(c p) at pure noise
FLOW_STEPS = 16  # of Runge and Kutta's method, four network calls each and their gradients

Guess = Callable[[Tensor, float], tuple[Tensor, Tensor | float]]
"""x_t (B, ...), t -> the expected x_0 (B, ...), and the share v (B, ...) of the large variance."""


def log_prob(model: Diffusion, image: Tensor, label: Tensor | None = None) -> Tensor:
    """Return (B,) nats of images (B, C, H, W), of labels (B,) or with nothing said of them.

    With continuous times the density by the flow, else the bound by the steps, with the small
    variance or the learned one. A picture's noise is a function of the picture. In float32, for
    bfloat16 is too coarse for sums over many calls.

    Raises:
        ValueError: a model of latents, or a continuous one that was not trained with dequantise.
    """
    if type(model.codec) is not Pixels:
        raise ValueError(
            f"a model of {type(model.codec).__name__} tells no likelihood of pictures; "
            "ask one with codecs.Pixels"
        )
    if not model.discrete and not model.dequantise:
        raise ValueError(
            "the density of pictures is asked of a model that learned their levels, where it "
            "has no bound; train one with --set model.dequantise=true"
        )
    levels = to_uint8(image).flatten(1).long()
    place = torch.arange(1, levels.shape[1] + 1, device=levels.device)
    rng = Rng((levels * place).sum(1), image.device)
    with torch.autocast(image.device.type, enabled=False):
        embedded = model.conditioner(Condition(len(image), label))

        def denoise(x: Tensor, t: float) -> Tensor:
            return model.denoise(x, t, embedded)

        if model.steps is None:
            return flow_log_prob(denoise, image, model.schedule, rng)

        def guess(x: Tensor, t: float) -> tuple[Tensor, Tensor | float]:
            x0 = denoise(x, t).clamp(-1, 1)
            return x0, 0.0 if model.share is None else model.share

        return step_bound(guess, image, model.schedule, rng, model.steps)


def flow_log_prob(
    denoise: Denoiser,
    x0: Tensor,
    schedule: Schedule,
    rng: Rng,
    *,
    steps: int = FLOW_STEPS,
    gaussian: bool = False,
) -> Tensor:
    """Return the log density (B,) in nats of x0 (B, ...) under the flow from noise to pictures.

    Exact but for the error of the steps, and without bias but for that.

    Args:
        denoise: the expected x_0; not clipped, for a flow must have an inverse.
        x0: (B, ...).
        schedule: of the model.
        rng: one stream for each of x0, for Hutchinson's estimator.
        steps: of the classical Runge-Kutta method, four calls and their gradients each.
        gaussian: draw e from the normal distribution rather than as signs, whose variance is less.
    """
    shape, dims = x0.shape[1:], x0[0].numel()
    e = rng.normal(*shape) if gaussian else rng.integers(2, *shape).float() * 2 - 1
    e = e.to(x0.dtype)
    alpha, sigma = schedule(torch.ones((), dtype=torch.float64))
    first, last = math.atan(CLEANEST), math.atan2(float(sigma), float(alpha))
    c = min(1.0, math.atan(FARTHEST) / last)
    low, high = math.log(math.tan(c * first)), math.log(math.tan(c * last))
    w = torch.linspace(low, high, 2 * steps + 1, dtype=torch.float64)
    p = w.exp().atan() / c
    times = schedule.time(-2 * p.tan().log())
    times[-1] = 1
    alphas, sigmas = schedule(times)
    norms = (alphas**2 + sigmas**2).sqrt()
    places = list(zip(times.tolist(), p.tolist(), norms.tolist(), strict=True))

    def slope(place: tuple[float, float, float], y: Tensor) -> tuple[Tensor, Tensor]:
        """Return dy / dw and the estimate (B,) of its divergence."""
        t, p, norm = place
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            guess = denoise(norm * y, t)
            (product,) = torch.autograd.grad(guess, y, e)
        trace = (product * e).flatten(1).sum(1).double()
        rate = math.sin(2 * c * p) / (2 * c * math.sin(p))
        return (
            rate * (math.cos(p) * y.detach() - guess.detach()),
            rate * (math.cos(p) * dims - trace),
        )

    y, gained = math.cos(first) * x0, torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    width = (high - low) / steps
    for i in range(0, 2 * steps, 2):
        start, middle, end = places[i : i + 3]
        k1, g1 = slope(start, y)
        k2, g2 = slope(middle, y + width / 2 * k1)
        k3, g3 = slope(middle, y + width / 2 * k2)
        k4, g4 = slope(end, y + width * k3)
        y = y + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        gained = gained + width / 6 * (g1 + 2 * g2 + 2 * g3 + g4)
    scale = math.sin(last)
    squares = (y / scale).flatten(1).square().sum(1).double()
    noise = -0.5 * squares - dims * (0.5 * math.log(2 * math.pi) + math.log(scale))
    return noise + gained + dims * math.log(math.cos(first))


def step_bound(guess: Guess, x0: Tensor, schedule: Schedule, rng: Rng, steps: int) -> Tensor:
    """Return a lower bound (B,) in nats of the log probability of 8-bit pictures x0 (B, C, H, W).

    Args:
        guess: the expected x_0, and the share of the large variance.
        x0: in [-1, 1], at one of 256 even levels each.
        schedule: of the model.
        rng: one stream for each of x0.
        steps: T.
    """
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha, sigma = schedule(times)
    ratio = float(alpha[-1] / sigma[-1])
    total = 0.5 * ratio**2 * x0.flatten(1).square().sum(1).double()  # L_T
    for k in range(steps, 0, -1):
        x = float(alpha[k]) * x0 + float(sigma[k]) * rng.normal(*x0.shape[1:])
        expected, share = guess(x, float(times[k]))
        now = torch.full((len(x0),), k, device=x0.device)
        nats = step_nats(x0, expected, share, now, schedule, steps)
        total = total + nats.flatten(1).sum(1).double()
    return -total


def step_nats(
    x0: Tensor, expected: Tensor, share: Tensor | float, k: Tensor, schedule: Schedule, steps: int
) -> Tensor:
    """Return the terms (B, ...) in nats of the bound: L_{k-1} of every number.

    Args:
        x0: (B, ...).
        expected: (B, ...) the model's x_0.
        share: v, of the large variance.
        k: (B,) int64 the steps, 1 to T.
        schedule: of the model.
        steps: T.
    """

    def at(step: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule(step.double() / steps)
        shape = (-1, *[1] * (x0.ndim - 1))
        return alpha.view(shape), sigma.view(shape)

    now, then = at(k), at(k - 1)
    large, small = variances(*now, *then)
    # The first step's posterior has no variance; as in both papers' code, the second's stands in.
    second = variances(*at(torch.full_like(k, 2)), *at(torch.ones_like(k)))[1]
    first = (k == 1).view(large.shape)
    log_small = torch.where(first, second, small).log().to(x0.dtype)
    log_large = large.log().to(x0.dtype)
    log_variance = share * log_large + (1 - share) * log_small
    pull = (then[0] * large / now[1] ** 2).to(x0.dtype)  # of x_0 on the step's mean
    apart = pull * (x0 - expected)
    exponent = log_small - log_variance
    kl = 0.5 * (exponent.exp() - exponent - 1 + apart.square() * (-log_variance).exp())
    return torch.where(first, -_log_mass(x0, expected, log_variance), kl)


def variances(
    alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the large and the small variance of a step from (alpha, sigma) to the next."""
    large = sigma**2 - (alpha / alpha_next * sigma_next) ** 2
    return large, large * (sigma_next / sigma) ** 2


def _log_mass(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log of the Gaussian's mass in the cells of x0, the outermost being unbounded."""
    scale = (-0.5 * log_variance).exp()
    above = torch.special.ndtr(scale * (x0 - mean + 1 / 255))
    below = torch.special.ndtr(scale * (x0 - mean - 1 / 255))
    above = torch.where(x0 > 0.999, 1.0, above)
    below = torch.where(x0 < -0.999, 0.0, below)
    return (above - below).clamp(min=1e-12).log()
