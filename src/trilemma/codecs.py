"""The space a model works in: `encode(image) -> x`, `decode(x) -> image`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Pixels(nn.Module):
    """Pictures as they are.

    Args:
        shape: (C, H, W) of the pictures.
    """

    bounds = (-1.0, 1.0)
    """Between which all of x lies; None where there is no such limit."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def encode(self, image: Tensor) -> Tensor:
        """Return the image (B, C, H, W)."""
        return image

    def decode(self, x: Tensor) -> Tensor:
        """Return x (B, C, H, W) as an image in [-1, 1]."""
        return x.clamp(-1, 1)
