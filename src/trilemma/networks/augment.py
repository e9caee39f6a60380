"""Differentiable augmentation: a critic that sees few pictures only changed cannot learn them.

Zhao, Liu, Lin, Zhu, Han (2020), "Differentiable Augmentation for Data-Efficient GAN Training",
section 3: real and drawn images pass through the same random T before the critic sees them, in both
players' losses, and gradients pass through T back to the generator. So the generator learns the
data and not the augmented data, as long as T can be undone in distribution. Colour, translation and
cutout are the paper's strongest policy, in this order:

    brightness    x + b,                        b ~ U(-1/2, 1/2)
    saturation    m + s (x - m),                s ~ U(0, 2),      m the mean over channels
    contrast      m + c (x - m),                c ~ U(1/2, 3/2),  m the mean over the image
    translation   by up to 1/8 of each side, empty ground 0
    cutout        a square of half of each side is 0, its centre anywhere
"""

from __future__ import annotations

import torch
from torch import Tensor

DRAWN = 7
"""Numbers in (0, 1) that one image's augmentation is drawn from."""


def augment(image: Tensor, drawn: Tensor) -> Tensor:
    """Change each image by its own numbers.

    Args:
        image: (B, C, H, W) in [-1, 1].
        drawn: (B, DRAWN), uniform in (0, 1).

    Returns:
        (B, C, H, W), float32; brightness and contrast may leave [-1, 1].
    """
    x, height, width = image.float(), image.shape[2], image.shape[3]
    b, s, c, down, right, top, left = drawn[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1) each
    x = x + (b - 0.5)
    mean = x.mean(1, keepdim=True)
    x = mean + 2 * s * (x - mean)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (c + 0.5) * (x - mean)
    x = _shift(_shift(x, down, 2), right, 3)
    cut = _inside(top, height, x).unsqueeze(3) & _inside(left, width, x).unsqueeze(2)  # (B,1,H,W)
    return x.masked_fill(cut, 0.0)


def _shift(x: Tensor, share: Tensor, axis: int) -> Tensor:
    """Move x along an axis by up to an eighth of it, as `share` (B, 1, 1, 1) says; 0 moves in."""
    size = x.shape[axis]
    reach = (size + 4) // 8
    offset = (share.flatten() * (2 * reach + 1)).long() - reach  # (B,)
    source = torch.arange(size, device=x.device) - offset[:, None]  # (B, size)
    view = (len(x), 1, size, 1) if axis == 2 else (len(x), 1, 1, size)
    moved = x.gather(axis, source.clamp(0, size - 1).view(view).expand_as(x))
    return moved.masked_fill(((source < 0) | (source >= size)).view(view), 0.0)


def _inside(share: Tensor, size: int, x: Tensor) -> Tensor:
    """Say (B, 1, size) which places lie within a quarter of `size` of the one at `share`."""
    centre = (share.flatten() * size).long()[:, None, None]
    distance = torch.arange(size, device=x.device) - centre
    return (distance >= -(size // 4)) & (distance < (size + 1) // 4)
