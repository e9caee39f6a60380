"""Fewer tokens for an attention: those that are alike are averaged, and share its answer.

Bolya & Hoffman 2023, "Token Merging for Fast Stable Diffusion". Of each cell of 2 x 2 places one
stays, drawn once and for all. Of the other places, those most like one that stays (by the cosine)
are merged into it. Attention takes the square of the number of tokens: with half of them, a quarter
of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 0.75
"""Share of the places that can be merged into others: all but one of each cell."""


def merging(
    x: Tensor, size: Sequence[int], share: float
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return how to merge tokens (B, N, C) to (B, M, C), and how to spread M tokens over N places.

    Args:
        x: (B, N, C), by which places are alike.
        size: rows and columns; their product is N.
        share: of the places, that are merged into others; up to `MOST`.
    """
    stay, others = _cells(*size)
    count = min(round(share * x.shape[1]), len(others))  # of those merged
    unit = F.normalize(x, dim=2)
    alike, into = (unit[:, others] @ unit[:, stay].mT).max(2)  # (B, others)
    single = alike.argsort(1)[:, : len(others) - count]  # they stay for themselves
    numbers = len(stay) + torch.arange(single.shape[1], device=x.device)
    place = torch.empty(x.shape[:2], dtype=torch.long, device=x.device)
    place[:, stay] = torch.arange(len(stay), device=x.device)
    place[:, others] = into.scatter(1, single, numbers.expand_as(single))
    left = x.shape[1] - count  # M
    rows = (place + left * torch.arange(len(x), device=x.device)[:, None]).flatten()
    members = torch.bincount(rows, minlength=left * len(x))
    order, first = rows.argsort(), members.cumsum(0) - members

    def merged(tokens: Tensor) -> Tensor:
        mean = F.embedding_bag(order, tokens.flatten(0, 1), first, mode="mean")
        return mean.unflatten(0, (len(x), left))

    def spread(tokens: Tensor) -> Tensor:
        return tokens.flatten(0, 1)[rows].unflatten(0, x.shape[:2])

    return merged, spread


def _cells(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the place of each cell that stays, and all other places."""
    down, right = -(-rows // 2), -(-columns // 2)
    drawn = torch.randint(2, (2, down, right), generator=torch.Generator().manual_seed(0))
    row = (2 * torch.arange(down)[:, None] + drawn[0]).clamp(max=rows - 1)
    column = (2 * torch.arange(right) + drawn[1]).clamp(max=columns - 1)
    stay = (row * columns + column).flatten()
    others = torch.ones(rows * columns, dtype=torch.bool)
    others[stay] = False
    return stay, others.nonzero()[:, 0]
