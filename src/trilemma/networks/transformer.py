"""A causal transformer over places on a grid, with a cache of keys and values.

Vaswani et al. 2017, "Attention Is All You Need", each position attending to itself and to those
before; normalised before each part rather than after (Xiong et al. 2020, "On Layer Normalization in
the Transformer Architecture"), each part's last layer zero at first. Queries and keys are turned by
angles that grow with their row in one half of their dimensions and with their column in the other,
so that a product depends on the distance, not on the place: Su et al. 2021, "RoFormer: Enhanced
Transformer with Rotary Position Embedding", equation 34, along two axes.

With a Cache a new position computes its own key and value and attends to those kept: a step costs
one position's layers, and a look at the positions before.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import attend, turned, turns


class Cache:
    """Keys and values of the positions seen.

    Args:
        capacity: how many positions there will be; memory is taken once, at the first call.

    Attributes:
        length: how many have been seen.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._kept: dict[nn.Module, Tensor] = {}

    def extend(self, layer: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values (B, heads, t, D) of a layer; return all of them so far."""
        batch, heads, count, dim = keys.shape
        if layer not in self._kept:
            self._kept[layer] = keys.new_empty(2, batch, heads, self.capacity, dim)
        kept, end = self._kept[layer], self.length + count
        kept[0, :, :, self.length : end] = keys
        kept[1, :, :, self.length : end] = values
        return kept[0, :, :, :end], kept[1, :, :, :end]


class Layer(nn.Module):
    """Self-attention and a perceptron, each on normalised input and around it a residual."""

    def __init__(self, width: int, heads: int, expand: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, expand * width)
        self.down = nn.Linear(expand * width, width)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, turn: Tensor, cache: Cache | None) -> Tensor:
        """Map (B, t, width) to the same shape; `turn` (2, t, D / 2) is as from `turns`."""
        batch, count, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, t, D) each
        q, k = turned(q, turn), turned(k, turn)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        causal = count == k.shape[2]  # else one position that attends to all before it
        h = attend(q, k, v, causal=causal)
        x = x + self.out(h.transpose(1, 2).reshape(batch, count, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CausalTransformer(nn.Module):
    """Maps a sequence to features, each from the positions up to its own.

    Args:
        width: of the features.
        layers: how many.
        heads: of the attention; width must be a multiple of 4 heads.
        expand: width of the perceptrons' inner layer, in widths.
    """

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4, expand: int = 4) -> None:
        super().__init__()
        if width % (4 * heads):
            raise ValueError(f"width {width} must be a multiple of 4 times the {heads} heads")
        self.width, self.heads = width, heads
        self.layers = nn.ModuleList(Layer(width, heads, expand) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, place: Tensor, cache: Cache | None = None) -> Tensor:
        """Map positions (B, t, width) at rows and columns (t, 2) to features (B, t, width).

        Args:
            x: the sequence.
            place: row and column of each position.
            cache: of the calls before, for the positions before; then x holds the next one only.
        """
        if cache is not None and cache.length and x.shape[1] != 1:
            raise ValueError(f"{x.shape[1]} positions were given to a cache in use; give the next")
        turn = turns(place, self.width // self.heads)
        for layer in self.layers:
            x = layer(x, turn, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)
