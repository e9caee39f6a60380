"""Score matching without noise: the reference objectives, for data of few dimensions.

The score s(x) = grad log p(x) is learned from samples x of p alone.

- exact: Hyvärinen 2005, "Estimation of Non-Normalized Statistical Models by Score Matching",
  theorem 1: E[tr ds/dx + |s|^2 / 2], one backward pass for each dimension.
- sliced: Song, Garg, Shi, Ermon 2019, "Sliced Score Matching", eq. 8: the trace by random
  directions v of unit covariance, E[v^T ds/dx v + |s|^2 / 2], one pass whatever the dimensions.
- denoising: Vincent 2011, "A Connection Between Score Matching and Denoising Autoencoders", eq. 11:
  of x + sigma noise the score is E[-noise / sigma], learned without any derivative. It is the one
  that grows to pictures: `models.diffusion`, with the noise target at all sigmas.

Each is the mean of |s - grad log p|^2 / 2 but for a constant that does not depend on s; of
denoising, p is that of the noisy data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trilemma.batch import Rng

Score = Callable[[Tensor], Tensor]
"""x (B, D) -> s (B, D)."""


def exact(score: Score, x: Tensor) -> Tensor:
    """Return the objective (B,) at x (B, D), to be averaged and lowered."""
    x = x.detach().requires_grad_()
    s = score(x)
    columns = [
        torch.autograd.grad(s[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])
    ]
    return torch.stack(columns).sum(0) + s.square().sum(1) / 2


def sliced(score: Score, x: Tensor, rng: Rng) -> Tensor:
    """Return the objective (B,) at x (B, D) in one random direction of signs for each."""
    x = x.detach().requires_grad_()
    v = (rng.integers(2, x.shape[1]) * 2 - 1).to(x.dtype)
    s = score(x)
    (product,) = torch.autograd.grad((s * v).sum(), x, create_graph=True)
    return (product * v).sum(1) + s.square().sum(1) / 2


def denoising(score: Score, x: Tensor, sigma: float, rng: Rng) -> Tensor:
    """Return the objective (B,) at x (B, D) with noise of deviation sigma added."""
    noise = rng.normal(x.shape[1]).to(x.dtype)
    return (score(x + sigma * noise) + noise / sigma).square().sum(1) / 2
