"""Nearest neighbours among features, and the alarm for memorised training images.

Distances are Euclidean, between all pairs, taken a block of rows at a time so that memory stays
flat however many images there are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_PAIRS = 2**23  # distances at a time: 32 MB


def blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of `a` (N, D) and their distances (rows, M) to all of `b` (M, D)."""
    rows = max(1, _PAIRS // len(b))
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b keeps more digits around the mean than far from it.
    center = b.mean(0)
    b = b - center
    square_b = b.square().sum(1)
    for start in range(0, len(a), rows):
        part = slice(start, min(start + rows, len(a)))
        x = a[part] - center
        square = torch.addmm(square_b, x, b.T, alpha=-2).add_(x.square().sum(1, keepdim=True))
        yield part, square.clamp_(min=0).sqrt_()


def nearest(a: Tensor, b: Tensor, k: int = 1, *, same: bool = False) -> tuple[Tensor, Tensor]:
    """Return the k nearest rows of `b` to each row of `a`, nearest first.

    Args:
        a: (N, D).
        b: (M, D).
        k: how many.
        same: `a` is `b`: no row is its own neighbour.

    Returns:
        Their indices (N, k), int64, and their distances (N, k).
    """
    if k > len(b) - same:
        raise ValueError(f"{k} neighbours asked for, among {len(b) - same}")
    index = torch.empty(len(a), k, dtype=torch.int64)
    distance = torch.empty(len(a), k)
    for part, block in blocks(a, b):
        if same:
            rows = torch.arange(part.start, part.stop)
            block[rows - part.start, rows] = torch.inf
        distance[part], index[part] = block.topk(k, dim=1, largest=False)
    return index, distance


def memorised(
    samples: Tensor, held_out: Tensor, training: Tensor, *, quantile: float = 0.05
) -> float:
    """Return the share of samples that lie nearer to a training image than held-out ones do.

    "Nearer" is below the given quantile of the held-out images' own distances to their nearest
    training image. So for unseen real images the share is the quantile itself; far above it the
    model copies. A model that draws only the commonest kind of picture rises above it too, for
    those have near neighbours everywhere: look at the pairs.

    Args:
        samples: features (N, D) of drawn images.
        held_out: features (M, D) of real images that were not trained on.
        training: features (T, D) of the training images.
        quantile: of the held-out distances.
    """
    usual = nearest(held_out, training)[1][:, 0]
    return (nearest(samples, training)[1][:, 0] < usual.quantile(quantile)).float().mean().item()
