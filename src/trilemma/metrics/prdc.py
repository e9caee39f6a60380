"""Precision and recall, density and coverage: quality and variety apart.

Each set of images is taken as the union of balls around its features, B(x, r_k(x)), where r_k(x) is
the distance from x to its k-th nearest neighbour in the same set.

Kynkäänniemi, Karras, Laine, Lehtinen, Aila 2019, "Improved Precision and Recall Metric for
Assessing Generative Models", equations 1 and 2 (k = 3):

    precision = share of drawn images inside the real set's union
    recall    = share of real images inside the drawn set's union

Naeem, Oh, Uh, Choi, Yoo 2020, "Reliable Fidelity and Diversity Metrics for Generative Models",
equations 3 and 4 (k = 5), less moved by outliers and by the drawn set's own density:

    density  = 1/(k M) sum_j sum_i [drawn_j in B(real_i, r_k(real_i))], about 1 for equal sets
    coverage = share of real images with a drawn one in their own ball
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.metrics.neighbours import blocks, nearest


def precision_recall(real: Tensor, drawn: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall of features (N, D) and (M, D)."""
    real_radius = nearest(real, real, k, same=True)[1][:, -1]  # (N,)
    drawn_radius = nearest(drawn, drawn, k, same=True)[1][:, -1]  # (M,)
    precise = torch.zeros(len(drawn), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for part, distance in blocks(drawn, real):
        precise[part] = (distance <= real_radius).any(1)
        recalled |= (distance <= drawn_radius[part, None]).any(0)
    return precise.float().mean().item(), recalled.float().mean().item()


def density_coverage(real: Tensor, drawn: Tensor, *, k: int = 5) -> tuple[float, float]:
    """Return density and coverage of features (N, D) and (M, D)."""
    radius = nearest(real, real, k, same=True)[1][:, -1]  # (N,)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for _, distance in blocks(drawn, real):
        within = distance <= radius
        inside += int(within.sum())
        covered |= within.any(0)
    return inside / (k * len(drawn)), covered.float().mean().item()
