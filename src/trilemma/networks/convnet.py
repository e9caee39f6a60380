"""A plain convolutional encoder and decoder, mirror images, for pictures of any size from 8 pixels.

The side is halved until 4 to 7 pixels are left, and the width doubles with each halving up to four
times `channels`. The first halving folds 2 x 2 pixels into channels (Shi et al. 2016, "Real-Time
Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network",
section 3), so no layer runs at full size: most of the cost of a convolutional network on small
pictures is there. At each size stand `blocks` residual blocks without normalisation, which begin as
the identity (second convolution zero; Zhang, Dauphin, Ma 2019, "Fixup Initialization").

Labels (B, K) are one-hot rows or any other vectors; K may be 0. The encoder adds them, projected,
to its first feature map, the decoder has them concatenated to the latent.

GridEncoder and GridDecoder are the same without the linear layers: they go no further than a grid
of vectors `factor` times smaller than the image.

A decoder ends by unfolding channels to 2 x 2 pixels. An `even` one ends with nearest-neighbour
upsampling and two convolutions at full size instead, which give the same to all pixels where their
input is flat: Odena, Dumoulin, Olah (2016), "Deconvolution and Checkerboard Artifacts".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import halvings, upsample_conv


class Residual(nn.Module):
    """x + conv(act(conv(act(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return x + self.second(F.silu(self.first(F.silu(x))))


class Upsample(nn.Conv2d):
    """Nearest-neighbour upsampling by two, then a 3 x 3 convolution."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out, 2 H, 2 W)."""
        return upsample_conv(x, self.weight, self.bias)


class Encoder(nn.Module):
    """Maps images to vectors.

    Args:
        shape: (C, H, W) of the image.
        out: length of the vector.
        channels: width at half the image's size.
        blocks: residual blocks at each size.
        classes: length K of the label vectors, 0 for none.
    """

    def __init__(
        self,
        shape: Sequence[int],
        out: int,
        channels: int = 64,
        blocks: int = 1,
        classes: int = 0,
    ) -> None:
        super().__init__()
        image_channels, height, width = shape
        times, _ = halvings(max(height, width))
        widths = [channels * min(2**i, 4) for i in range(times)]
        base = [-(-side // 2**times) for side in (height, width)]
        self.pad = [0, base[1] * 2**times - width, 0, base[0] * 2**times - height]
        self.first = nn.Conv2d(4 * image_channels, channels, 3, padding=1)
        self.label = nn.Linear(classes, channels, bias=False) if classes else None
        layers: list[nn.Module] = [Residual(channels) for _ in range(blocks)]
        for narrow, wide in zip(widths, widths[1:], strict=False):
            layers += [nn.SiLU(), nn.Conv2d(narrow, wide, 4, 2, 1)]
            layers += [Residual(wide) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Flatten())
        self.last = nn.Linear(widths[-1] * base[0] * base[1], out)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        """Map images (B, C, H, W) and labels (B, K) to vectors (B, out)."""
        x = self.first(F.pixel_unshuffle(F.pad(image, self.pad, mode="replicate"), 2))
        if self.label is not None:
            x = x + self.label(label)[:, :, None, None]
        return self.last(self.layers(x)).float()


class Decoder(nn.Module):
    """Maps vectors to images, without a bound on their values.

    Args:
        shape: (C, H, W) of the image.
        latent: length of the vector.
        channels: width at half the image's size.
        blocks: residual blocks at each size.
        classes: length K of the label vectors, 0 for none.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int,
        channels: int = 64,
        blocks: int = 1,
        classes: int = 0,
    ) -> None:
        super().__init__()
        image_channels, *self.size = shape
        times, _ = halvings(max(self.size))
        widths = [channels * min(2**i, 4) for i in reversed(range(times))]
        base = [-(-side // 2**times) for side in self.size]
        layers: list[nn.Module] = [
            nn.Linear(latent + classes, widths[0] * base[0] * base[1]),
            nn.Unflatten(1, (widths[0], *base)),
            *[Residual(widths[0]) for _ in range(blocks)],
        ]
        for wide, narrow in zip(widths, widths[1:], strict=False):
            layers += [nn.SiLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1)]
            layers += [Residual(narrow) for _ in range(blocks)]
        layers += [nn.SiLU(), nn.Conv2d(channels, 4 * image_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers, nn.PixelShuffle(2))

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        """Map latents (B, D) and labels (B, K) to images (B, C, H, W)."""
        image = self.layers(torch.cat([latent, label], dim=1))
        return image[:, :, : self.size[0], : self.size[1]].float()


def _grid_widths(channels: int, factor: int) -> list[int]:
    """Widths from half the image's size to 1 / factor of it."""
    if factor < 2 or factor & (factor - 1):
        raise ValueError(f"factor is {factor}; expected 2, 4, 8, ...")
    return [channels * min(2**i, 4) for i in range(factor.bit_length() - 1)]


class GridEncoder(nn.Module):
    """Maps images to grids of vectors.

    Args:
        shape: (C, H, W) of the image; H and W divisible by `factor`.
        latent: length D of the vectors.
        channels: width at half the image's size.
        blocks: residual blocks at each size.
        factor: how many times smaller the grid is: a power of 2.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int,
        channels: int = 64,
        blocks: int = 2,
        factor: int = 4,
    ) -> None:
        super().__init__()
        image_channels, height, width = shape
        widths = _grid_widths(channels, factor)
        if height % factor or width % factor:
            raise ValueError(
                f"images of {height} x {width} do not divide by {factor}; choose a size that does, "
                f"or set data.multiple to {factor}"
            )
        self.latent, self.grid = latent, (height // factor, width // factor)
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        layers += [nn.Conv2d(4 * image_channels, channels, 3, padding=1)]
        layers += [Residual(channels) for _ in range(blocks)]
        for narrow, wide in zip(widths, widths[1:], strict=False):
            layers += [nn.SiLU(), nn.Conv2d(narrow, wide, 4, 2, 1)]
            layers += [Residual(wide) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(widths[-1], latent, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to grids (B, D, H / factor, W / factor)."""
        return self.layers(image).float()


class GridDecoder(nn.Module):
    """Maps grids of vectors to images, without a bound on their values.

    Args:
        shape: (C, H, W) of the image.
        latent: length D of the vectors.
        channels: width at half the image's size.
        blocks: residual blocks at each size.
        factor: how many times smaller the grid is: a power of 2.
        even: end by upsampling, not by unfolding.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int,
        channels: int = 64,
        blocks: int = 2,
        factor: int = 4,
        even: bool = False,
    ) -> None:
        super().__init__()
        widths = _grid_widths(channels, factor)[::-1]
        layers: list[nn.Module] = [nn.Conv2d(latent, widths[0], 3, padding=1)]
        layers += [Residual(widths[0]) for _ in range(blocks)]
        for wide, narrow in zip(widths, widths[1:], strict=False):
            layers += [nn.SiLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1)]
            layers += [Residual(narrow) for _ in range(blocks)]
        if even:
            half = channels // 2
            layers += [nn.SiLU(), Upsample(channels, half), nn.SiLU()]
            layers += [nn.Conv2d(half, shape[0], 3, padding=1)]
        else:
            layers += [nn.SiLU(), nn.Conv2d(channels, 4 * shape[0], 3, padding=1)]
            layers += [nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)

    @property
    def last(self) -> Tensor:
        """The weights of the last convolution."""
        layers = [layer for layer in self.layers if isinstance(layer, nn.Conv2d)]
        return layers[-1].weight

    def forward(self, latent: Tensor) -> Tensor:
        """Map grids (B, D, h, w) to images (B, C, factor h, factor w)."""
        return self.layers(latent).float()
