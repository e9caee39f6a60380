"""DiT: a transformer over patches that removes noise.

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers". A picture is cut into patches,
each becomes a token, and blocks of self-attention and a perceptron follow. The paper compares four
ways to tell the blocks the time t and the condition c (section 3.2, figure 3):

- in-context: t and c are further tokens of the sequence, taken off at its end;
- cross-attention: each block also attends to the sequence of t and c;
- adaln: each normalisation is shifted and scaled by what a linear layer makes of e = e(t) + c:
      x <- x + f((1 + scale) norm(x) + shift);
- adaln-zero: the same, and what each part adds is gated by e, by 0 at first:
      x <- x + gate f((1 + scale) norm(x) + shift).

For words a fifth: adaln-cross, adaln-zero for t and the caption as a whole, and cross-attention to
its tokens, which adds nothing at first: Chen et al. 2023, "PixArt-alpha: Fast Training of Diffusion
Transformer for Photorealistic Text-to-Image Synthesis", section 2.3.

Shifts, scales and gates of all blocks are made by one matrix product. The sizes of the paper, of
32 x 32 x 4 latents with two outputs a channel; operations are multiply-adds for one picture:

    | size | depth | width | heads | parameters, patch 2 | GFLOPs, patch 2 |   4  |   8  |
    |------|-------|-------|-------|---------------------|-----------------|------|------|
    | S    | 12    | 384   | 6     | 33 M                | 6.06            | 1.41 | 0.36 |
    | B    | 12    | 768   | 12    | 130 M               | 23.0            | 5.56 | 1.42 |
    | L    | 24    | 1024  | 16    | 458 M               | 80.7            | 19.7 | 5.01 |
    | XL   | 28    | 1152  | 16    | 675 M               | 118.6           | 29.1 | 7.39 |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import (
    CrossAttention,
    Embedded,
    Modulation,
    TimeEmbedding,
    attend,
    check_shape,
    gelu,
    patchify,
    places,
    scaled_norm,
    sincos,
    turned,
    turns,
    unpatchify,
)

# What each conditioning asks of a block: does it attend to a sequence of conditions, and how many
# vectors change it (shift and scale, and a gate, of each of its two parts).
CONDITIONINGS = {
    "in-context": (False, 0),
    "cross-attention": (True, 0),
    "adaln": (False, 4),
    "adaln-zero": (False, 6),
    "adaln-cross": (True, 6),
}
POSITIONS = ("sincos", "rotary")


class Attention(nn.Module):
    """Self-attention with several heads.

    `qk_norm` normalises each query and key, so that their products cannot grow without bound:
    Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", section 2.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        dim = width // heads
        self.norm_q = nn.LayerNorm(dim, bias=False) if qk_norm else None
        self.norm_k = nn.LayerNorm(dim, bias=False) if qk_norm else None

    def forward(self, x: Tensor, turn: Tensor | None, mask: Tensor | None) -> Tensor:
        """Map (B, N, width) to the same.

        `turn` (2, N, D / 2) turns queries and keys; where mask (B, N) is false nobody looks.
        """
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D) each
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        if turn is not None:
            q, k = turned(q, turn), turned(k, turn)
        seen = None if mask is None else mask[:, None, None]  # (B, 1, 1, N)
        return self.out(attend(q, k, v, seen).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, attention to conditions where there are any, and a perceptron.

    The normalisations have weights of their own where the condition gives them none.
    """

    def __init__(
        self, width: int, dim: int, heads: int, expand: int, conditioning: str, qk_norm: bool
    ) -> None:
        super().__init__()
        crosses, parts = CONDITIONINGS[conditioning]
        own = not parts
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=own)
        self.attention = Attention(width, heads, qk_norm)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6) if crosses else None
        self.cross = CrossAttention(width, dim, heads) if crosses else None
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=own)
        self.up = nn.Linear(width, expand * width)
        self.down = nn.Linear(expand * width, width)

    def forward(
        self,
        x: Tensor,
        told: list[Tensor],
        tokens: Tensor | None,
        turn: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Map (B, N, width) to the same.

        Args:
            x: the sequence.
            told: shift and scale of each part, then gates of each part: (B, 1, width), or none.
            tokens: (B, T, D) to attend to, where the block does.
            turn: (2, N, D / 2) by the positions, where queries and keys are turned.
            mask: which tokens are seen (B, T), or, in a block with none to attend to, which
                places of the sequence (B, N); all if None.
        """
        within, beside = (mask, None) if self.cross is None else (None, mask)
        gates: Sequence[Tensor | None] = told[4:] or (None, None)
        h = self.attention(scaled_norm(self.norm1, x, told[:2]), turn, within)
        x = _add(x, gates[0], h)
        if self.cross is not None and self.norm_cross is not None:
            x = x + self.cross(self.norm_cross(x), tokens, beside)
        h = gelu(self.up(scaled_norm(self.norm2, x, told[2:4])))
        return _add(x, gates[1], self.down(h))


def _add(x: Tensor, gate: Tensor | None, h: Tensor) -> Tensor:
    return x + h if gate is None else x + gate * h


class DiT(nn.Module):
    """The denoising transformer: `network(x, time, embedded)`; the defaults are DiT-S/2.

    Args:
        in_channels: channels of x, plus those of `embedded.image` where one is given.
        out_channels: channels of the output.
        size: height and width of x; other sizes pass through too.
        patch: pixels of a token, patch x patch.
        width: of the sequence.
        depth: how many blocks.
        heads: of the attention.
        conditioning: in-context, cross-attention, adaln, adaln-zero or adaln-cross; tokens can be
            read by the first two, and the last needs some.
        positions: sincos, added to the tokens; or rotary, turning queries and keys.
        qk_norm: whether queries and keys are normalised.
        expand: width of the perceptrons' inner layer, in widths.
        embedding_dim: of the time's embedding, `embedded.vector` and `embedded.tokens`; the width
            if None.
        inclusive: the slowest of the time's sines has frequency 1 / 10,000, as in diffusers' DiT;
            in the paper's that would be the next one.
    """

    positions: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 32,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        conditioning: str = "adaln-zero",
        positions: str = "sincos",
        qk_norm: bool = False,
        expand: int = 4,
        embedding_dim: int | None = None,
        inclusive: bool = False,
    ) -> None:
        super().__init__()
        for what, said, known in (
            ("conditioning", conditioning, CONDITIONINGS),
            ("positions", positions, POSITIONS),
        ):
            if said not in known:
                raise ValueError(f"{what} '{said}' is not one of {', '.join(known)}")
        if width % (4 * heads):
            raise ValueError(f"width {width} must be a multiple of 4 times the {heads} heads")
        self.size, self.patch, self.width, self.heads = size, patch, width, heads
        self.embedding_dim = dim = embedding_dim or width
        self.conditioning, self.rotary = conditioning, positions == "rotary"
        self.register_buffer("positions", self._positions(size, size), persistent=False)
        self.enter = nn.Linear(in_channels * patch**2, width)
        half = TimeEmbedding.FEATURES // 2
        self.time = TimeEmbedding(dim, 10_000.0 ** (half / (half - 1)) if inclusive else 10_000.0)
        self.blocks = nn.ModuleList(
            Block(width, dim, heads, expand, conditioning, qk_norm) for _ in range(depth)
        )
        joins = conditioning == "in-context" and dim != width
        self.join: nn.Module = nn.Linear(dim, width) if joins else nn.Identity()
        self.crosses, self.parts = CONDITIONINGS[conditioning]
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=not self.parts)
        self.leave = nn.Linear(width, out_channels * patch**2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.leave.weight)
        if self.crosses and self.parts:
            for module in self.modules():
                if isinstance(module, CrossAttention):
                    nn.init.zeros_(module.out.weight)
        self.modulation = Modulation(dim, width, depth * self.parts + 2) if self.parts else None

    def _positions(self, height: int, width: int) -> Tensor:
        """Return what is added to the tokens (N, width), or the turns of the heads (2, N, D/2)."""
        h, w = height // self.patch, width // self.patch
        if self.rotary:
            return turns(places(h, w), self.width // self.heads)
        return sincos(h, w, self.width)

    def forward(self, x: Tensor, time: Tensor, embedded: Embedded | None = None) -> Tensor:
        """Map images x (B, C, H, W) at times (B,) in [0, 1] to (B, out_channels, H, W).

        Raises:
            ValueError: sides are no multiples of the patch, condition vectors are not of
                `embedding_dim`, there are tokens and an adaLN that cannot read any, or none for
                adaln-cross.
        """
        embedded = embedded or Embedded()
        if embedded.image is not None:
            x = torch.cat([x, embedded.image], dim=1)
        height, width = x.shape[-2:]
        h = self.enter(patchify(x, self.patch))  # (B, N, width)
        positions = self.positions
        if (height, width) != (self.size, self.size):
            positions = self._positions(height, width).to(h.device)
        if not self.rotary:
            h = h + positions
        turn = positions if self.rotary else None

        said = [self.time(time)]  # of (B, D)
        if embedded.vector is not None:
            check_shape("condition vectors", embedded.vector, self.embedding_dim)
            said.append(embedded.vector)
        if self.modulation is not None:
            if (embedded.tokens is not None) != self.crosses:
                wants = (
                    "tokens, and there are none; use adaln-zero for labels"
                    if self.crosses
                    else "a vector and no tokens; use in-context, cross-attention or adaln-cross"
                )
                raise ValueError(f"conditioning {self.conditioning} reads {wants}")
            h = self._modulated(h, sum(said[1:], said[0]), turn, embedded)
        else:
            tokens, mask = torch.stack(said, dim=1), None  # (B, T, D)
            if embedded.tokens is not None:
                if embedded.mask is not None:
                    mask = F.pad(embedded.mask, (tokens.shape[1], 0), value=True)
                tokens = torch.cat([tokens, embedded.tokens.to(tokens.dtype)], dim=1)
            h = self._beside(h, tokens, turn, mask)
        return unpatchify(self.leave(h), self.patch, height, width)

    def _modulated(self, h: Tensor, e: Tensor, turn: Tensor | None, embedded: Embedded) -> Tensor:
        """Pass the sequence through blocks that are told e (B, D) by shifts and scales."""
        assert self.modulation is not None
        told = self.modulation(e)
        for i, block in enumerate(self.blocks):
            own = told[self.parts * i : self.parts * (i + 1)]
            h = block(h, own, embedded.tokens, turn, embedded.mask)
        return scaled_norm(self.norm, h, told[-2:])

    def _beside(
        self, h: Tensor, tokens: Tensor, turn: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Pass the sequence through blocks that see conditions (B, T, D) beside it.

        In the sequence itself they come first and have no position: they are not turned.
        """
        count = tokens.shape[1] if self.conditioning == "in-context" else 0
        if count:
            if mask is not None:
                mask = F.pad(mask, (0, h.shape[1]), value=True)
            h = torch.cat([self.join(tokens).to(h.dtype), h], dim=1)
            if turn is not None:
                still = torch.stack([turn.new_ones(1), turn.new_zeros(1)])[..., None]
                turn = torch.cat([still.expand(2, count, turn.shape[2]), turn], dim=1)
        for block in self.blocks:
            h = block(h, [], tokens, turn, mask)
        return self.norm(h[:, count:])
