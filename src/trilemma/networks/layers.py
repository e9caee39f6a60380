"""Small pieces that several networks share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Embedded:
    """A condition as networks read it; each field may be absent.

    Attributes:
        vector: (B, D), joined to the time embedding.
        tokens: (B, T, D), a sequence to attend to.
        image: (B, C, H, W), concatenated to the input.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    image: Tensor | None = None


def sinusoidal(position: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sine and cosine features (B, dim) of positions (B,); Vaswani et al. 2017, section 3.5.

    `dim` must be even.
    """
    half = dim // 2
    exponent = torch.arange(half, device=position.device, dtype=torch.float32) / half
    angle = position.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (B, half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def one_hot(label: Tensor | None, classes: int, count: int, device: torch.device) -> Tensor:
    """Labels (B,) as rows (B, classes) of zeros and a one; `classes` may be 0: (B, 0).

    Raises ValueError when there are classes and no label.
    """
    if label is None and classes:
        raise ValueError(f"this model draws one of {classes} classes: it needs a label")
    if label is None or not classes:
        return torch.zeros(count, 0, device=device)
    return (label[:, None] == torch.arange(classes, device=label.device)).float()


def halvings(size: int) -> tuple[int, int]:
    """How often to halve a side of `size` pixels to come to 4 to 7: (times, what is left).

    A size that does not halve evenly is rounded up: 28 -> (2, 7), 64 -> (4, 4), 36 -> (3, 5).
    Raises ValueError below 8 pixels.
    """
    if size < 8:
        raise ValueError(f"a side of {size} pixels is too short: this network needs at least 8")
    times = math.floor(math.log2(size / 4))
    return times, -(-size // 2**times)


def fold_norm(
    state: dict[str, Tensor], conv: str, norm: str, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Take a convolution and the batch norm after it out of `state`; return them as one.

    A batch norm that no longer learns is an affine map, so it merges into the weights and a bias:
    `w gamma / sqrt(var + eps)` and `beta - mean gamma / sqrt(var + eps)`, here in float64.

    Raises:
        KeyError: a key is not there.
    """
    variance = state.pop(f"{norm}.running_var").double()
    scale = state.pop(f"{norm}.weight") * torch.rsqrt(variance + epsilon)
    bias = state.pop(f"{norm}.bias") - state.pop(f"{norm}.running_mean") * scale
    return state.pop(f"{conv}.weight") * scale[:, None, None, None], bias
