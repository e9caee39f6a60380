"""The autoencoder of Stable Diffusion: pictures to latents an eighth of their size, and back.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix G.
Latents are brought to about deviation 1: (mean - shift) * scale.

Decoding in tiles: the first part, whose attention sees the whole picture, is computed whole, as it
is small; what follows, which takes the memory, in tiles that overlap. There each output pixel is a
mean of the tiles it lies in, with weights that fall evenly to 0 at a tile's border, so that there
are no seams. What is left of a difference comes from the normalisations, which see one tile each.

Weights have the names that they have in the vae/ of a diffusers folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import GroupNorm, attend
from trilemma.networks.spatial_unet import Resize, Resnet

EPS = 1e-6
OVERLAP = 16  # of tiles at least, in latent pixels: the rest of the decoder sees about so far


class PlaceAttention(nn.Module):
    """Attention of one head over all places, added to the map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(channels, groups, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        h = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, C)
        q, k, v = (layer(h)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](attend(q, k, v)[:, 0])
        return x + h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Middle(nn.Module):
    """Two residual blocks with attention between them, if there is one."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        if attention:
            self.attentions = nn.ModuleList([PlaceAttention(channels, groups)])
        self.resnets = nn.ModuleList(
            Resnet(channels, channels, 0, groups, EPS) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Level(nn.Module):
    """Residual blocks at one size, and the way to the next."""

    def __init__(self, resnets: list[Resnet], resize: Resize | None, down: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if resize is not None:
            setattr(self, "downsamplers" if down else "upsamplers", nn.ModuleList([resize]))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the next size, if there is one."""
        for resnet in self.resnets:
            x = resnet(x)
        if hasattr(self, "downsamplers"):  # one row and column of 0 below and right
            x = self.downsamplers[0](F.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, (2 * x.shape[2], 2 * x.shape[3]))
        return x


class Encoder(nn.Module):
    """Pictures to means and log-variances."""

    def __init__(
        self, channels: Sequence[int], blocks: int, out: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        levels, before = [], channels[0]
        for i, width in enumerate(channels):
            resnets = [
                Resnet(width if j else before, width, 0, groups, EPS) for j in range(blocks)
            ]
            smaller = Resize(width, 2, padding=0) if i < len(channels) - 1 else None
            levels.append(Level(resnets, smaller, down=True))
            before = width
        self.down_blocks = nn.ModuleList(levels)
        self.mid_block = Middle(before, groups, attention)
        self.conv_norm_out = GroupNorm(before, groups, EPS)
        self.conv_out = nn.Conv2d(before, out, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, out, h, w)."""
        x = self.conv_in(image)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to pictures, in two parts."""

    def __init__(
        self, channels: Sequence[int], blocks: int, latent: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        before = channels[-1]
        self.conv_in = nn.Conv2d(latent, before, 3, padding=1)
        levels = []
        for i in reversed(range(len(channels))):
            width = channels[i]
            resnets = [
                Resnet(width if j else before, width, 0, groups, EPS) for j in range(blocks + 1)
            ]
            levels.append(Level(resnets, Resize(width, 1) if i else None, down=False))
            before = width
        self.up_blocks = nn.ModuleList(levels)
        self.mid_block = Middle(channels[-1], groups, attention)
        self.conv_norm_out = GroupNorm(before, groups, EPS)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def first(self, latent: Tensor) -> Tensor:
        """Map latents (B, D, h, w) to features (B, C, h, w)."""
        return self.mid_block(self.conv_in(latent))

    def rest(self, x: Tensor) -> Tensor:
        """Map features (B, C, h, w) to pictures (B, 3, H, W)."""
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x))).float()


class KLAutoencoder(nn.Module):
    """Pictures in [-1, 1] to latents of about deviation 1, and back.

    Args:
        channels: width at each size, the picture's first; each size is half the one before.
        blocks: residual blocks at each size; one more in the decoder.
        latent: channels of the latents.
        scale: by which means are multiplied.
        shift: taken off them first.
        outer: there are convolutions of 1 x 1 around the latents.
        attention: there is attention at the smallest size.
        groups: of the normalisations.

    Attributes:
        factor: the picture's side over the latent's.
    """

    def __init__(
        self,
        channels: Sequence[int] = (128, 256, 512, 512),
        blocks: int = 2,
        latent: int = 4,
        scale: float = 0.18215,
        shift: float = 0.0,
        outer: bool = True,
        attention: bool = True,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.latent, self.scale, self.shift = latent, scale, shift
        self.factor = 2 ** (len(channels) - 1)
        self.encoder = Encoder(channels, blocks, 2 * latent, groups, attention)
        self.decoder = Decoder(channels, blocks, latent, groups, attention)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if outer else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if outer else None

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, 3, H, W) to means and deviations (B, D, h, w) before scale and shift."""
        x = self.encoder(image)
        if self.quant_conv is not None:
            x = self.quant_conv(x)
        mean, log_variance = x.float().chunk(2, dim=1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map images (B, 3, H, W) to latents (B, D, h, w): means, or draws by standard noise."""
        mean, deviation = self.posterior(image)
        latent = mean if noise is None else mean + deviation * noise
        return (latent - self.shift) * self.scale

    def decode(self, latent: Tensor, tile: int = 0) -> Tensor:
        """Map latents (B, D, h, w) to images (B, 3, H, W), not clipped.

        Args:
            latent: of the pictures.
            tile: side of tiles, in latent pixels; 0 for one tile.
        """
        latent = latent / self.scale + self.shift
        if self.post_quant_conv is not None:
            latent = self.post_quant_conv(latent)
        x = self.decoder.first(latent)
        if not tile or tile >= max(x.shape[2:]):
            return self.decoder.rest(x)
        return tiled(self.decoder.rest, x, tile, self.factor)


def tiled(decode: Callable[[Tensor], Tensor], x: Tensor, tile: int, factor: int) -> Tensor:
    """Decode x (B, C, h, w) in tiles that overlap, faded into one another.

    Args:
        decode: maps (B, C, tile, tile) to pictures `factor` times as large.
        x: what is decoded.
        tile: side of a tile in pixels of x.
        factor: see `decode`.
    """
    height, width = x.shape[2:]
    total = weight = None
    for top in _starts(height, tile):
        for left in _starts(width, tile):
            part = decode(x[:, :, top : top + tile, left : left + tile])
            if total is None or weight is None:
                shape = (len(x), part.shape[1], height * factor, width * factor)
                total, weight = part.new_zeros(shape), part.new_zeros(shape[2:])
            rows = slice(top * factor, top * factor + part.shape[2])
            columns = slice(left * factor, left * factor + part.shape[3])
            fades = [_fade(side, OVERLAP * factor, part) for side in part.shape[2:]]
            mask = fades[0][:, None] * fades[1]
            total[:, :, rows, columns] += mask * part
            weight[rows, columns] += mask
    assert total is not None and weight is not None
    return total / weight


def _starts(size: int, tile: int) -> list[int]:
    """Return where tiles begin, evenly; the last ends at the border."""
    more = -(-(size - tile) // max(tile - OVERLAP, 1)) if size > tile else 0
    return [round(i * (size - tile) / max(more, 1)) for i in range(more + 1)]


def _fade(size: int, width: int, like: Tensor) -> Tensor:
    """Return (size,) weights that rise evenly over `width` pixels from either end to 1."""
    place = torch.arange(size, device=like.device, dtype=like.dtype) + 0.5
    return (torch.minimum(place, size - place) / width).clamp(max=1)
