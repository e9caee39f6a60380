"""LoRA: a trained layer learns by a product of two thin matrices beside its weight.

    W' = W + s B A,      W (out, in) held still, A (r, in), B (out, r), B = 0 at first

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3, with s for its
alpha / r. A convolution's weight (out, in, height, width) is the matrix (out, in height width).
W' stands where W stood, as a parametrization of the layer, so a network that reads its layers'
weights itself is served too, and a merged network computes what the parametrized one does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LAYERS = (nn.Linear, nn.Conv2d)


class LowRank(nn.Module):
    """Maps a weight W to W + scale B A; gives W itself at first.

    Args:
        weight: of the layer.
        rank: r.
        scale: s.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        bound = columns**-0.5  # as a linear layer of so many inputs begins
        self.down = nn.Parameter(weight.new_empty(rank, columns).uniform_(-bound, bound))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return W', in float32 under autocast too: it is a weight, not an activation."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.up @ self.down).view(weight.shape)


def named(name: str, targets: Sequence[str]) -> bool:
    """Whether a layer is one of `targets`: names, or parts of names, with `*` for any letters.

    `up` names the layers `network.up.0.expand` and `network.up`, not `network.upper`.
    """
    parts = name.split(".")
    runs = {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    return any(fnmatchcase(run, target) for run in runs for target in targets)


def fitting(model: nn.Module, rank: int, targets: Sequence[str] = ()) -> list[str]:
    """Return the names of the linear layers and convolutions that factors of a rank can serve.

    Those whose weight learns, is of `targets` if any are named, and is larger than its factors.
    """
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, LAYERS)
        and not parametrize.is_parametrized(layer)
        and layer.weight.requires_grad
        and (not targets or named(name, targets))
        and rank * sum(layer.weight.flatten(1).shape) < layer.weight.numel()
    ]


def attach(model: nn.Module, layers: Sequence[str], rank: int, scale: float = 1.0) -> None:
    """Give the named layers factors; their own weights are held still."""
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, LAYERS)
        layer.weight.requires_grad_(False)
        factors = LowRank(layer.weight, rank, scale)
        parametrize.register_parametrization(layer, "weight", factors)


def factors(model: nn.Module) -> Iterator[tuple[str, nn.Module, LowRank]]:
    """Yield each layer that has factors: its name, itself, and they."""
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS) and parametrize.is_parametrized(layer, "weight"):
            low_rank = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
            if isinstance(low_rank, LowRank):
                yield name, layer, low_rank


@torch.no_grad()
def merged(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state with W' for every W: that of a model without factors."""
    state = model.state_dict()
    for name, layer, _ in factors(model):
        for own in ("original", "0.down", "0.up"):
            del state[f"{name}.parametrizations.weight.{own}"]
        state[f"{name}.weight"] = layer.weight.detach()  # type: ignore[union-attr, operator]
    return state
