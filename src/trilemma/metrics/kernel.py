"""The kernel distance between two sets of features (KID on Inception features).

Bińkowski, Sutherland, Arbel, Gretton 2018, "Demystifying MMD GANs", section 4: the squared maximum
mean discrepancy under the kernel k(x, y) = (x . y / D + 1)^3, by its unbiased estimator (the
U-statistic, equation 4 of its appendix; Gretton et al. 2012, "A Kernel Two-Sample Test", eq. 3):

    1/(m(m-1)) sum_{i != j} [k(x_i, x_j) + k(y_i, y_j)] - 2/m^2 sum_{i, j} k(x_i, y_j)

It is a mean over random subsets of both sets; their spread tells how far to trust it. Unlike the
Fréchet distance it has no bias at small samples, and it can be below zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased squared discrepancy of two sets of the same size m, (m, D) each."""
    m, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        k = a @ b.T / dim + 1  # (m, m)
        return k * k * k

    within = sum(
        (k.sum(dtype=torch.float64) - k.diagonal().sum(dtype=torch.float64)) / (m * (m - 1))
        for k in (kernel(x, x), kernel(y, y))
    )
    return within - 2 * kernel(x, y).mean(dtype=torch.float64)


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = 50, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the mean and standard deviation over random subsets of features (N, D) and (M, D).

    Subsets hold `size` of each, or as many as there are of the fewer.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError("a kernel distance needs at least 2 samples on both sides")
    if size == len(a) == len(b):
        subsets = 1
    generator = torch.Generator().manual_seed(seed)
    values = torch.stack([mmd2(*(x[torch.randperm(len(x), generator=generator)[:size]]
                                 for x in (a, b))) for _ in range(subsets)])  # fmt: skip
    return values.mean().item(), values.std(correction=0).item()
