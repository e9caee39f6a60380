"""The generator and critic of progressive growing, for pictures of any size from 8 pixels.

Karras, Aila, Laine, Lehtinen (2018), "Progressive Growing of GANs for Improved Quality, Stability,
and Variation". Both networks have stages k = 0, 1, ..., K, one for each doubling of a side of 4 to
7 pixels (28 is 7, 14, 28 and 64 is 4, 8, ..., 64), and run at the stage that they are told: layers
of later stages are not touched. With up nearest-neighbour and down 2 x 2 average pooling, and
alpha rising from 0 to 1 while stage k is new (figure 2):

    h_k = block_k(up h_(k-1)),                      h_0 from the latent
    G   = (1 - alpha) up(toRGB_(k-1)(h_(k-1)))  +  alpha toRGB_k(h_k)

    D   = the blocks below k of (1 - alpha) fromRGB_(k-1)(down x)  +  alpha block_k(fromRGB_k(x))

What both are built of:

    equalized learning rate (4.1)   y = W x gain / sqrt(fan-in) + b with every W_ij ~ N(0, 1): the
                                    scale is He's, but applied at run time, so that steps of Adam
                                    are as large in one layer as in another
    pixel norm (4.2)                x / sqrt(mean over channels of x^2 + 1e-8), in G only
    minibatch deviation (3)         one more feature map in D's last block: how much the images of
                                    a group differ, so that D sees a collapse

Groups are of 4 consecutive images; G looks at each image alone. `channels` is the width at full
size; it doubles with each halving, up to four times. A side that is not 4 to 7 times a power of two
is rounded up to one: G's images are that large and are to be cropped, D's to be padded.

Labels (B, K) are one-hot rows or any other vectors; K may be 0. G has them concatenated to the
latent, D reads them by projection (Miyato, Koyama 2018, "cGANs with Projection Discriminator",
equation 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import halvings, upsample_conv

GROUP = 4
HE = math.sqrt(2)


class Dense(nn.Module):
    """A linear layer with equalized learning rate."""

    def __init__(self, inputs: int, outputs: int, gain: float = HE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = gain / math.sqrt(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs) to (B, outputs)."""
        return F.linear(x, self.weight * self.scale, self.bias)


class Conv(nn.Module):
    """A convolution with equalized learning rate; with `up`, of the image enlarged twofold."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, gain: float = HE, up: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = gain / math.sqrt(inputs * kernel**2)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W), or with `up` (B, outputs, 2H, 2W)."""
        weight = self.weight * self.scale
        if self.up:
            return upsample_conv(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)


def pixel_norm(x: Tensor) -> Tensor:
    """Bring every pixel's vector of channels, (B, C, ...), to mean square 1."""
    return x * (x.float().square().mean(1, keepdim=True) + 1e-8).rsqrt().to(x.dtype)


def minibatch_deviation(x: Tensor) -> Tensor:
    """Append to x (B, C, H, W) a map: the mean standard deviation within groups of 4 images.

    Where B is no multiple of 4, groups are of 2 images or, for odd B, of one: the map is then 0.
    """
    groups = x.float().unflatten(0, (-1, math.gcd(len(x), GROUP)))  # (B / 4, 4, C, H, W)
    # Not Tensor.var: over this dimension it is many times slower on a CPU.
    variance = (groups - groups.mean(1, keepdim=True)).square().mean(1)
    deviation = (variance + 1e-8).sqrt().mean((1, 2, 3))  # (B / 4,)
    plane = deviation.repeat_interleave(groups.shape[1])[:, None, None, None]
    return torch.cat([x, plane.to(x.dtype).expand(-1, 1, *x.shape[2:])], dim=1)


def enlarge(image: Tensor, times: int = 2) -> Tensor:
    """Repeat each pixel of (B, C, H, W) `times` in both directions."""
    return F.interpolate(image, scale_factor=float(times), mode="nearest")


def sizes(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return (height, width) at each stage for images (C, H, W), the smallest first."""
    _, height, width = shape
    times, _ = halvings(max(height, width))
    base = -(-height // 2**times), -(-width // 2**times)
    return [(base[0] * 2**k, base[1] * 2**k) for k in range(times + 1)]


def _widths(channels: int, stages: int) -> list[int]:
    return [channels * min(2**k, 4) for k in reversed(range(stages))]


class Generator(nn.Module):
    """Maps latents to images at any stage's size.

    Args:
        shape: (C, H, W) of the image, sides of at least 8 pixels.
        latent: length of the latent vector.
        channels: width at full size.
        classes: length K of the label vectors, 0 for none.
    """

    def __init__(
        self, shape: Sequence[int], latent: int = 64, channels: int = 16, classes: int = 0
    ) -> None:
        super().__init__()
        self.shape, self.latent, self.classes = tuple(shape), latent, classes
        self.sizes = sizes(shape)
        widths = _widths(channels, len(self.sizes))
        height, width = self.sizes[0]
        self.first = Dense(latent + classes, widths[0] * height * width)
        self.unflatten = nn.Unflatten(1, (widths[0], height, width))
        self.second = Conv(widths[0], widths[0], 3)
        self.blocks = nn.ModuleList(
            nn.ModuleList([Conv(before, after, 3, up=True), Conv(after, after, 3)])
            for before, after in zip(widths, widths[1:], strict=False)
        )
        self.to_rgb = nn.ModuleList(Conv(w, self.shape[0], 1, gain=1.0) for w in widths)

    def forward(self, latent: Tensor, label: Tensor, stage: int, alpha: float) -> Tensor:
        """Map latents (B, D) and labels (B, K) to float32 images (B, C, h, w) of the stage.

        Args:
            latent: only its direction counts.
            label: a row of zeros and a one for each image.
            stage: from 0.
            alpha: weight of the stage's own output, 1 when it is grown; the rest is the output of
                the stage before.
        """
        vector = torch.cat([pixel_norm(latent), pixel_norm(label)], dim=1)
        x = pixel_norm(F.leaky_relu(self.unflatten(self.first(vector)), 0.2))
        maps = [pixel_norm(F.leaky_relu(self.second(x), 0.2))]
        for block in self.blocks[:stage]:
            x = maps[-1]
            for conv in block.children():
                x = pixel_norm(F.leaky_relu(conv(x), 0.2))
            maps.append(x)
        image = self.to_rgb[stage](maps[-1]).float()
        if alpha < 1:
            image = torch.lerp(enlarge(self.to_rgb[stage - 1](maps[-2]).float()), image, alpha)
        return image


class Critic(nn.Module):
    """Maps images of any stage's size to one number each: how real they look.

    Args:
        shape: (C, H, W) of the image at full size, sides of at least 8 pixels.
        channels: width at full size.
        classes: length K of the label vectors, 0 for none.
    """

    def __init__(self, shape: Sequence[int], channels: int = 16, classes: int = 0) -> None:
        super().__init__()
        self.sizes = sizes(shape)
        widths = _widths(channels, len(self.sizes))
        height, width = self.sizes[0]
        self.from_rgb = nn.ModuleList(Conv(shape[0], w, 1) for w in widths)
        self.blocks = nn.ModuleList(
            nn.ModuleList([Conv(after, after, 3), Conv(after, before, 3)])
            for before, after in zip(widths, widths[1:], strict=False)
        )
        self.last = Conv(widths[0] + 1, widths[0], 3)
        self.features = Dense(widths[0] * height * width, widths[0])
        self.score = Dense(widths[0], 1 + classes, gain=1.0)

    def forward(self, image: Tensor, label: Tensor, stage: int, alpha: float) -> Tensor:
        """Map images (B, C, h, w) of the stage and labels (B, K) to scores (B,).

        Args:
            image: in groups of 4, each compared within itself.
            label: a row of zeros and a one for each image.
            stage: from 0.
            alpha: weight of the stage's own input layers, 1 when it is grown.
        """
        x = F.leaky_relu(self.from_rgb[stage](image), 0.2)
        for k in reversed(range(stage)):
            for conv in self.blocks[k].children():
                x = F.leaky_relu(conv(x), 0.2)
            x = F.avg_pool2d(x, 2)
            if k == stage - 1 and alpha < 1:
                coarse = F.leaky_relu(self.from_rgb[k](F.avg_pool2d(image, 2)), 0.2)
                x = torch.lerp(coarse, x, alpha)
        x = F.leaky_relu(self.last(minibatch_deviation(x)), 0.2)
        scores = self.score(F.leaky_relu(self.features(x.flatten(1)), 0.2)).float()  # (B, 1 + K)
        return scores[:, 0] + (scores[:, 1:] * label).sum(1)
