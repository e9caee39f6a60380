"""Networks of SRGAN: the residual generator that enlarges, and its critic.

Ledig et al. (2017), "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial
Network", figure 4. The generator works at the low resolution and enlarges at its end by sub-pixel
convolution (Shi et al. 2016, "Real-Time Single Image and Video Super-Resolution Using an Efficient
Sub-Pixel Convolutional Neural Network", equation 4): a convolution makes r^2 C channels, and
channel r^2 c + r a + b of a pixel becomes channel c of the (a, b)-th of the r x r pixels there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x + BN(conv(PReLU(BN(conv(x))))), all 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, H, W) to the same shape."""
        return x + self.body(x)


class Generator(nn.Module):
    """SRResNet: images (B, C, h, w) of any size to (B, C, factor h, factor w).

    Args:
        channels: C of the images.
        factor: 2, 4 or another power of 2 above 1.
        width: channels inside.
        blocks: residual blocks.

    Attributes:
        factor: as given.
        channels: as given.
        reach: a pixel depends on input pixels at most this far from it.
    """

    def __init__(self, channels: int, factor: int = 4, width: int = 64, blocks: int = 16) -> None:
        super().__init__()
        if factor < 2 or factor & (factor - 1):
            raise ValueError(f"factor is {factor}: it must be 2, 4 or a higher power of 2")
        times = int(math.log2(factor))
        self.factor, self.channels = factor, channels
        # 9x9 in, two 3x3 a block, 3x3; then 3x3 at 1, 1/2, ... of a pixel (< 2), 9x9 at 1/factor.
        self.reach = 4 + 2 * blocks + 1 + 2 + math.ceil(4 / factor)
        self.first = nn.Sequential(nn.Conv2d(channels, width, 9, padding=4), nn.PReLU())
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.join = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        enlarge = (
            nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU())
            for _ in range(times)
        )
        self.enlarge = nn.Sequential(*enlarge)
        self.last = nn.Conv2d(width, channels, 9, padding=4)

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge images (B, C, h, w), about [-1, 1]; the result is not clipped."""
        x = self.first(image)
        return self.last(self.enlarge(x + self.join(self.blocks(x))))


class Critic(nn.Module):
    """The paper's critic: eight convolutions, halving at every second, then two dense layers.

    Args:
        shape: (C, H, W) of the images.
        width: channels of the first convolution; the last has 8 times as many.
    """

    def __init__(self, shape: Sequence[int], width: int = 64) -> None:
        super().__init__()
        channels, *sides = shape
        body: list[nn.Module] = []
        for i, multiple in enumerate((1, 1, 2, 2, 4, 4, 8, 8)):
            out = multiple * width
            body.append(nn.Conv2d(channels, out, 3, 1 + i % 2, padding=1, bias=i == 0))
            if i:
                body.append(nn.BatchNorm2d(out))
            body.append(nn.LeakyReLU(0.2))
            channels = out
        self.body = nn.Sequential(*body)
        left = math.prod(-(-side // 16) for side in sides)
        self.dense = nn.Linear(channels * left, 16 * width)
        self.score = nn.Linear(16 * width, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Score images (B, C, H, W): logits (B,), high for real."""
        x = self.dense(self.body(image).flatten(1))
        return self.score(F.leaky_relu(x, 0.2))[:, 0]
