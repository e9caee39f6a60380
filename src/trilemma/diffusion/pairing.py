"""Which noise goes with which picture of a batch, for paths that cross less.

Tong et al. 2024, "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal
Transport", section 3.2.3: noise and pictures of a batch are paired so that the sum of their squared
distances is least. Both keep their distributions, but the way from one to the other is straighter,
so that a flow needs fewer steps. Noise stays among pictures of one class: paired across classes, a
class would learn from a part of the noise only, while sampling gives it all.

Each picture's noise still comes from its own stream and is then handed round among those that are
in memory together. So the loss depends on who that is: with a batch spread over processes or
`accumulate`, pairs are found in each part, and are the better the larger the part.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def independent(noise: Tensor, x0: Tensor, label: Tensor | None = None) -> Tensor:
    """Return the noise as it came."""
    return noise


def optimal(noise: Tensor, x0: Tensor, label: Tensor | None = None) -> Tensor:
    """Return the noise (B, ...) in the order that brings it nearest to x0 (B, ...).

    Args:
        noise: (B, ...).
        x0: (B, ...).
        label: (B,) classes within which to pair; None pairs all with all.
    """
    cost = torch.cdist(x0.flatten(1).double(), noise.flatten(1).double()).square()
    if label is not None:
        never = cost.sum() + 1  # more than any pairing within the classes costs
        cost = torch.where(label[:, None] == label, cost, never)
    return noise[torch.as_tensor(assign(cost.cpu().numpy()), device=noise.device)]


def assign(cost: np.ndarray) -> np.ndarray:
    """Return the column of each row (N,) with which cost (N, N) sums to the least.

    By shortest augmenting paths, rows joining one by one: Crouse 2016, "On Implementing 2D
    Rectangular Assignment Algorithms", algorithm 1. At most N^3 operations.
    """
    n = len(cost)
    row_price, column_price = np.zeros(n), np.zeros(n)
    column_of, row_of = np.full(n, -1), np.full(n, -1)
    for new in range(n):
        distance, before = np.full(n, np.inf), np.full(n, -1)
        reached = np.zeros(n, dtype=bool)
        row, length = new, 0.0
        while True:  # Dijkstra's algorithm from the new row to the nearest free column
            through = length + cost[row] - row_price[row] - column_price
            nearer = ~reached & (through < distance)
            distance[nearer], before[nearer] = through[nearer], row
            column = int(np.where(reached, np.inf, distance).argmin())
            length, reached[column] = distance[column], True
            if row_of[column] < 0:
                break
            row = row_of[column]
        row_price[new] += length
        passed = np.flatnonzero(reached & (row_of >= 0))
        row_price[row_of[passed]] += length - distance[passed]
        column_price[passed] -= length - distance[passed]
        while True:  # along the path every row moves to the next column
            row = before[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
            if row == new:
                break
    return column_of


PAIRINGS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "independent": independent,
    "optimal": optimal,
}
"""Name -> (noise, x_0, label) -> noise in another order."""
