"""A residual critic without any normalisation.

In the spirit of Huang, Gokaslan, Kuleshov, Tompkin (2024), "The GAN is dead; long live the GAN! A
Modern GAN Baseline", section 4. A convolution of 4 x 4 halves the side until it is 4 to 7 pixels;
after each halving but the first comes a residual block

    x + W2 a(W1 a(x) + b1) + b2,        W1, W2 of 3 x 3, a LeakyReLU(0.2)

so no block runs at half the image's size or above, where it would cost most. Blocks start as Zhang,
Dauphin, Ma (2019), "Fixup Initialization: Residual Learning Without Normalization", section 3, has
it: W2 at 0, W1 scaled by L^(-1/2) in a network of L blocks, so that depth changes nothing about the
size of the first steps. All other weights are drawn from N(0, 0.02), as DCGAN's.

The score reads every place of every channel. A critic whose channels were summed over their places
first was behind after as many pictures: docs/families/gan.md.

Label vectors (B, K), one-hot classes or, where there are none, attributes, are read by projection
(Miyato, Koyama 2018, "cGANs with Projection Discriminator", equation 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import halvings

SLOPE = 0.2


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
        nn.init.kaiming_normal_(self.first.weight, a=SLOPE)
        self.first.weight.data.mul_(total**-0.5)
        nn.init.zeros_(self.second.weight)
        for bias in (self.first.bias, self.second.bias):
            assert bias is not None
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        branch = self.first(F.leaky_relu(x, SLOPE))
        return x + self.second(F.leaky_relu(branch, SLOPE))


class Critic(nn.Module):
    """Maps images to one number each: how real they look.

    Args:
        shape: (C, H, W) of the image, sides of at least 8 pixels.
        channels: width at half the image's size; it doubles with each halving, up to four times.
        classes: number of classes, 0 for none.
        attributes: number of attributes, read where there are no classes.
    """

    def __init__(
        self, shape: Sequence[int], channels: int = 64, classes: int = 0, attributes: int = 0
    ) -> None:
        super().__init__()
        image_channels, *size = shape
        times, _ = halvings(max(size))
        widths = [channels * min(2**i, 4) for i in range(times)]
        self.first = nn.Conv2d(image_channels, channels, 4, 2, 1)
        self.halve = nn.ModuleList(
            nn.Conv2d(width, wide, 4, 2, 1) for width, wide in zip(widths, widths[1:], strict=False)
        )
        self.blocks = nn.ModuleList(Block(width, times - 1) for width in widths[1:])
        features = widths[-1] * math.prod(-(-side // 2**times) for side in size)
        known = classes or attributes
        self.score = nn.Linear(features, 1)
        self.project = nn.Linear(known, features, bias=False) if known else None
        for layer in (self.first, *self.halve, self.score, self.project):
            if layer is not None:
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        """Map images (B, C, H, W) and labels (B, K) to scores (B,)."""
        x = self.first(_even(image))
        for halve, block in zip(self.halve, self.blocks, strict=True):
            x = block(halve(_even(F.leaky_relu(x, SLOPE))))
        feature = F.leaky_relu(x, SLOPE).flatten(1)  # (B, F)
        score = self.score(feature)[:, 0]
        if self.project is not None:
            score = score + (feature * self.project(label)).sum(1)
        return score.float()


def _even(x: Tensor) -> Tensor:
    """Add a row or column of 0 to an odd side, so that halving rounds up."""
    tall, wide = (side % 2 for side in x.shape[2:])
    return F.pad(x, (0, wide, 0, tall)) if tall or wide else x
