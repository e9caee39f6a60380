"""Wrappers of a denoiser; the solver never hears of them.

A denoiser maps (x_t, t) to the x_0 it expects. Classifier-free guidance (Ho & Salimans 2021,
"Classifier-Free Diffusion Guidance", eq. 6) goes from the unconditional answer through the
conditional one and beyond. The paper does so with the noise; x_0 is the same straight line:

    x_0 = without + scale (given - without)

so 1 is no guidance, 0 ignores the condition, and the paper's w is scale - 1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
"""(x_t (B, ...), t) -> x_0 (B, ...)."""


def classifier_free(
    both: Callable[[Tensor, float], tuple[Tensor, Tensor]], scale: float
) -> Denoiser:
    """Guide by the difference that the condition makes.

    Args:
        both: gives x_0 with the condition and without it; together, so that the network can be
            called once for the two.
        scale: 1 is no guidance.
    """

    def denoise(x: Tensor, t: float) -> Tensor:
        given, without = both(x, t)
        return without + scale * (given - without)

    return denoise


def clipped(denoise: Denoiser, low: float, high: float) -> Denoiser:
    """Keep x_0 where pictures can be: Ho et al. 2020, section 3.2's note on scaling."""
    return lambda x, t: denoise(x, t).clamp(low, high)
