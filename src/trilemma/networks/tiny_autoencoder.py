"""A tiny autoencoder beside that of Stable Diffusion: a hundredth of its work, for previews.

Bohan 2023, "TAESD: Tiny AutoEncoder for Stable Diffusion": three convolutions a block and nothing
that normalises; its latents are those of the large autoencoder, scaled already. Pictures are in
[0, 1] inside.

Weights have the names that they have in the vae/ of a diffusers folder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """act(x + three convolutions)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(
            convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return F.relu(x + self.conv(x))


class Part(nn.Module):
    """Layers one after another."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Apply them."""
        return self.layers(x)


class TinyAutoencoder(nn.Module):
    """Pictures in [-1, 1] to scaled latents, and back.

    Args:
        channels: width, at each size.
        encoder: blocks at each size, the picture's first.
        decoder: blocks at each size, the latents' first.
        latent: channels of the latents.
        scale: by which latents are multiplied once more; 1 in those there are.

    Attributes:
        factor: the picture's side over the latent's.
    """

    def __init__(
        self,
        channels: int = 64,
        encoder: Sequence[int] = (1, 3, 3, 3),
        decoder: Sequence[int] = (3, 3, 3, 1),
        latent: int = 4,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.latent, self.scale, self.factor = latent, scale, 2 ** (len(decoder) - 1)
        down: list[nn.Module] = []
        for i, blocks in enumerate(encoder):
            if i:
                down.append(nn.Conv2d(channels, channels, 3, 2, 1, bias=False))
            else:
                down.append(nn.Conv2d(3, channels, 3, padding=1))
            down += [Block(channels) for _ in range(blocks)]
        self.encoder = Part([*down, nn.Conv2d(channels, latent, 3, padding=1)])
        up: list[nn.Module] = [nn.Conv2d(latent, channels, 3, padding=1), nn.ReLU()]
        for i, blocks in enumerate(decoder):
            up += [Block(channels) for _ in range(blocks)]
            if i < len(decoder) - 1:
                up += [
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
                ]
        self.decoder = Part([*up, nn.Conv2d(channels, 3, 3, padding=1)])

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map images (B, 3, H, W) to latents (B, D, h, w); there is no noise in them."""
        return self.encoder((image + 1) / 2).float() * self.scale

    def decode(self, latent: Tensor, bands: bool = False) -> Tensor:
        """Map latents (B, D, h, w) to images (B, 3, H, W), not clipped; never in bands."""
        x = self.decoder(torch.tanh(latent / self.scale / 3) * 3)
        return x.float() * 2 - 1
