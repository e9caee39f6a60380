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
