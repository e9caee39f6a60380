"""MM-DiT: a transformer in which words and patches are two streams that attend together.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"
(Stable Diffusion 3), section 4 and figure 2. Each stream has weights of its own: shifts, scales and
gates made of the time and of the text as one vector (adaLN-zero), queries, keys and values, and a
perceptron. Only the attention is one, over the tokens of both:

    x <- x + gate out(attend(q, k, v))
    x <- x + gate' down(gelu(up((1 + scale') norm(x) + shift')))

The stream of words ends with the last attention: nothing reads it after that. Positions are sines
and cosines of a table wider than any picture trained on, of which the middle is cut out, so that a
picture's middle has the same position whatever its format (their section 5.3.2).

Stable Diffusion 3.5 normalises queries and keys by their root mean square, and its medium size lets
the patches of the first blocks attend to each other once more beside the attention of both.

    | model      | depth | width | heads | QK norm | attends twice | table | parameters |
    |------------|-------|-------|-------|---------|---------------|-------|------------|
    | 3 medium   | 24    | 1536  | 24    | no      | -             | 192   | 2.0 B      |
    | 3.5 medium | 24    | 1536  | 24    | yes     | blocks 0-12   | 384   | 2.2 B      |
    | 3.5 large  | 38    | 2432  | 38    | yes     | -             | 192   | 8.1 B      |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import (
    Embedded,
    Modulation,
    Reuse,
    attend,
    check_shape,
    gelu,
    recomputed,
    scaled_norm,
    sincos,
    sinusoidal,
)

TIME_FEATURES = 256


class Perceptron(nn.Module):
    """Two layers that make of a time's features, or of a text's vector, one of the width."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(features, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, features) to (B, width)."""
        return self.down(F.silu(self.up(x.to(self.up.weight.dtype))))


def time_features(time: Tensor) -> Tensor:
    """Return sines and cosines (B, 256) of a time in [0, 1], or of any number, in thousandths."""
    return sinusoidal(1000 * time, TIME_FEATURES)


class Attention(nn.Module):
    """Queries, keys and values of one stream, and what is made of the answers.

    Args:
        width: of the stream.
        heads: of the attention.
        qk_norm: whether queries and keys are divided by their root mean square.
        answers: whether there is a layer for the answers; else they are used as they are, or not.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, answers: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        dim = width // heads
        self.norm_q = nn.RMSNorm(dim, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(dim, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width) if answers else nn.Identity()

    def ask(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, heads, N, D) of x (B, N, width)."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype), v

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, width) to the same: the attention of one stream to itself."""
        return self.out(joined(attend(*self.ask(x))))


def joined(heads: Tensor) -> Tensor:
    """Put answers (B, heads, N, D) beside each other: (B, N, heads D)."""
    return heads.transpose(1, 2).flatten(2)


class Stream(nn.Module):
    """One stream's part of a block: what it asks, and what it does with the answer.

    Args:
        width: of the stream.
        heads: of the attention.
        qk_norm: whether queries and keys are normalised.
        twice: whether it also attends to itself alone.
        last: whether it ends with this block's attention.
    """

    def __init__(
        self, width: int, heads: int, qk_norm: bool, twice: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        self.modulation = Modulation(width, width, 2 if last else 9 if twice else 6)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, heads, qk_norm, answers=not last)
        self.alone = Attention(width, heads, qk_norm) if twice else None
        self.last = last
        if not last:
            self.up = nn.Linear(width, 4 * width)
            self.down = nn.Linear(4 * width, width)

    def ask(self, x: Tensor, told: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of x (B, N, width), told as `modulation` makes it."""
        return self.attention.ask(scaled_norm(self.norm, x, told[:2]))

    def take(self, x: Tensor, answer: Tensor, told: list[Tensor]) -> Tensor:
        """Map x and the answers (B, N, width) to the stream of the next block."""
        gate, shift, scale, gate_up = told[2:6]
        alone = None
        if self.alone is not None:
            alone = told[8] * self.alone(scaled_norm(self.norm, x, told[6:8]))
        x = x + gate * self.attention.out(answer)
        if alone is not None:
            x = x + alone
        return x + gate_up * self.down(gelu(self.up(scaled_norm(self.norm, x, [shift, scale]))))


class JointBlock(nn.Module):
    """Two streams, and the attention over both.

    Arguments are those of `Stream`; `twice` is of the patches, `last` of the words.
    """

    def __init__(
        self, width: int, heads: int, qk_norm: bool, twice: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        self.image = Stream(width, heads, qk_norm, twice=twice)
        self.text = Stream(width, heads, qk_norm, last=last)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, turn: Tensor | None) -> Tensor:
        """Return answers (B, heads, N, D); `turn` is for blocks that turn queries and keys."""
        return attend(q, k, v)

    def forward(
        self, x: Tensor, text: Tensor, e: Tensor, turn: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map patches x (B, N, width) and words (B, T, width) to the same.

        Args:
            x: the patches.
            text: the words; they come back as they were from the last block.
            e: (B, width) of the time and the text.
            turn: as in `attend`, words before patches.
        """
        told, told_text = self.image.modulation(e), self.text.modulation(e)
        both = zip(self.text.ask(text, told_text), self.image.ask(x, told), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in both)
        answer = joined(self.attend(q, k, v, turn))
        count = text.shape[1]
        x = self.image.take(x, answer[:, count:], told)
        if not self.text.last:
            text = self.text.take(text, answer[:, :count], told_text)
        return x, text


class MMDiT(nn.Module):
    """The transformer of Stable Diffusion 3: `network(x, time, embedded)`; defaults are 3 medium.

    Args:
        channels: of x and of the output.
        patch: pixels of a token, patch x patch.
        width: of both streams.
        depth: how many blocks.
        heads: of the attention.
        text_dim: of `embedded.tokens`.
        pooled_dim: of `embedded.vector`.
        table: rows and columns of the table of positions, in patches.
        size: height and width of x trained on, which the table's sines count as `size / patch`.
        qk_norm: whether queries and keys are normalised.
        twice: the blocks whose patches attend once more to each other.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    positions: Tensor

    def __init__(
        self,
        channels: int = 16,
        patch: int = 2,
        width: int = 1536,
        depth: int = 24,
        heads: int = 24,
        text_dim: int = 4096,
        pooled_dim: int = 2048,
        table: int = 192,
        size: int = 128,
        qk_norm: bool = False,
        twice: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if width % (4 * heads):
            raise ValueError(f"width {width} must be a multiple of 4 times the {heads} heads")
        self.channels, self.patch, self.table = channels, patch, table
        self.text_dim, self.pooled_dim = text_dim, pooled_dim
        self.enter = nn.Conv2d(channels, width, patch, stride=patch)
        positions = sincos(table, table, width, apart=size // patch / table)
        self.register_buffer("positions", positions[None])  # (1, table^2, width), as in checkpoints
        self.time = Perceptron(TIME_FEATURES, width)
        self.pooled = Perceptron(pooled_dim, width)
        self.text = nn.Linear(text_dim, width)
        self.blocks = nn.ModuleList(
            JointBlock(width, heads, qk_norm, twice=i in twice, last=i == depth - 1)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = Modulation(width, width, 2)
        self.leave = nn.Linear(width, patch**2 * channels)
        self.recompute = False
        """Whether training keeps a block's input alone and computes the block again backwards."""

    def _positions(self, height: int, width: int) -> Tensor:
        """Return the middle of the table (1, height * width, D), for so many patches."""
        if max(height, width) > self.table:
            raise ValueError(
                f"{height}x{width} patches are more than this model knows positions of, "
                f"{self.table}x{self.table}; draw a smaller picture"
            )
        top, left = (self.table - height) // 2, (self.table - width) // 2
        table = self.positions.unflatten(1, (self.table, self.table))
        return table[:, top : top + height, left : left + width].flatten(1, 2)

    def forward(
        self, x: Tensor, time: Tensor, embedded: Embedded, reuse: Reuse | None = None
    ) -> Tensor:
        """Map latents x (B, C, H, W) at times (B,) in [0, 1] to noise - x_0, of the same shape.

        Args:
            x: x_t.
            time: t.
            embedded: the text, as one vector and as words.
            reuse: of all blocks but the first and the last (`changed`).

        Raises:
            ValueError: sides are no multiples of the patch or longer than the table of positions,
                or words or vectors are missing or of another width.
        """
        pooled, words = said(embedded, self.pooled_dim, self.text_dim)
        height, width = (side // self.patch for side in x.shape[-2:])
        if (height * self.patch, width * self.patch) != tuple(x.shape[-2:]):
            raise ValueError(
                f"latents of {x.shape[-2]}x{x.shape[-1]} cannot be cut into patches: sizes must be "
                f"multiples of {self.patch}"
            )
        h = self.enter(x).flatten(2).mT  # (B, N, width)
        h = h + self._positions(height, width).to(h.dtype)
        e = self.time(time_features(time)) + self.pooled(pooled)
        text = self.text(words)
        first, *rest = self.blocks
        last = rest[-1:]

        def middle(h: Tensor, text: Tensor) -> Tensor:
            for block in rest[:-1]:
                h, text = recomputed(self.recompute, block, h, text, e)
            return torch.cat([text, h], dim=1)

        h, text = recomputed(self.recompute, first, h, text, e)
        joint = changed(middle, h, text, reuse)
        text, h = joint.split([text.shape[1], h.shape[1]], dim=1)
        for block in last:
            h, text = recomputed(self.recompute, block, h, text, e)
        h = self.leave(scaled_norm(self.norm, h, self.modulation(e)))
        h = h.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (height, width))
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, h, p, w, q) -> image


def changed(
    middle: Callable[[Tensor, Tensor], Tensor], x: Tensor, text: Tensor, reuse: Reuse | None
) -> Tensor:
    """Return what blocks in the middle make of patches x and words: (B, T + N, width).

    With `reuse`, what they add is that of an earlier call: Chen et al. 2024, "Delta-DiT: A
    Training-Free Acceleration Method Tailored for Diffusion Transformers".
    """
    if reuse is None:
        return middle(x, text)
    joint = torch.cat([text, x], dim=1)
    return joint + reuse(lambda: middle(x, text) - joint, len(x))


def said(embedded: Embedded, pooled_dim: int, text_dim: int) -> tuple[Tensor, Tensor]:
    """Return the text as one vector (B, pooled_dim) and as words (B, T, text_dim).

    Raises ValueError when either is missing or of another width.
    """
    if embedded.vector is None or embedded.tokens is None:
        raise ValueError("this network reads a text: give embedded.vector and embedded.tokens")
    check_shape("text vectors", embedded.vector, pooled_dim)
    check_shape("words", embedded.tokens, embedded.tokens.shape[1], text_dim)
    return embedded.vector, embedded.tokens
