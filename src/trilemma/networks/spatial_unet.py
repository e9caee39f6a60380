"""The U-Net of Stable Diffusion 1, 2 and XL: residual blocks and transformers that read a text.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; Podell et al.
2024, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis".

At each of the sizes stand `blocks` residual blocks, one more on the way up, each followed by a
spatial transformer where there is one: self-attention over all places, attention on the text's
tokens, a gated perceptron. Versions differ in widths, in where transformers stand and how deep they
are, in their heads, and in a vector that XL adds to the time embedding: of the whole text, and of
the picture's size and crop.

Weights have the names that they have in the unet/ of a diffusers folder, so that such files fit as
they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import Embedded, GroupNorm, Reuse, attend, recomputed, sinusoidal
from trilemma.networks.token_merging import merging

SHALLOW = 2
"""So many blocks at either end are computed at each call, where the rest is reused."""


def normed(norm: GroupNorm, x: Tensor) -> Tensor:
    """Return norm(x) of x (B, C, H, W) in float32, or in x's format where that is faster.

    That is bfloat16 on a CPU with float32 weights, where sums are of float32 too, and nothing
    learns: half the time with the activation that follows.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled():
        return F.group_norm(x, norm.groups, norm.weight, norm.bias, norm.eps)
    return norm(x)


class Resnet(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + what the embedding says))).

    Args:
        channels: of x.
        out: of what is made of it.
        embedding_dim: width of the embedding; 0 for none.
        groups: of the normalisation.
        eps: of the normalisation.
    """

    def __init__(
        self, channels: int, out: int, embedding_dim: int = 0, groups: int = 32, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels, groups, eps)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_dim, out) if embedding_dim else None
        self.norm2 = GroupNorm(out, groups, eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map (B, channels, H, W) and the activated embedding (B, D) to (B, out, H, W)."""
        h = self.conv1(F.silu(normed(self.norm1, x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(embedding)[:, :, None, None]
        h = self.conv2(F.silu(normed(self.norm2, h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Attention of places on tokens, or on one another."""

    def __init__(self, width: int, heads: int, read: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(read, width, bias=False)
        self.to_v = nn.Linear(read, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Map x (B, N, width) and tokens (B, T, read) to (B, N, width)."""
        parts = self.to_q(x), self.to_k(tokens), self.to_v(tokens)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.to_out[0](attend(q, k, v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """A linear layer of which one half gates the other: Shazeer 2020, "GLU Variants", GEGLU."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, width) to (B, N, out)."""
        # By halves: on a CPU, functions of a half of the columns take three times as long.
        halves = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        value, gate = (F.linear(x, weight, bias) for weight, bias in halves)
        return value * F.gelu(gate)


class Places(nn.Conv2d):
    """A convolution of 1 x 1, applied to places (B, N, channels) as the matrix that it is."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, channels) to (B, N, out)."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class Perceptron(nn.Module):
    """A gated layer four times as wide, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [Gated(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, width) to the same shape."""
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, attention on the text, perceptron; each normalised first, and added."""

    def __init__(self, width: int, heads: int, text_dim: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, heads, width)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, heads, text_dim)
        self.norm3, self.ff = nn.LayerNorm(width), Perceptron(width)

    def forward(
        self, x: Tensor, text: Tensor, size: Sequence[int] = (), merge: float = 0.0
    ) -> Tensor:
        """Map x (B, N, width) and text (n B, T, text_dim) to (n B, N, width).

        Args:
            x: the places.
            text: n texts for each x: what does not depend on the text is computed once.
            size: rows and columns of the places, which `merge` goes by.
            merge: share of the places that do not attend by themselves (`token_merging`).
        """
        h = self.norm1(x)
        if merge:
            merged, spread = merging(h, size, merge)
            h = merged(h)
            x = x + spread(self.attn1(h, h))
        else:
            x = x + self.attn1(h, h)
        x = for_each_text(x, text)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the places of a feature map.

    Args:
        width: channels of the map.
        heads: of attention.
        text_dim: width of the text's tokens.
        depth: number of blocks.
        linear: the projections in and out are kept as matrices, not as convolutions of 1 x 1.
        groups: of the normalisation.
    """

    def __init__(
        self, width: int, heads: int, text_dim: int, depth: int, linear: bool, groups: int
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(width, groups, 1e-6)
        self.proj_in, self.proj_out = (
            nn.Linear(width, width) if linear else Places(width, width, 1) for _ in range(2)
        )
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, text_dim) for _ in range(depth)
        )

    def forward(self, x: Tensor, text: Tensor, merge: float = 0.0) -> Tensor:
        """Map x (B, width, H, W) and text (n B, T, text_dim) to (n B, width, H, W)."""
        h = normed(self.norm, x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, width)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, text, x.shape[2:], merge)
        h = self.proj_out(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return for_each_text(x, text) + h


def for_each_text(x: Tensor, text: Tensor) -> Tensor:
    """Repeat x (B, ...) for texts (n B, ...): (n B, ...); itself where n is 1."""
    return x if len(x) == len(text) else torch.cat([x] * (len(text) // len(x)))


class Resize(nn.Module):
    """A convolution of 3 x 3: with a stride of two, or after nearest-neighbour upsampling."""

    def __init__(self, channels: int, stride: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Map (B, C, H, W) to half the size, or first to a `size` of rows and columns."""
        if size is not None:
            x = F.interpolate(x, size=tuple(size), mode="nearest")
        return self.conv(x)


class Level(nn.Module):
    """What happens at one size: residual blocks, transformers, and the way to the next size.

    Args:
        resnets: the residual blocks.
        attentions: one after each of them, or none.
        resize: the way to the next size, if there is one.
        down: whether that is smaller.
    """

    def __init__(
        self,
        resnets: list[Resnet],
        attentions: list[SpatialTransformer],
        resize: Resize | None,
        down: bool,
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        ways = [] if resize is None else [resize]
        self.downsamplers = nn.ModuleList(ways if down else [])
        self.upsamplers = nn.ModuleList([] if down else ways)

    @property
    def steps(self) -> int:
        """Of the way down."""
        return len(self.resnets) + len(self.downsamplers)

    def block(
        self, i: int, x: Tensor, embedding: Tensor, text: Tensor, merge: float = 0.0
    ) -> Tensor:
        """Apply residual block i and the transformer after it."""
        x = self.resnets[i](x, embedding)
        return self.attentions[i](x, text, merge) if len(self.attentions) else x


class Middle(nn.Module):
    """Two residual blocks with a transformer between them."""

    def __init__(self, first: Resnet, attention: SpatialTransformer, second: Resnet) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([attention])
        self.resnets = nn.ModuleList([first, second])

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor) -> Tensor:
        """Map (B, C, H, W), embedding (n B, D) and text (n B, T, text_dim) to (n B, C, H, W)."""
        x = self.attentions[0](self.resnets[0](x, embedding[: len(x)]), text)
        return self.resnets[1](x, embedding)


class TwoLayers(nn.Module):
    """A vector through two linear layers."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width) to (B, out)."""
        return self.linear_2(F.silu(self.linear_1(x)))


class SpatialUNet(nn.Module):
    """Predicts noise or velocity of latents at a time, under a text.

    Args:
        in_channels: of the latents, and of what is concatenated to them.
        out_channels: of the latents.
        channels: width at each size.
        blocks: residual blocks at each size; one more on the way up.
        transformers: depth of the transformers at each size, 0 for none.
        middle: depth of the one in the middle.
        heads: of attention at each size.
        text_dim: width of the text's tokens.
        linear: see SpatialTransformer.
        vector_dim: width of the vector of the whole text that XL adds; 0 for none.
        numbers: how many numbers (the picture's size and crop) go with that vector.
        number_dim: features of each of these.
        groups: of the normalisations.
        steps: of the noise schedule: time 1 is the last of them.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        channels: Sequence[int] = (320, 640, 1280, 1280),
        blocks: int = 2,
        transformers: Sequence[int] = (1, 1, 1, 0),
        middle: int = 1,
        heads: Sequence[int] = (8, 8, 8, 8),
        text_dim: int = 768,
        linear: bool = False,
        vector_dim: int = 0,
        numbers: int = 0,
        number_dim: int = 256,
        groups: int = 32,
        steps: int = 1000,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.steps = in_channels, out_channels, steps
        self.blocks = blocks
        self.features, self.number_dim, self.numbers = channels[0], number_dim, numbers
        wide = 4 * channels[0]

        def resnet(before: int, after: int) -> Resnet:
            return Resnet(before, after, wide, groups)

        def attention(level: int, depth: int) -> SpatialTransformer:
            return SpatialTransformer(
                channels[level], heads[level], text_dim, depth, linear, groups
            )

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_embedding = TwoLayers(channels[0], wide)
        added = vector_dim + numbers * number_dim
        self.add_embedding = TwoLayers(added, wide) if vector_dim else None
        last, skips, downs = len(channels) - 1, [channels[0]], []
        before = channels[0]
        for i, width in enumerate(channels):
            resnets = [resnet(width if j else before, width) for j in range(blocks)]
            attentions = [attention(i, transformers[i]) for _ in resnets if transformers[i]]
            smaller = Resize(width, stride=2) if i < last else None
            downs.append(Level(resnets, attentions, smaller, down=True))
            skips += [width] * (blocks + (i < last))
            before = width
        ups = []
        for i in reversed(range(len(channels))):
            width, resnets = channels[i], []
            for _ in range(blocks + 1):
                resnets.append(resnet(before + skips.pop(), width))
                before = width
            attentions = [attention(i, transformers[i]) for _ in resnets if transformers[i]]
            ups.append(Level(resnets, attentions, Resize(width, 1) if i else None, down=False))
        self.down_blocks, self.up_blocks = nn.ModuleList(downs), nn.ModuleList(ups)
        ends = resnet(channels[-1], channels[-1]), resnet(channels[-1], channels[-1])
        self.mid_block = Middle(ends[0], attention(last, middle), ends[1])
        self.conv_norm_out = GroupNorm(channels[0], groups, 1e-5)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        self.recompute = False
        """Whether training keeps a block's input alone and computes the block again backwards."""

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Embedded,
        numbers: Tensor | None = None,
        reuse: Reuse | None = None,
        merge: float = 0.0,
    ) -> Tensor:
        """Predict (n B, out_channels, h, w).

        Args:
            x: (B, in_channels, h, w) latents, and what is concatenated to them.
            time: (B,) in (0, 1]; float64 keeps whole steps whole.
            text: n texts for each x, one after another, so that for guidance n is 2: their tokens
                (n B, T, text_dim) and, for XL, vectors (n B, vector_dim).
            numbers: (n B, numbers) that XL is told: the picture's size and crop.
            reuse: of all blocks but `SHALLOW` at either end (Ma et al. 2024, "DeepCache:
                Accelerating Diffusion Models for Free").
            merge: share of the places merged for the largest self-attentions (`token_merging`).
        """
        tokens = text.tokens
        assert tokens is not None
        step = (self.steps * time - 1).to(device=x.device, dtype=torch.float32)
        embedding = self.time_embedding(sinusoidal(step, self.features))
        if self.add_embedding is not None:
            assert text.vector is not None and numbers is not None
            told = sinusoidal(numbers.flatten(), self.number_dim).view(len(numbers), -1)
            told = self.add_embedding(torch.cat([text.vector.float(), told], 1))
            embedding = for_each_text(embedding, told) + told
            x = for_each_text(x, tokens)
        embedding = F.silu(for_each_text(embedding, tokens))
        down_levels, up_levels = (
            cast("list[Level]", list(levels)) for levels in (self.down_blocks, self.up_blocks)
        )
        downs = [(level, i) for level in down_levels for i in range(level.steps)]
        ups = [(level, i) for level in up_levels for i in range(len(level.resnets))]
        reading = [level for level, _ in downs + ups if len(level.attentions)]
        largest = reading[:1] + reading[-1:]

        def block(level: Level, i: int, x: Tensor) -> Tensor:
            share = merge if level in largest else 0.0
            return recomputed(self.recompute, level.block, i, x, embedding[: len(x)], tokens, share)

        def down(x: Tensor, steps: list[tuple[Level, int]]) -> Tensor:
            for level, i in steps:
                inside = i < len(level.resnets)
                x = block(level, i, x) if inside else level.downsamplers[0](x)
                skips.append(x)
            return x

        def up(x: Tensor, steps: list[tuple[Level, int]]) -> Tensor:
            for level, i in steps:
                x = block(level, i, torch.cat([x, for_each_text(skips.pop(), x)], 1))
                if i == len(level.resnets) - 1:
                    for larger in level.upsamplers:
                        x = larger(x, skips[-1].shape[2:])
            return x

        def deep(x: Tensor) -> Tensor:
            x = self.mid_block(down(x, downs[SHALLOW - 1 :]), embedding, tokens)
            return up(x, ups[:-SHALLOW])

        x = self.conv_in(x)
        skips = [x]
        x = down(x, downs[: SHALLOW - 1])
        x = deep(x) if reuse is None else reuse(lambda: deep(x), len(tokens))
        x = up(x, ups[-SHALLOW:])
        return self.conv_out(F.silu(normed(self.conv_norm_out, x))).float()
