"""A residual critic without any normalisation.

In the spirit of Huang, Gokaslan, Kuleshov, Tompkin (2024), "The GAN is dead; long live the GAN! A
Modern GAN Baseline", section 4: residual blocks at every size, halved by bilinear resampling, and a
start as Zhang, Dauphin, Ma (2019), "Fixup Initialization: Residual Learning Without Normalization",
section 3, says: a block's last convolution starts at 0, and its first one is scaled by L^(-1/2) in
a network of L blocks, so that depth changes nothing about the size of the first steps. A block is

    x + W2 a(W1 a(x) + b1) + b2,        W1, W2 of 3 x 3, a LeakyReLU(0.2)

The first convolution halves the side already (4 x 4, stride 2, so every pixel meets the kernel in
four ways), and no block runs at full size. At the end each channel is summed over its places with
weights of its own, which leaves one feature for each channel. A score that read all places of all
channels would be thousands of weights wide: one step of Adam moves each by the learning rate, and
so the score by thousands of times that; the critic would run away in its first steps.

Label vectors (B, K), one-hot classes or, where there are none, attributes, are read by projection
(Miyato, Koyama 2018, "cGANs with Projection Discriminator", equation 6).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import halvings

SLOPE = 0.2


def _start(layer: nn.Conv2d, scale: float = 1.0) -> None:
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


class Critic(nn.Module):
    """Maps images to one number each: how real they look.

    Args:
        shape: (C, H, W) of the image, sides of at least 8 pixels.
        channels: width at half the image's size; it doubles with each halving, up to four times.
        blocks: residual blocks at each size.
        classes: number of classes, 0 for none.
        attributes: number of attributes, read where there are no classes.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 32,
        blocks: int = 1,
        classes: int = 0,
        attributes: int = 0,
    ) -> None:
        super().__init__()
        image_channels, *size = shape
        times, _ = halvings(max(size))
        widths = [channels * min(2**i, 4) for i in range(times)]
        base = [-(-side // 2**times) for side in size]
        self.first = nn.Conv2d(image_channels, channels, 4, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(width, times * blocks) for _ in range(blocks)))
            for width in widths
        )
        self.widen = nn.ModuleList(
            nn.Conv2d(width, wide, 1) for width, wide in zip(widths, widths[1:], strict=False)
        )
        features, known = widths[-1], classes or attributes
        self.gather = nn.Parameter(torch.empty(features, *base))
        self.score = nn.Linear(features, 1)
        self.project = nn.Linear(known, features, bias=False) if known else None
        for layer in (self.first, *self.widen):
            _start(layer)
        nn.init.normal_(self.gather, 0.0, (base[0] * base[1]) ** -0.5)
        nn.init.normal_(self.score.weight, 0.0, features**-0.5)
        nn.init.zeros_(self.score.bias)
        if self.project is not None:
            nn.init.normal_(self.project.weight, 0.0, features**-0.5)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        """Map images (B, C, H, W) and labels (B, K) to scores (B,)."""
        tall, wide = (side % 2 for side in image.shape[2:])
        x = self.blocks[0](self.first(F.pad(image, (0, wide, 0, tall))))
        for widen, blocks in zip(self.widen, self.blocks[1:], strict=True):
            # Halving by bilinear resampling is the mean of 2 x 2; an odd side is rounded up.
            x = blocks(widen(F.avg_pool2d(x, 2, ceil_mode=True)))
        feature = (F.leaky_relu(x, SLOPE) * self.gather).sum((2, 3))  # (B, F)
        feature = F.leaky_relu(feature, SLOPE)
        score = self.score(feature)[:, 0]
        if self.project is not None:
            score = score + (feature * self.project(label)).sum(1)
        return score.float()
