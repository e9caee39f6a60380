"""A generator whose every layer reads the latent and the label, quick to train on small pictures.

The latent and the label set the scale and shift after each batch normalisation (de Vries et al.
2017, "Modulating early visual processing by language", section 3; Brock, Donahue, Simonyan 2019,
"Large Scale GAN Training for High Fidelity Natural Image Synthesis", section 3.1):

    y = (1 + g(z, label)) * (x - mean) / sigma + b(z, label),      g, b linear

and the last doubling unfolds channels into 2 x 2 pixels (Shi et al. 2016, "Real-Time Single Image
and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network", section 3),
so no layer runs at full size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import halvings


class ModulatedNorm(nn.Module):
    """Batch normalisation, scale and shift by a vector, ReLU."""

    def __init__(self, channels: int, vector: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.modulate = nn.Linear(vector, 2 * channels)
        nn.init.normal_(self.modulate.weight, 0.0, 0.02)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """Map (B, C, H, W) and (B, V) to (B, C, H, W)."""
        gain, shift = self.modulate(vector)[:, :, None, None].chunk(2, dim=1)
        return F.relu(self.norm(x) * (1 + gain) + shift)


class Generator(nn.Module):
    """Maps latents to images.

    Args:
        shape: (C, H, W) of the image, sides of at least 8 pixels.
        latent: length of the latent vector.
        channels: width at half the image's size; it doubles with each halving, up to four times.
        classes: number of classes, 0 for none.
        attributes: number of attributes, read where there are no classes.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 64,
        channels: int = 64,
        classes: int = 0,
        attributes: int = 0,
    ) -> None:
        super().__init__()
        image_channels, *self.size = shape
        self.latent, self.classes, self.attributes = latent, classes, attributes
        times, _ = halvings(max(self.size))
        base = [-(-side // 2**times) for side in self.size]
        widths = [channels * min(2**i, 4) for i in reversed(range(times))]
        vector = latent + (classes or attributes)
        self.first = nn.Linear(vector, widths[0] * base[0] * base[1], bias=False)
        self.unflatten = nn.Unflatten(1, (widths[0], *base))
        self.doublings = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False)
            for wide, narrow in zip(widths, widths[1:], strict=False)
        )
        self.middle = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.last = nn.Conv2d(channels, 4 * image_channels, 3, padding=1)
        for layer in (self.first, *self.doublings, self.middle, self.last):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        self.norms = nn.ModuleList(ModulatedNorm(width, vector) for width in [*widths, channels])

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        """Map latents (B, D) and labels (B, K) to images (B, C, H, W) in [-1, 1]."""
        vector = torch.cat([latent, label], dim=1)
        x = self.unflatten(self.first(vector)).contiguous(memory_format=torch.channels_last)
        for layer, norm in zip([*self.doublings, self.middle], self.norms, strict=False):
            x = layer(norm(x, vector))
        image = F.pixel_shuffle(self.last(self.norms[-1](x, vector)), 2).tanh()
        return image[:, :, : self.size[0], : self.size[1]]
