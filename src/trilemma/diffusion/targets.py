"""What the network predicts: F = a x_0 + b noise.

With x_t = alpha x_0 + sigma noise, two equations in two unknowns, so for every target

    x_0 = (b x_t - sigma F) / (b alpha - a sigma)

Noise: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", eq. 14. Image and
velocity: Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models",
section 4. Straight: Liu, Gong, Liu 2023, "Flow Straight and Fast", eq. 1 (with time reversed).

Preconditioned: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
Models", eq. 8 and table 1. Of x_t and F, x_0 = c_skip x_t + c_out F with the c_skip that leaves F
the least to say, and the c_out that gives F unit variance. For x_0 of deviation s (data_std), with
any alpha, and r^2 = alpha^2 s^2 + sigma^2,

    c_skip = alpha s^2 / r^2,    c_out = sigma s / r,    F = sigma / (s r) x_0 - alpha s / r noise
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Coefficients = tuple[Tensor, Tensor]
"""(a, b), each in the shape of alpha."""


def _noise(alpha: Tensor, sigma: Tensor, data_std: float = 1.0) -> Coefficients:
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def _image(alpha: Tensor, sigma: Tensor, data_std: float = 1.0) -> Coefficients:
    return torch.ones_like(alpha), torch.zeros_like(alpha)


def _velocity(alpha: Tensor, sigma: Tensor, data_std: float = 1.0) -> Coefficients:
    return -sigma, alpha


def _straight(alpha: Tensor, sigma: Tensor, data_std: float = 1.0) -> Coefficients:
    return -torch.ones_like(alpha), torch.ones_like(alpha)


def _preconditioned(alpha: Tensor, sigma: Tensor, data_std: float = 1.0) -> Coefficients:
    r = (alpha**2 * data_std**2 + sigma**2).sqrt()
    return sigma / (data_std * r), -alpha * data_std / r


TARGETS: dict[str, Callable[..., Coefficients]] = {
    "noise": _noise,
    "image": _image,
    "velocity": _velocity,
    "straight": _straight,
    "preconditioned": _preconditioned,
}
"""Name -> (alpha, sigma, data_std) -> (a, b)."""


def clean(x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor, ab: Coefficients) -> Tensor:
    """Return x_0 as the network's output F says it: the formula above.

    Args:
        x: x_t (B, ...).
        output: F (B, ...).
        alpha: broadcast to x, as are the others.
        sigma: the noise level.
        ab: the target's coefficients at (alpha, sigma).
    """
    a, b = ab
    return (b * x - sigma * output) / (b * alpha - a * sigma)
