"""Inpainting, also with a denoiser that was never trained for it.

Lugmayr et al. 2022, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", algorithm
1: after every step the known part of x_t is replaced by the known picture with fresh noise of that
level,

    x_t <- mask x_t + (1 - mask) (alpha known + sigma noise),

and to bring what was drawn into harmony with it, the step is taken several times, with the noise of
a step forward before each repetition:

    x_s = r x_t + (sigma_s^2 - r^2 sigma_t^2)^(1/2) noise,    r = alpha_s / alpha_t,    s > t.

With one time each, what is drawn fits the known part's noise, and hardly the known part.

A model that was trained with masks is told the mask and samples as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trilemma.batch import Condition, Rng
from trilemma.conditioning import masked, source_of
from trilemma.diffusion.grids import even_share
from trilemma.diffusion.guidance import Denoiser, Guidance, level
from trilemma.diffusion.schedules import Schedule
from trilemma.diffusion.solvers import ddpm, last

if TYPE_CHECKING:
    from trilemma.models.diffusion import Diffusion


def inpaint(
    model: Diffusion,
    image: Tensor,
    mask: Tensor,
    condition: Condition,
    rng: Rng,
    *,
    steps: int,
    resample: int,
    guidance: float | Guidance,
) -> Tensor:
    """Draw what is hidden of images, and keep the rest: `models.diffusion.Diffusion.inpaint`."""
    if mask.shape != (len(image), 1, *image.shape[2:]):
        raise ValueError(
            f"a mask {tuple(mask.shape)} was given for images {tuple(image.shape)}; "
            f"expected {(len(image), 1, *image.shape[2:])}"
        )
    if steps < 1 or resample < 1:
        raise ValueError(f"steps is {steps} and resample {resample}; expected at least 1")
    hidden = mask > 0.5
    image = torch.where(hidden, 0.0, image)
    source = source_of(model.conditioner)
    if source is not None and source.kind == "masked":
        told = replace(condition, source=masked(image, mask))
        drawn = model.sample(told, rng, steps=steps, guidance=guidance)
    else:
        known = model.codec.encode(image)
        place = F.adaptive_max_pool2d(hidden.float(), known.shape[2:]) > 0.5
        denoise = model.denoiser(condition, guidance)
        times = even_share(model.schedule, steps)
        painting = repaint(denoise, known, place, times, model.schedule, rng, resample)
        drawn = model.codec.decode(last(painting))
    return torch.where(hidden, drawn, image)


def repaint(
    denoise: Denoiser,
    known: Tensor,
    mask: Tensor,
    times: Tensor,
    schedule: Schedule,
    rng: Rng,
    resample: int,
) -> Iterator[Tensor]:
    """Draw x_0 where the mask says, to fit the rest; yields x after each step.

    Args:
        denoise: the expected x_0.
        known: (B, ...), of which the masked part is not read.
        mask: bool, broadcast to `known`: where to draw.
        times: (steps + 1,) falling to 0.
        schedule: of the model.
        rng: all the noise.
        resample: how often each step is taken.
    """
    shape = known.shape[1:]
    x = level(schedule, float(times[0]))[1] * rng.normal(*shape)
    for pair in zip(times[:-1], times[1:], strict=True):
        (alpha_s, sigma_s), (alpha, sigma) = (level(schedule, float(t)) for t in pair)
        shrink = alpha_s / alpha
        fresh = max(sigma_s**2 - (shrink * sigma) ** 2, 0.0) ** 0.5
        for turn in range(resample):
            if turn:
                x = shrink * x + fresh * rng.normal(*shape)
            x = next(ddpm(denoise, x, torch.stack(pair), schedule, rng))
            kept = alpha * known + sigma * rng.normal(*shape) if sigma else known
            x = torch.where(mask, x, kept)
        yield x
