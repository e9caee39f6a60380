"""A small U-Net for diffusion in minutes on a CPU.

The U-Net of Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", with what costs time
and little else left out:

- It works on p x p pixels folded into channels (Shi et al. 2016, "Real-Time Single Image and Video
  Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network"), so that its widest
  maps are of some 14 x 14; and it goes between levels by folding and unfolding too.
- A block is that of Liu et al. 2022, "A ConvNet for the 2020s", figure 4, with a narrower middle: a
  convolution of each channel by itself and two 1 x 1 convolutions do a quarter of the work of two
  full ones.
- Time and class scale and shift each block's features (Nichol & Dhariwal 2021, "Improved Denoising
  Diffusion Probabilistic Models", section 4); one matrix product makes the scales and shifts of
  all blocks.
- Normalisation is over the channels of each pixel: neighbours in memory where channels are last.
- Skips join by one 1 x 1 convolution a level. There is no attention, unless it is asked for, on the
  smallest map alone.

With `cross` the places of the smallest map attend to the tokens of a caption as well: Rombach et
al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import CrossAttention, Embedded, attend, check_tokens, sinusoidal

FEATURES = 64  # sines and cosines of the time


def _normalise(x: Tensor) -> Tensor:
    """Give the channels of each pixel of (B, C, H, W) mean 0 and variance 1."""
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


def _zero(module: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """Start a layer at 0: a block whose last layer it is begins as the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class Block(nn.Module):
    """Each channel convolved by itself, then the channels of each pixel mixed; added to the input.

    Scaled and shifted where the features have just been normalised.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.contract = _zero(nn.Conv2d(2 * channels, channels, 1))

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same, told scale and shift (B, C, 1, 1)."""
        h = torch.addcmul(shift, _normalise(self.spread(x)), scale)
        return x + self.contract(F.silu(self.expand(h)))


class Attention(nn.Module):
    """Attention of the places of a map to each other, and to tokens; each added to the input.

    Args:
        channels: of the map.
        heads: of the attention.
        dim: width of the tokens; 0 for none.
    """

    def __init__(self, channels: int, heads: int, dim: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared by {heads} heads equally")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = _zero(nn.Linear(channels, channels))
        self.cross = CrossAttention(channels, dim, heads) if dim else None
        if self.cross is not None:
            _zero(self.cross.out)

    def forward(self, x: Tensor, told: Embedded) -> Tensor:
        """Map (B, C, H, W) to the same."""
        places = x.flatten(2).mT  # (B, N, C)
        h = F.layer_norm(places, places.shape[2:])
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        places = places + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        if self.cross is not None and told.tokens is not None:
            h = F.layer_norm(places, places.shape[2:])
            places = places + self.cross(h, told.tokens, told.mask)
        return places.mT.unflatten(2, x.shape[2:])


class QuickUNet(nn.Module):
    """The small denoiser: `network(x, time, embedded)`.

    Args:
        in_channels: channels of x, plus those of `embedded.image` where one is given.
        out_channels: channels of the output.
        size: height and width of x, which decide the patch.
        channels: of each level; every level halves the map.
        blocks: residual blocks of each level, on the way down and on the way up; the last level's
            once.
        embedding_dim: width of the time's embedding, of `embedded.vector` and `embedded.tokens`.
        patch: pixels folded into channels, p x p; None for the largest power of two that leaves
            the widest map 12 or more on a side.
        heads: of attention on the smallest map, after every second block; 0 for no attention.
        cross: whether that is to `embedded.tokens` too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        channels: Sequence[int] = (64, 128),
        blocks: Sequence[int] = (2, 4),
        embedding_dim: int = 128,
        patch: int | None = None,
        heads: int = 0,
        cross: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) != len(blocks):
            raise ValueError(
                f"channels names {len(channels)} levels and blocks {len(blocks)}; "
                "give as many of one as of the other"
            )
        if cross and not heads:
            raise ValueError("attention to tokens needs heads, such as heads = 4")
        self.cross = cross
        depth = 2 ** (len(channels) - 1)
        self.patch = patch or _patch(size, depth)
        self.multiple = self.patch * depth
        self._check_size(size, size)
        self.time = nn.Sequential(
            nn.Linear(FEATURES, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.widths = [c for c, n in zip(channels, blocks, strict=True) for _ in range(n)]
        self.widths += self.widths[: -blocks[-1]][::-1]
        self.modulate = _zero(nn.Linear(embedding_dim, 2 * sum(self.widths)))

        self.conv_in = nn.Conv2d(in_channels * self.patch**2, channels[0], 3, padding=1)
        *outer, inner = list(zip(channels, blocks, strict=True))
        self.down = nn.ModuleList(_level(c, n) for c, n in outer)
        self.fold = nn.ModuleList(
            nn.Conv2d(4 * a, b, 1) for a, b in zip(channels, channels[1:], strict=False)
        )
        self.middle = _level(*inner)
        tokens = embedding_dim if cross else 0
        self.attention = nn.ModuleList(
            Attention(inner[0], heads, tokens) for _ in range(-(-inner[1] // 2) if heads else 0)
        )
        self.unfold = nn.ModuleList(
            nn.Conv2d(b, 4 * a, 1) for a, b in zip(channels, channels[1:], strict=False)
        )
        self.join = nn.ModuleList(nn.Conv2d(2 * c, c, 1) for c, _ in outer)
        self.up = nn.ModuleList(_level(c, n) for c, n in outer)
        self.conv_out = _zero(nn.Conv2d(channels[0], out_channels * self.patch**2, 3, padding=1))

    def _check_size(self, height: int, width: int) -> None:
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"images of {height}x{width} cannot pass through this network: sizes must be "
                f"multiples of {self.multiple}"
            )

    def forward(self, x: Tensor, time: Tensor, embedded: Embedded | None = None) -> Tensor:
        """Map images x (B, C, H, W) at times (B,) in [0, 1] to (B, out_channels, H, W).

        Raises:
            ValueError: sides that do not fit, or tokens without `cross`, or the other way round.
        """
        embedded = embedded or Embedded()
        check_tokens(embedded, self.cross)
        self._check_size(x.shape[-2], x.shape[-1])
        features = sinusoidal(1000 * time, FEATURES).to(self.modulate.weight.dtype)
        e = self.time(features)  # (B, D)
        if embedded.vector is not None:
            e = e + embedded.vector
        if embedded.image is not None:
            x = torch.cat([x, embedded.image], dim=1)
        h = _fold(x, self.patch)
        h = self.conv_in(h)
        told = _modulation(self.modulate(F.silu(e)), self.widths, h.dtype)
        skips = []
        for level, fold in zip(self.down, self.fold, strict=True):
            h = _through(level, h, told)
            skips.append(h)
            h = fold(_fold(h, 2))
        for i, block in enumerate(self.middle):
            h = block(h, *next(told))
            if i % 2 == 0 and self.attention:
                h = self.attention[i // 2](h, embedded)
        for depth in reversed(range(len(self.up))):
            h = F.pixel_shuffle(self.unfold[depth](h), 2)
            h = self.join[depth](torch.cat([h, skips.pop()], dim=1))
            h = _through(self.up[depth], h, told)
        h = self.conv_out(F.silu(_normalise(h)))
        return F.pixel_shuffle(h, self.patch)


class QuickClassifier(nn.Module):
    """The way down of the small denoiser, then the mean of each channel: `network(x, time)`.

    Args:
        in_channels: channels of x.
        classes: how many logits.
        size: height and width of x, which decide the patch.
        channels: of each level; every level halves the map.
        blocks: residual blocks of each level.
        embedding_dim: width of the time's embedding.
        patch: as the QuickUNet's.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        size: int,
        channels: Sequence[int] = (64, 128),
        blocks: Sequence[int] = (2, 4),
        embedding_dim: int = 128,
        patch: int | None = None,
    ) -> None:
        super().__init__()
        if len(channels) != len(blocks):
            raise ValueError(
                f"channels names {len(channels)} levels and blocks {len(blocks)}; "
                "give as many of one as of the other"
            )
        self.patch = patch or _patch(size, 2 ** (len(channels) - 1))
        self.time = nn.Sequential(
            nn.Linear(FEATURES, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.widths = [c for c, n in zip(channels, blocks, strict=True) for _ in range(n)]
        self.modulate = _zero(nn.Linear(embedding_dim, 2 * sum(self.widths)))
        self.conv_in = nn.Conv2d(in_channels * self.patch**2, channels[0], 3, padding=1)
        self.levels = nn.ModuleList(_level(c, n) for c, n in zip(channels, blocks, strict=True))
        self.fold = nn.ModuleList(
            nn.Conv2d(4 * a, b, 1) for a, b in zip(channels, channels[1:], strict=False)
        )
        self.out = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map images x (B, C, H, W) at times (B,) in [0, 1] to logits (B, classes)."""
        features = sinusoidal(1000 * time, FEATURES).to(self.modulate.weight.dtype)
        h = self.conv_in(_fold(x, self.patch))
        told = _modulation(self.modulate(F.silu(self.time(features))), self.widths, h.dtype)
        for depth, level in enumerate(self.levels):
            if depth:
                h = self.fold[depth - 1](_fold(h, 2))
            h = _through(level, h, told)
        return self.out(F.silu(_normalise(h)).mean((2, 3)))


def _modulation(
    modulation: Tensor, widths: Sequence[int], dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the scale and shift (B, C, 1, 1) of each block in turn."""
    scale, shift = modulation.to(dtype)[:, :, None, None].chunk(2, dim=1)
    scales, shifts = (scale + 1).split(list(widths), 1), shift.split(list(widths), 1)
    return zip(scales, shifts, strict=True)


def _level(channels: int, blocks: int) -> nn.ModuleList:
    return nn.ModuleList(Block(channels) for _ in range(blocks))


def _through(level: nn.Module, h: Tensor, told: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    for block in level.children():
        h = block(h, *next(told))
    return h


def _fold(x: Tensor, patch: int) -> Tensor:
    """Fold patches of (B, C, H, W) into channels, which stay last in memory where they are."""
    return F.pixel_unshuffle(x, patch).contiguous(memory_format=torch.channels_last)


def _patch(size: int, depth: int) -> int:
    """Return the largest power of two that leaves the map 12 or more on a side, divisible."""
    patch = 1
    while size >= 2 * patch * 12 and size % (2 * patch * depth) == 0:
        patch *= 2
    return patch
