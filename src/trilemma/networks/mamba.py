"""A denoiser of state-space blocks over patches: time and memory grow linearly with their number.

Each block passes over the patches in some order and carries a state h along (Gu & Dao 2023, "Mamba:
Linear-Time Sequence Modeling with Selective State Spaces"). What is kept and what is taken in
depends on the patch itself, by a step size d_t, an input map b_t and an output map c_t:

    h_t = exp(-d_t a) h_{t-1} + d_t b_t x_t^T,    y_t = c_t h_t + s x_t

The decay a > 0 is one number for each head (Dao & Gu 2024, "Transformers are SSMs: Generalized
Models and Efficient Algorithms Through Structured State Space Duality"): then the recurrence can be
done in matrix products (`scan`). Pictures have no first patch, so

- every block passes over them twice, forth and back (Zhu et al. 2024, "Vision Mamba: Efficient
  Visual Representation Learning with Bidirectional State Space Model");
- the order differs from block to block (Hu et al. 2024, "ZigMa: A DiT-style Zigzag Mamba Diffusion
  Model", whose zigzag goes on to a neighbour at the end of each row);
- the convolution over the last few steps is one over the neighbours on the grid (Liu et al. 2024,
  "VMamba: Visual State Space Model").

Time and class shift, scale and gate each block as in DiT (adaLN-Zero).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import (
    Embedded,
    Modulation,
    TimeEmbedding,
    check_shape,
    patchify,
    scaled_norm,
    sincos,
    unpatchify,
)

CHUNK = 64  # steps that are done in one matrix product
FORGOTTEN = -20.0  # a logarithm: 2e-9 of a state is left
STEPS = (1e-3, 1e-1)  # range of d_t at first
ORDERS = ("rows", "columns", "zigzag", "rows-reversed", "columns-reversed", "zigzag-reversed")


def scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return y_t = c_t h_t of the recurrence h_t = exp(log_decay_t) h_{t-1} + b_t x_t^T, h_0 = 0.

    Dao & Gu 2024, section 6. The steps are cut into chunks. With l_t the sum of the logarithms from
    the beginning of a chunk up to t, and h the state before it,

        y_t = exp(l_t) c_t h + sum_{s <= t} exp(l_t - l_s) (c_t b_s) x_s

    which are matrix products for the whole chunk; only the states at the ends of chunks are made
    one after the other. All exponents are at most 0, so that nothing overflows. A step that leaves
    less than e^-20 of the state leaves that much: it keeps the sums small, whose differences are
    taken. Work and memory are linear in the number of steps.

    Args:
        x: inputs (B, N, H, P).
        log_decay: at most 0, (B, N, H).
        b: input maps (B, N, S).
        c: output maps (B, N, S).
        chunk: steps in a chunk.

    Returns:
        (B, N, H, P) in x's type.
    """
    batch, count, heads, dim = x.shape
    chunk = min(chunk, count)
    missing = -count % chunk  # steps of no input and no decay
    if missing:
        pad = (0, 0, 0, missing)
        x = F.pad(x, (0, 0, *pad))
        log_decay, b, c = (F.pad(m, pad) for m in (log_decay, b, c))
    x = x.unflatten(1, (-1, chunk)).transpose(2, 3)  # (B, K, H, Q, P)
    log = log_decay.unflatten(1, (-1, chunk)).transpose(2, 3)  # (B, K, H, Q)
    b, c = (m.unflatten(1, (-1, chunk)) for m in (b, c))  # (B, K, Q, S)

    log = log.clamp(min=FORGOTTEN).cumsum(-1)
    ahead = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    between = (log[..., :, None] - log[..., None, :]).to(x.dtype)  # in bfloat16 half the memory
    between = between.masked_fill_(ahead, -math.inf).exp_()
    y = (between * (c @ b.mT)[:, :, None]) @ x  # (B, K, H, Q, P)
    if count > chunk:
        whole = log[..., -1:]  # (B, K, H, 1)
        left = (whole - log).exp().to(x.dtype)[..., None]  # (B, K, H, Q, 1): of a step, at the end
        added = (b.mT[:, :, None] @ (left * x)).to(log.dtype)  # (B, K, H, S, P)
        kept = whole.exp()[..., None]
        state = torch.zeros_like(added[:, 0])
        before = []
        for more, rest in zip(added.unbind(1), kept.unbind(1), strict=True):
            before.append(state)
            state = torch.addcmul(more, rest, state)
        states = torch.stack(before, dim=1).to(x.dtype)
        y = y + log.exp().to(x.dtype)[..., None] * (c[:, :, None] @ states)
    return y.transpose(2, 3).flatten(1, 2)[:, :count]


def order(name: str, height: int, width: int) -> Tensor:
    """Return the patches (N,), counted row by row, in the order of a scan."""
    grid = torch.arange(height * width).view(height, width)
    if name.startswith("columns"):
        grid = grid.T
    if name.startswith("zigzag"):
        grid = grid.clone()
        grid[1::2] = grid[1::2].flip(1)
    path = grid.flatten()
    return path.flip(0) if name.endswith("reversed") else path


class Reorder(torch.autograd.Function):
    """Tokens (B, N, ...) in another order; backwards they are taken too, not added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: Tensor, inverse: Tensor) -> Tensor:
        """Return x[:, path]; `inverse` is the order that undoes it."""
        ctx.save_for_backward(path, inverse)
        return x.index_select(1, path)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Put the gradient back."""
        path, inverse = ctx.saved_tensors
        return Reorder.apply(gradient, inverse, path), None, None


class Block(nn.Module):
    """A scan of the patches in one order, forth and back.

    Args:
        width: of the tokens.
        expand: width inside the block, in widths.
        head_dim: channels of a head.
        state: rows S of a head's state.
    """

    def __init__(self, width: int, expand: int, head_dim: int, state: int) -> None:
        super().__init__()
        inner = expand * width
        self.state, self.heads = state, inner // head_dim
        self.enter = nn.Linear(width, 2 * inner)
        self.local = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.select = nn.Linear(inner, 2 * (2 * state + self.heads))  # b, c, d of both directions
        low, high = map(math.log, STEPS)
        step = torch.empty(2, self.heads).uniform_(low, high).exp()
        self.step = nn.Parameter(step.expm1().log())  # softplus makes it the step
        self.log_decay = nn.Parameter(torch.empty(2, self.heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(self.heads, 1))
        self.norm = nn.LayerNorm(inner)
        self.leave = nn.Linear(inner, width)

    def forward(self, x: Tensor, path: Tensor | None, height: int) -> Tensor:
        """Map (B, N, width), patches of `height` rows, to the same.

        `path` (N,) is the order; None, that in which they come.
        """
        x, gate = self.enter(x).chunk(2, dim=2)  # (B, N, inner) each
        grid = self.local(x.mT.unflatten(2, (height, -1)))
        x = F.silu(grid.flatten(2).mT)

        inverse = None if path is None else path.argsort()
        h = x if path is None else Reorder.apply(x, path, inverse)
        told = self.select(h).unflatten(2, (2, -1)).movedim(2, 0)  # (2, B, N, 2 S + H)
        told = torch.stack([told[0], told[1].flip(1)])
        b, c, step = told.split([self.state, self.state, self.heads], dim=-1)
        step = F.softplus(step.to(self.step.dtype) + self.step[:, None, None])  # (2, B, N, H)
        log_decay = -step * self.log_decay.exp()[:, None, None]
        h = h.unflatten(2, (self.heads, -1))
        taken = torch.stack([h, h.flip(1)]) * step.to(h.dtype)[..., None]
        y = scan(taken.flatten(0, 1), log_decay.flatten(0, 1), b.flatten(0, 1), c.flatten(0, 1))
        forth, back = y.chunk(2)
        y = torch.addcmul(forth + back.flip(1), self.skip.to(h.dtype), h).flatten(2)
        if path is not None:
            y = Reorder.apply(y, inverse, path)
        return self.leave(self.norm(y) * F.silu(gate))


class Mamba(nn.Module):
    """The denoising state-space network: `network(x, time, embedded)`.

    Args:
        in_channels: channels of x, plus those of `embedded.image` where one is given.
        out_channels: channels of the output.
        size: height and width of x; other sizes pass through too.
        patch: pixels of a token, patch x patch.
        width: of the sequence.
        depth: how many blocks.
        state: rows of a head's state.
        head_dim: channels of a head; `expand` times the width must be a multiple.
        expand: width inside the blocks, in widths.
        orders: of the scans, by turns over the blocks.
        embedding_dim: of the time's embedding and of `embedded.vector`; the width if None.
    """

    positions: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 32,
        patch: int = 2,
        width: int = 384,
        depth: int = 24,
        state: int = 64,
        head_dim: int = 64,
        expand: int = 2,
        orders: Sequence[str] = ("rows", "columns", "zigzag"),
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        for name in orders:
            if name not in ORDERS:
                raise ValueError(f"order '{name}' is not one of {', '.join(ORDERS)}")
        if expand * width % head_dim or width % 4:
            raise ValueError(
                f"{expand} times the width {width} must be a multiple of the {head_dim} channels "
                "of a head, and the width of 4"
            )
        self.size, self.patch, self.width, self.orders = size, patch, width, list(orders)
        self.embedding_dim = dim = embedding_dim or width
        positions = sincos(size // patch, size // patch, width)
        self.register_buffer("positions", positions, persistent=False)
        self.enter = nn.Linear(in_channels * patch**2, width)
        self.time = TimeEmbedding(dim)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.blocks = nn.ModuleList(Block(width, expand, head_dim, state) for _ in range(depth))
        self.modulation = Modulation(dim, width, 3 * depth + 2)
        self.leave = nn.Linear(width, out_channels * patch**2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, time: Tensor, embedded: Embedded | None = None) -> Tensor:
        """Map images x (B, C, H, W) at times (B,) in [0, 1] to (B, out_channels, H, W).

        Raises:
            ValueError: sides are no multiples of the patch, condition vectors are not of
                `embedding_dim`, or there are tokens, which it cannot read.
        """
        embedded = embedded or Embedded()
        if embedded.tokens is not None:
            raise ValueError(
                "this network reads a vector and no tokens; use networks.dit.DiT with "
                "conditioning in-context or cross-attention"
            )
        if embedded.image is not None:
            x = torch.cat([x, embedded.image], dim=1)
        height, width = x.shape[-2:]
        h = self.enter(patchify(x, self.patch))  # (B, N, width)
        rows, columns = height // self.patch, width // self.patch
        if (height, width) == (self.size, self.size):
            h = h + self.positions
        else:
            h = h + sincos(rows, columns, self.width).to(h.device)
        e = self.time(time)  # (B, D)
        if embedded.vector is not None:
            check_shape("condition vectors", embedded.vector, self.embedding_dim)
            e = e + embedded.vector
        told = self.modulation(e)
        paths: dict[str, Tensor | None] = {"rows": None}
        for name in set(self.orders) - paths.keys():
            paths[name] = order(name, rows, columns).to(h.device)
        for i, block in enumerate(self.blocks):
            shift, scale, gate = told[3 * i : 3 * i + 3]
            path = paths[self.orders[i % len(self.orders)]]
            h = h + gate * block(scaled_norm(self.norm, h, [shift, scale]), path, rows)
        h = self.leave(scaled_norm(self.norm, h, told[-2:]))
        return unpatchify(h, self.patch, height, width)
