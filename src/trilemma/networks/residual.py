"""A residual generator and critic without any normalisation.

In the spirit of Huang, Gokaslan, Kuleshov, Tompkin (2024), "The GAN is dead; long live the GAN! A
Modern GAN Baseline", section 4: both networks mirror each other, halve and double by bilinear
resampling instead of strided convolutions, and start as Zhang, Dauphin, Ma (2019), "Fixup
Initialization: Residual Learning Without Normalization", section 3 says: a block's last convolution
starts at 0, and its first one is scaled by L^(-1/2) in a network of L blocks, so that depth changes
nothing about the size of the first steps. A block is

    x + W2 a(W1 a(x) + b1) + b2,        W1, W2 of 3 x 3, a LeakyReLU(0.2)

No layer runs at full size: the critic folds 2 x 2 pixels into channels at its input, the generator
unfolds them at its end (Shi et al. 2016, section 3). `channels` is the width there; it doubles with
each further halving of the side, up to four times.

Label vectors (B, K) are one-hot classes or, where there are none, attributes: concatenated to the
latent, and read by the critic by projection (Miyato, Koyama 2018, equation 6).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import halvings

SLOPE = 0.2


def _start(layer: nn.Conv2d | nn.Linear, scale: float = 1.0) -> None:
    """Draw weights that keep a signal's size through LeakyReLU, times `scale` (He et al. 2015)."""
    nn.init.kaiming_normal_(layer.weight, a=SLOPE)
    layer.weight.data.mul_(scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Block(nn.Module):
    """Two convolutions beside a straight way.

    Args:
        channels: width.
        total: blocks L in the whole network.
    """

    def __init__(self, channels: int, total: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        _start(self.first, total**-0.5)
        _start(self.second, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        branch = self.first(F.leaky_relu(x, SLOPE))
        return x + self.second(F.leaky_relu(branch, SLOPE))


def _widths(channels: int, size: int) -> list[int]:
    """Return the widths from the image inwards, one for each halving of the side."""
    times, _ = halvings(size)
    return [channels * min(2**i, 4) for i in range(times)]


class Generator(nn.Module):
    """Maps latents to images.

    Args:
        shape: (C, H, W) of the image, sides of at least 8 pixels.
        latent: length of the latent vector.
        channels: width at half the image's size.
        blocks: residual blocks at each size.
        classes: number of classes, 0 for none.
        attributes: number of attributes, read where there are no classes.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 64,
        channels: int = 64,
        blocks: int = 1,
        classes: int = 0,
        attributes: int = 0,
    ) -> None:
        super().__init__()
        image_channels, *self.size = shape
        self.latent, self.classes, self.attributes = latent, classes, attributes
        widths = _widths(channels, max(self.size))[::-1]
        base = [-(-side // 2 ** len(widths)) for side in self.size]
        self.first = nn.Linear(latent + (classes or attributes), widths[0] * base[0] * base[1])
        self.unflatten = nn.Unflatten(1, (widths[0], *base))
        total = len(widths) * blocks
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(width, total) for _ in range(blocks))) for width in widths
        )
        self.narrow = nn.ModuleList(
            nn.Conv2d(wide, width, 1) for wide, width in zip(widths, widths[1:], strict=False)
        )
        self.last = nn.Conv2d(widths[-1], 4 * image_channels, 3, padding=1)
        for layer in (self.first, *self.narrow, self.last):
            _start(layer)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        """Map latents (B, D) and labels (B, K) to images (B, C, H, W) in [-1, 1]."""
        x = self.unflatten(self.first(torch.cat([latent, label], dim=1)))
        x = self.blocks[0](x.contiguous(memory_format=torch.channels_last))
        for narrow, blocks in zip(self.narrow, self.blocks[1:], strict=True):
            # A 1 x 1 convolution and resampling commute; this order is four times cheaper.
            x = F.interpolate(narrow(x), scale_factor=2.0, mode="bilinear", align_corners=False)
            x = blocks(x)
        image = F.pixel_shuffle(self.last(F.leaky_relu(x, SLOPE)), 2).tanh()
        return image[:, :, : self.size[0], : self.size[1]]


class Critic(nn.Module):
    """Maps images to one number each: how real they look.

    Args:
        shape: (C, H, W) of the image, sides of at least 8 pixels.
        channels: width at half the image's size.
        blocks: residual blocks at each size.
        classes: number of classes, 0 for none.
        attributes: number of attributes, read where there are no classes.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 64,
        blocks: int = 1,
        classes: int = 0,
        attributes: int = 0,
    ) -> None:
        super().__init__()
        image_channels, *size = shape
        widths = _widths(channels, max(size))
        total = len(widths) * blocks
        self.first = nn.Conv2d(4 * image_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(width, total) for _ in range(blocks))) for width in widths
        )
        self.widen = nn.ModuleList(
            nn.Conv2d(width, wide, 1) for width, wide in zip(widths, widths[1:], strict=False)
        )
        base = [-(-side // 2 ** len(widths)) for side in size]
        features, known = widths[-1] * base[0] * base[1], classes or attributes
        self.score = nn.Linear(features, 1)
        self.project = nn.Linear(known, features, bias=False) if known else None
        for layer in (self.first, *self.widen):
            _start(layer)
        nn.init.normal_(self.score.weight, 0.0, features**-0.5)
        nn.init.zeros_(self.score.bias)
        if self.project is not None:
            nn.init.normal_(self.project.weight, 0.0, features**-0.5)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        """Map images (B, C, H, W) and labels (B, K) to scores (B,)."""
        tall, wide = (side % 2 for side in image.shape[2:])
        x = self.first(F.pixel_unshuffle(F.pad(image, (0, wide, 0, tall)), 2))
        x = self.blocks[0](x)
        for widen, blocks in zip(self.widen, self.blocks[1:], strict=True):
            # Halving by bilinear resampling is the mean of 2 x 2; an odd side is rounded up.
            x = blocks(widen(F.avg_pool2d(x, 2, ceil_mode=True)))
        feature = F.leaky_relu(x, SLOPE).flatten(1)  # (B, F)
        score = self.score(feature)[:, 0]
        if self.project is not None:
            score = score + (feature * self.project(label)).sum(1)
        return score.float()
