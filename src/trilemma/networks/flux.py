"""FLUX.1: MM-DiT's blocks of two streams, then blocks of one, all with rotary positions.

Black Forest Labs 2024, "FLUX.1"; the only description is the network that its files fit. First come
the joint blocks of `mmdit`, with normalised queries and keys. Then words and patches are one
sequence with the same weights, and in each block attention and perceptron stand side by side, as in
Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", section 2:

    h = (1 + scale) norm(x) + shift,   x <- x + gate down([attend(h), gelu(up(h))])

Queries and keys are turned by the token's place (t, y, x): Su et al. 2021, "RoFormer: Enhanced
Transformer with Rotary Position Embedding", along three axes, of which each has its share of the
pairs of a head's dimensions. Words are at (0, 0, 0), the patch in row y and column x at (0, y, x).

The model "dev" is distilled from guided sampling: the guidance is a number that it is told as it is
told the time (Meng et al. 2023, "On Distillation of Guided Diffusion Models"). "schnell" is
distilled to one to four steps besides, and is told none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trilemma.networks.layers import (
    Embedded,
    Modulation,
    Reuse,
    attend,
    gelu,
    patchify,
    places,
    recomputed,
    scaled_norm,
    unpatchify,
)
from trilemma.networks.mmdit import (
    TIME_FEATURES,
    Attention,
    JointBlock,
    Perceptron,
    changed,
    joined,
    said,
    time_features,
)

LONGEST = 10_000.0


def turns(place: Tensor, dims: Sequence[int]) -> Tensor:
    """Return cosine and sine (2, N, D / 2), float32, of the angles at places (N, axes).

    Args:
        place: of each token, one number an axis.
        dims: how many of a head's D dimensions are for each axis; even numbers that sum to D.
    """
    angles = []
    for axis, dim in enumerate(dims):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles.append(place[:, axis, None].double() * LONGEST**-exponent)
    angle = torch.cat(angles, dim=1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the pairs (x_2i, x_2i+1) of queries or keys (B, heads, N, D), in float32."""
    cos, sin = turn
    a, b = x.unflatten(-1, (-1, 2)).float().unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, turn: Tensor | None) -> Tensor:
    assert turn is not None
    return attend(turned(q, turn), turned(k, turn), v)


class DoubleBlock(JointBlock):
    """MM-DiT's block, with queries and keys normalised, then turned."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, qk_norm=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, turn: Tensor | None) -> Tensor:
        """Return answers (B, heads, N, D)."""
        return _attend(q, k, v, turn)


class SingleBlock(nn.Module):
    """Attention and a perceptron side by side, over words and patches in one sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, width, 3)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, heads, qk_norm=True, answers=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, e: Tensor, turn: Tensor) -> Tensor:
        """Map x (B, N, width) to the same, told e (B, width) and `turn` (2, N, D / 2)."""
        shift, scale, gate = self.modulation(e)
        h = scaled_norm(self.norm, x, [shift, scale])
        answer = joined(_attend(*self.attention.ask(h), turn))
        return x + gate * self.down(torch.cat([answer, gelu(self.up(h))], dim=2))


class Flux(nn.Module):
    """The transformer of FLUX.1: `network(x, time, embedded, guidance)`; defaults are "dev".

    Args:
        channels: of x and of the output.
        patch: pixels of a token, patch x patch.
        width: of the tokens.
        depth: how many blocks of two streams.
        singles: how many blocks of one, after them.
        heads: of the attention.
        text_dim: of `embedded.tokens`.
        pooled_dim: of `embedded.vector`.
        axes: how many of a head's dimensions tell t, y and x.
        guided: whether the network is told a guidance.

    Raises:
        ValueError: heads that do not divide the width, or axes that do not sum to a head's share.
    """

    def __init__(
        self,
        channels: int = 16,
        patch: int = 2,
        width: int = 3072,
        depth: int = 19,
        singles: int = 38,
        heads: int = 24,
        text_dim: int = 4096,
        pooled_dim: int = 768,
        axes: Sequence[int] = (16, 56, 56),
        guided: bool = True,
    ) -> None:
        super().__init__()
        if width % heads or sum(axes) != width // heads or any(dim % 2 for dim in axes):
            raise ValueError(
                f"axes {list(axes)} must be even and sum to the {width} / {heads} dimensions of a "
                "head"
            )
        self.channels, self.patch, self.axes = channels, patch, tuple(axes)
        self.text_dim, self.pooled_dim, self.guided = text_dim, pooled_dim, guided
        self.enter = nn.Linear(channels * patch**2, width)
        self.time = Perceptron(TIME_FEATURES, width)
        self.guidance = Perceptron(TIME_FEATURES, width) if guided else None
        self.pooled = Perceptron(pooled_dim, width)
        self.text = nn.Linear(text_dim, width)
        self.doubles = nn.ModuleList(DoubleBlock(width, heads) for _ in range(depth))
        self.singles = nn.ModuleList(SingleBlock(width, heads) for _ in range(singles))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(width, width, 2)
        self.leave = nn.Linear(width, channels * patch**2)
        self.recompute = False
        """As in `MMDiT`."""

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        embedded: Embedded,
        guidance: Tensor | None = None,
        reuse: Reuse | None = None,
    ) -> Tensor:
        """Map latents x (B, C, H, W) at times (B,) in [0, 1] to noise - x_0, of the same shape.

        Args:
            x: x_t.
            time: t.
            embedded: the text, as one vector and as words.
            guidance: (B,), of a network that is told one; others are told None.
            reuse: of all blocks but the first and the last (`mmdit.changed`).

        Raises:
            ValueError: sides are no multiples of the patch, the text is missing or of another
                width, or a guidance is given or not against `guided`.
        """
        pooled, words = said(embedded, self.pooled_dim, self.text_dim)
        height, width = x.shape[-2:]
        h = self.enter(patchify(x, self.patch))  # (B, N, width)
        e = self.time(time_features(time)) + self.pooled(pooled)
        if (self.guidance is None) != (guidance is None):
            raise ValueError(
                "this network is told a guidance" if self.guided else "this network is told none"
            )
        if self.guidance is not None and guidance is not None:
            e = e + self.guidance(time_features(guidance))
        text = self.text(words)
        count = text.shape[1]
        turn = self._turns(count, height // self.patch, width // self.patch).to(h.device)
        first, *doubles = self.doubles
        *singles, last = self.singles

        def middle(h: Tensor, text: Tensor) -> Tensor:
            for block in doubles:
                h, text = recomputed(self.recompute, block, h, text, e, turn)
            h = torch.cat([text, h], dim=1)
            for block in singles:
                h = recomputed(self.recompute, block, h, e, turn)
            return h

        h, text = recomputed(self.recompute, first, h, text, e, turn)
        h = recomputed(self.recompute, last, changed(middle, h, text, reuse), e, turn)
        h = scaled_norm(self.norm, h[:, count:], self.modulation(e))
        return unpatchify(self.leave(h), self.patch, height, width)

    def _turns(self, words: int, height: int, width: int) -> Tensor:
        """Return the turns (2, words + height * width, D / 2) of all tokens."""
        place = torch.zeros(words + height * width, 3)
        place[words:, 1:] = places(height, width).float()
        return turns(place, self.axes)
