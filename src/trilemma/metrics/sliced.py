"""The sliced Wasserstein distance between two sets of features.

Rabin, Peyré, Delon, Bernot 2011, "Wasserstein Barycenter and its Application to Texture Mixing";
Bonneel, Rabin, Peyré, Pfister 2015, "Sliced and Radon Wasserstein Barycenters of Measures":

    SW_2^2 = E_theta int_0^1 (F_theta^-1(u) - G_theta^-1(u))^2 du

over directions theta on the unit sphere; F^-1 and G^-1 are the quantile functions of the features'
projections, which on a line solve the transport problem. It assumes no Gaussian.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 64  # directions; keeps memory flat


def sliced_wasserstein(a: Tensor, b: Tensor, *, directions: int = 512, seed: int = 0) -> float:
    """Return SW_2 of features (N, D) and (M, D), exact along each of the random directions."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(a.shape[1], directions, generator=generator)
    theta /= theta.norm(dim=0)
    # Both quantile functions are steps; between two neighbours of all their edges they are constant
    edges = torch.cat([torch.arange(1, len(x) + 1, dtype=torch.float64) / len(x) for x in (a, b)])
    edges = torch.cat([edges.new_zeros(1), edges.sort().values])
    width, middle = edges.diff(), (edges[1:] + edges[:-1]) / 2
    rank_a, rank_b = ((middle * len(x)).long().clamp(max=len(x) - 1) for x in (a, b))
    total = torch.zeros((), dtype=torch.float64)
    for part in theta.split(_AT_ONCE, dim=1):
        quantile_a = (a @ part).sort(dim=0).values[rank_a]
        quantile_b = (b @ part).sort(dim=0).values[rank_b]
        total += (width @ (quantile_a - quantile_b).double().square()).sum()
    return (total / directions).sqrt().item()
