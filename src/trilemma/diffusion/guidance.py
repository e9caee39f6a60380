"""Wrappers of a denoiser; the solver never hears of them.

A denoiser maps (x_t, t) to the x_0 it expects. With x_t = alpha x_0 + sigma noise, the gradient of
the log density of x_t is (alpha x_0 - x_t) / sigma^2, so that whoever adds a gradient to it moves

    x_0  by  sigma^2 / alpha  times that gradient.                                            (*)

Classifier-free guidance (Ho & Salimans 2021, "Classifier-Free Diffusion Guidance", eq. 6) goes from
the unconditional answer through the conditional one and beyond. The paper does so with the noise;
x_0 is the same straight line:

    x_0 = without + scale (given - without)

so 1 is no guidance, 0 ignores the condition, and the paper's w is scale - 1. Auto-guidance (Karras
et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself") is the same line with a
weaker model's answer, to the same condition, for `without`. Both may be restricted to an interval
of noise levels sigma / alpha (Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval
Improves Sample and Distribution Quality in Diffusion Models"), and the spread of the guided x_0
brought back to what it is with the condition (Lin et al. 2024, "Common Diffusion Noise Schedules
and Sample Steps are Flawed", eq. 15-16).

Classifier guidance (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis",
section 4.2). By Bayes' rule log p(x_t | y) = log p(x_t) + log p(y | x_t) + a constant, and (*)
turns the gradient of the second term, that of a classifier which knows noisy pictures, into

    x_0 + scale sigma^2 / alpha  d log p(y | x_t) / d x_t.

Guidance by any function g of clean pictures (Bansal et al. 2023, "Universal Guidance for Diffusion
Models", its forward guidance; Chung et al. 2023, "Diffusion Posterior Sampling for General Noisy
Inverse Problems") takes g at the expected picture for that log probability,

    x_0 + scale sigma^2 / alpha  d g(x_0(x_t)) / d x_t,

with the gradient through the network. For the best denoiser d x_0 / d x_t is alpha / sigma^2 times
the covariance of the pictures that may lie behind x_t: x_0 moves by scale times that covariance
times dg/dx_0, along what is still open, and not at all in the end.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trilemma.batch import Condition
from trilemma.conditioning import reads_text
from trilemma.diffusion.resemblance import resemblance
from trilemma.diffusion.schedules import Schedule
from trilemma.errors import UserError
from trilemma.model import Matches
from trilemma.networks.layers import Embedded

if TYPE_CHECKING:
    from trilemma.models.classifier import Classifier
    from trilemma.models.diffusion import Diffusion

Denoiser = Callable[[Tensor, float], Tensor]
"""(x_t (B, ...), t) -> x_0 (B, ...)."""

Guide = Callable[[Tensor], Tensor]
"""Pictures (B, C, H, W) in [-1, 1] -> (B,), greater where they are more as they shall be."""


@dataclass(frozen=True)
class Guidance:
    """All that can be asked of guidance at once.

    Attributes:
        scale: of classifier-free guidance or auto-guidance; 1 is none.
        interval: the sigma / alpha, above the first and up to the second, where that acts.
        rescale: 0 to 1, how far the spread of x_0 is brought back to that without guidance.
        weaker: a weaker model, for auto-guidance.
        classifier: a classifier of noisy pictures.
        classifier_scale: 1 makes of an unconditional model a conditional one.
        guide: any differentiable function of pictures.
        guide_scale: of its gradient.
        negative: a text to go away from, instead of from "nothing said".
        clip: tells how well the texts of the condition fit (`diffusion.resemblance`).
        clip_scale: of the gradient of that.
        crops: of each picture, that it looks at.

    Raises:
        ValueError: a number that is not finite, an interval that is empty, a rescale beyond 0 to 1,
            a weaker model or a negative text at scale 1.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    weaker: Diffusion | None = None
    classifier: Classifier | None = None
    classifier_scale: float = 1.0
    guide: Guide | None = None
    guide_scale: float = 1.0
    negative: str | None = None
    clip: Matches | None = None
    clip_scale: float = 1.0
    crops: int = 8

    def __post_init__(self) -> None:
        numbers = {"guidance": self.scale, "guidance_rescale": self.rescale, "crops": self.crops}
        numbers |= {k: getattr(self, k) for k in ("classifier_scale", "guide_scale", "clip_scale")}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}; expected a finite number")
        if self.crops < 1:
            raise ValueError(f"crops is {self.crops}; expected at least 1")
        if self.interval is not None:
            low, high = self.interval if len(self.interval) == 2 else (0, 0)
            if not 0 <= low < high:
                raise ValueError(
                    f"guidance_interval is {list(self.interval)}; expected two numbers, the least "
                    "and the greatest sigma / alpha where guidance acts, such as [0.2, 3]"
                )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale is {self.rescale}; expected 0 to 1")
        if self.weaker is not None and self.scale == 1:
            raise ValueError(
                "a weaker model guides nothing at guidance 1; say how far, such as guidance 2"
            )
        if self.negative is not None and (self.scale == 1 or self.weaker is not None):
            raise ValueError(
                "a negative text takes the place of nothing said in classifier-free guidance: give "
                "a guidance above 1, such as 3, and no weaker model"
            )


def guided(model: Diffusion, condition: Condition, asked: Guidance) -> Denoiser:
    """Return a model's denoiser under a condition, with all the guidance that is asked for.

    Raises:
        ValueError: the model cannot be guided so, or what is to guide does not fit it.
    """
    given = model.conditioner(condition)
    plain: Denoiser = lambda x, t: model.denoise(x, t, given)  # noqa: E731
    denoise = plain
    if asked.scale != 1:
        if asked.weaker is None:
            both = _with_and_without(model, condition, given, asked)
        else:
            both = _strong_and_weak(model, condition, given, asked.weaker)
        denoise = classifier_free(both, asked.scale, asked.rescale)
        if asked.interval is not None:
            denoise = within(asked.interval, denoise, plain, model.schedule)
    if asked.guide is not None:
        denoise = by_guide(denoise, model, asked.guide, asked.guide_scale)
    if asked.clip is not None:
        fit = resemblance(asked.clip, condition, asked.crops)
        denoise = by_guide(denoise, model, fit, asked.clip_scale)
    if asked.classifier is not None:
        log_prob = asked.classifier.log_prob_of(condition, model.codec.shape, model.schedule)
        denoise = by_classifier(denoise, log_prob, asked.classifier_scale, model.schedule)
    return denoise


def _with_and_without(
    model: Diffusion, condition: Condition, given: Embedded, asked: Guidance
) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """Return x_0 with the condition and without it, by one call of the network."""
    if not model.conditioner.guidable:
        raise ValueError(
            f"guidance {asked.scale} needs a model trained with labels, attributes or captions and "
            "with conditioner.dropout above 0; use guidance 1, or train such a model"
        )
    nothing = model.conditioner.nothing(condition)
    if asked.negative is not None:
        if not reads_text(model):
            raise ValueError("a negative text was given, and the model reads no texts")
        away = Condition(
            condition.count, text=[asked.negative] * condition.count, source=condition.source
        )
        nothing = model.conditioner(away)
    pairs = {name: (getattr(given, name), getattr(nothing, name)) for name in vars(given)}
    doubled = Embedded(**{k: None if v[0] is None else torch.cat(v) for k, v in pairs.items()})

    def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        with_it, without = model.denoise(torch.cat([x, x]), t, doubled).chunk(2)
        return with_it, without

    return both


def _strong_and_weak(
    model: Diffusion, condition: Condition, given: Embedded, weaker: Diffusion
) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """Return x_0 of a model and of a weaker one, under the same condition."""
    if weaker.codec.shape != model.codec.shape:
        raise ValueError(
            f"the weaker model draws {weaker.codec.shape} and this one {model.codec.shape}; "
            "it must be one of the same pictures: smaller, or trained for less long"
        )
    theirs = weaker.conditioner(condition)

    def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        there = elsewhere(x, t, model.schedule, weaker.schedule)
        return model.denoise(x, t, given), weaker.denoise(*there, theirs)

    return both


def by_classifier(
    denoise: Denoiser, log_prob: Denoiser, scale: float, schedule: Schedule
) -> Denoiser:
    """Guide by `log_prob`, (x_t, t) -> the log probability (B,) of the class."""

    def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return denoise(x.detach(), t), log_prob(x, t)

    return toward(both, scale, schedule)


def by_guide(denoise: Denoiser, model: Diffusion, guide: Guide, scale: float) -> Denoiser:
    """Guide by what a function says of the expected picture."""

    def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        x0 = kept = denoise(x, t)
        if model.codec.bounds:  # what is out of bounds keeps its gradient: it may come back
            kept = x0.clamp(*model.codec.bounds).detach() + (x0 - x0.detach())
        return x0, fit_of(guide, model.codec.decode(kept))

    return toward(both, scale, model.schedule)


def classifier_free(
    both: Callable[[Tensor, float], tuple[Tensor, Tensor]], scale: float, rescale: float = 0.0
) -> Denoiser:
    """Guide by the difference that the condition makes, or a better model.

    Args:
        both: gives x_0 with the condition and without it; together, so that the network can be
            called once for the two.
        scale: 1 is no guidance.
        rescale: how far each x_0's deviation is brought back to that with the condition.
    """

    def denoise(x: Tensor, t: float) -> Tensor:
        given, without = both(x, t)
        guided = torch.lerp(without, given, scale)
        if rescale:
            parts = tuple(range(1, x.ndim))
            ratio = given.std(parts, keepdim=True) / guided.std(parts, keepdim=True).clamp(min=1e-8)
            guided = guided * (rescale * ratio + 1 - rescale)
        return guided

    return denoise


def within(
    interval: tuple[float, float], inside: Denoiser, outside: Denoiser, schedule: Schedule
) -> Denoiser:
    """Use one denoiser where sigma / alpha is in (low, high], and another elsewhere."""
    low, high = interval

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = level(schedule, t)
        acts = low * alpha < sigma and (sigma <= high * alpha or high == math.inf)
        return (inside if acts else outside)(x, t)

    return denoise


def toward(
    both: Callable[[Tensor, float], tuple[Tensor, Tensor]], scale: float, schedule: Schedule
) -> Denoiser:
    """Guide by a gradient: the formulas of classifier guidance and of guidance by any function.

    Where nothing is left of the picture (alpha = 0) there is nothing to follow: x_0 stays.

    Args:
        both: gives x_0 (B, ...) and how well it fits (B,), differentiable in x_t.
        scale: of the gradient.
        schedule: of the model.

    The denoiser raises ValueError for a gradient that is not there or not finite, and inside
    `torch.inference_mode`, where there are none.
    """

    def denoise(x: Tensor, t: float) -> Tensor:
        if torch.is_inference_mode_enabled():
            raise ValueError("guidance needs gradients: use torch.no_grad, not inference_mode")
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0, fit = both(x, t)
            gradient = None
            if fit.requires_grad:
                (gradient,) = torch.autograd.grad(fit.sum(), x, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "the guide has no gradient: it must be made of differentiable operations of torch "
                "on the pictures it is given, without .detach(), .item(), rounding or numpy"
            )
        if not (gradient.isfinite().all() and fit.isfinite().all()):
            raise ValueError(
                "the guide's value or gradient is not finite; look for a division by 0, or for the "
                "square root or logarithm of 0, and add a small number there"
            )
        alpha, sigma = level(schedule, t)
        return x0.detach() + (scale * sigma**2 / alpha if alpha else 0.0) * gradient

    return denoise


def fit_of(guide: Guide, images: Tensor) -> Tensor:
    """Return what a guide says of images (B, C, H, W): (B,).

    A guide that makes one number of all it is given is asked of each picture by itself, so that no
    picture depends on those beside it.

    Raises:
        ValueError: the guide returns something else, or raises an error; told with its place.
    """
    try:
        value = guide(images)
        if isinstance(value, Tensor) and value.ndim == 0 and len(images) > 1:
            value = torch.stack([guide(image[None]) for image in images])
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the user's function, whatever it is
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"the guide raised {type(error).__name__}: {error} ({place.filename}, line "
            f"{place.lineno}); it is called with pictures {tuple(images.shape)}, and must return a "
            "number for each"
        ) from error
    if isinstance(value, Tensor) and value.numel() == len(images) and value.ndim <= 1:
        return value.reshape(len(images))
    got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
    raise ValueError(
        f"the guide returned {got} for {len(images)} pictures; expected a tensor of one number for "
        "each picture, or one number: average over channels, rows and columns, say"
    )


def clipped(denoise: Denoiser, low: float, high: float) -> Denoiser:
    """Keep x_0 where pictures can be: Ho et al. 2020, section 3.2's note on scaling."""
    return lambda x, t: denoise(x, t).clamp(low, high)


@lru_cache(maxsize=4096)
def level(schedule: Schedule, t: float) -> tuple[float, float]:
    """Return alpha and sigma at t."""
    alpha, sigma = schedule(torch.tensor(t, dtype=torch.float64))
    return float(alpha), float(sigma)


def elsewhere(x: Tensor, t: float, here: Schedule, there: Schedule) -> tuple[Tensor, float]:
    """Return x_t and t as another schedule has them: as noisy, but on its scale."""
    time = torch.tensor(t, dtype=torch.float64)
    other = float(there.time(here.log_snr(time)))
    (alpha, sigma), (alpha_other, sigma_other) = level(here, t), level(there, other)
    scale = (alpha_other**2 + sigma_other**2) ** 0.5 / (alpha**2 + sigma**2) ** 0.5
    return scale * x, other
