"""Inverting a diffusion model: the noise that its flow makes a given picture of.

The probability-flow equation has one path through every point, so it can be followed from picture
to noise as well as back: Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models", section
4.3. Nothing is said of the picture on either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trilemma.batch import Condition, Rng
from trilemma.diffusion.grids import karras
from trilemma.diffusion.solvers import heun, last
from trilemma.networks.layers import check_shape

if TYPE_CHECKING:
    from trilemma.models.diffusion import Diffusion

STEPS = 25  # of Heun's method, two network calls each, from picture to noise or back


def encode(model: Diffusion, image: Tensor) -> Tensor:
    """Map images (B, C, H, W) to the noise (B, ...) that `decode` makes them of."""
    times = karras(model.schedule, STEPS)[:-1].flip(0)  # from all but clean to noise
    alpha, _ = model.schedule(times[:1])
    return _flow(model, float(alpha) * model.codec.encode(image), times)


def decode(model: Diffusion, latent: Tensor) -> Tensor:
    """Map noise (B, ...) to images (B, C, H, W) in [-1, 1].

    Raises:
        ValueError: noise of another shape.
    """
    check_shape("latents", latent, *model.codec.shape)
    return model.codec.decode(_flow(model, latent, karras(model.schedule, STEPS)))


def _flow(model: Diffusion, x: Tensor, times: Tensor) -> Tensor:
    """Follow the equation from x (B, ...) at times[0] to the last time."""
    rng = Rng(torch.zeros(len(x), dtype=torch.int64), x.device)  # heun draws nothing
    nothing = model.conditioner.nothing(Condition(len(x)))

    def denoise(x: Tensor, t: float) -> Tensor:
        return model.denoise(x, t, nothing)

    return last(heun(denoise, x, times, model.schedule, rng))
