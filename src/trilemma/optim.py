"""The optimizers that a recipe can name, each with its fused implementation where there is one.

Muon steps every matrix in the direction nearest to its gradient among those that change all
directions alike: with the momentum's singular value decomposition M = U S V^T, the step is U V^T.
Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", where five rounds of
an odd polynomial of X, which pulls the singular values to about 1, stand in for the decomposition:

    X <- 3.4445 X - 4.7750 (X X^T) X + 2.0315 (X X^T)^2 X

Steps are scaled by 0.2 sqrt(max(rows, columns)), so that a learning rate means about what it means
to Adam: Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trilemma import device

NARROWEST = 16  # a matrix with fewer rows or columns has no directions to even out
TABLE = 16_384  # a matrix of so many rows is a vocabulary, whose rows are each for themselves
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolution filters, AdamW for the rest.

    The rest are biases, gains, narrow matrices and the vectors of a vocabulary.

    A filter (out, in, height, width) is the matrix (out, height * width * in): the order of a
    filter's columns changes nothing, and this one is that of a channels-last filter in memory.

    Args:
        params: the parameters.
        lr: Muon's learning rate.
        adam_lr: AdamW's.
        momentum: share of the old gradients in Muon's moving average.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: share of a weight taken off each step, in units of its learning rate.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 5e-3,
        adam_lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        params = list(params)
        wide = [
            p
            for p in params
            if p.ndim > 1 and min(p.flatten(1).shape) >= NARROWEST and len(p) < TABLE
        ]
        chosen = {id(p) for p in wide}
        rest = [p for p in params if id(p) not in chosen]
        groups: list[dict[str, Any]] = [
            {"params": wide, "lr": lr, "kind": "muon", "momentum": momentum},
            {"params": rest, "lr": adam_lr, "kind": "adamw", "count": 0},
        ]
        defaults = {"weight_decay": weight_decay, "betas": tuple(betas), "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            if group["kind"] == "muon":
                self._step_muon(params, group["lr"], group["momentum"])
            else:
                self._step_adamw(params, group)

    def _step_muon(self, params: list[Tensor], lr: float, momentum: float) -> None:
        gradients = [p.grad for p in params if p.grad is not None]
        means = self._state(params, "mean")
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, means, momentum)  # Nesterov's
        alike: dict[torch.Size, list[int]] = {}
        for i, param in enumerate(params):
            alike.setdefault(param.shape, []).append(i)
        for shape, where in alike.items():
            matrices = torch.stack([ahead[i].movedim(1, -1).flatten(1) for i in where])
            scale = -lr * 0.2 * max(matrices.shape[1:]) ** 0.5
            updates = orthogonal(matrices).view(-1, shape[0], *shape[2:], shape[1]).movedim(-1, 2)
            torch._foreach_add_([params[i] for i in where], list(updates), alpha=scale)

    def _step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, betas, eps = group["lr"], group["betas"], group["eps"]
        group["count"] += 1
        gradients = [p.grad for p in params if p.grad is not None]
        means, squares = self._state(params, "mean"), self._state(params, "square")
        torch._foreach_lerp_(means, gradients, 1 - betas[0])
        torch._foreach_mul_(squares, betas[1])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - betas[1])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - betas[1] ** group["count"]) ** 0.5)
        torch._foreach_add_(roots, eps)
        torch._foreach_addcdiv_(params, means, roots, -lr / (1 - betas[0] ** group["count"]))

    def _state(self, params: list[Tensor], name: str) -> list[Tensor]:
        return [self.state[p].setdefault(name, torch.zeros_like(p)) for p in params]


def orthogonal(matrices: Tensor) -> Tensor:
    """Return about U V^T of matrices (..., rows, columns) = U S V^T, in their type.

    Singular values come out between about 0.7 and 1.2. Computed in bfloat16 where that is faster.
    """
    a, b, c = POLYNOMIAL
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)).to(device.dtype("auto", x.device))
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype).contiguous()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "muon": Muon,
    "rmsprop": torch.optim.RMSprop,
}
