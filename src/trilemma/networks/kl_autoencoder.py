"""The autoencoder of Stable Diffusion: pictures to latents an eighth of their size, and back.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix G.
Latents are brought to about deviation 1: (mean - shift) * scale.

Large pictures are decoded in bands of rows: a map is a list of bands, and each band is replaced by
what is made of it as soon as the next one has been read, so that memory hardly holds more than the
largest map of all. Statistics of the normalisations are those of the whole map, and a convolution
sees the row on either side of its band: the picture is the same to rounding, without seams, and
nothing is computed twice.

Weights have the names that they have in the vae/ of a diffusers folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import GroupNorm, attend
from trilemma.networks.spatial_unet import Resize, Resnet, normed

EPS = 1e-6
BAND = 1 << 16  # pixels of a band of the picture, about


class PlaceAttention(nn.Module):
    """Attention of one head over all places, added to the map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(channels, groups, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        h = normed(self.group_norm, x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, C)
        q, k, v = (layer(h)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](attend(q, k, v)[:, 0])
        return x + h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Middle(nn.Module):
    """Two residual blocks with attention between them, if there is one."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        attentions = [PlaceAttention(channels, groups)] if attention else []
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(Resnet(channels, channels, 0, groups, EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Level(nn.Module):
    """Residual blocks at one size, and the way to the next."""

    def __init__(self, resnets: list[Resnet], resize: Resize | None, down: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        ways = [] if resize is None else [resize]
        self.downsamplers = nn.ModuleList(ways if down else [])
        self.upsamplers = nn.ModuleList([] if down else ways)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the next size, if there is one."""
        for resnet in self.resnets:
            x = resnet(x)
        for smaller in self.downsamplers:  # one row and column of 0 below and right
            x = smaller(F.pad(x, (0, 1, 0, 1)))
        for larger in self.upsamplers:
            x = larger(x, (2 * x.shape[2], 2 * x.shape[3]))
        return x


class Encoder(nn.Module):
    """Pictures to means and log-variances."""

    def __init__(
        self,
        channels: Sequence[int],
        blocks: int,
        out: int,
        groups: int,
        attention: bool,
        colours: int = 3,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(colours, channels[0], 3, padding=1)
        levels, before = [], channels[0]
        for i, width in enumerate(channels):
            resnets = [Resnet(width if j else before, width, 0, groups, EPS) for j in range(blocks)]
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
        return self.conv_out(F.silu(normed(self.conv_norm_out, self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to pictures, in two parts."""

    def __init__(
        self,
        channels: Sequence[int],
        blocks: int,
        latent: int,
        groups: int,
        attention: bool,
        colours: int = 3,
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
        self.conv_out = nn.Conv2d(before, colours, 3, padding=1)

    def first(self, latent: Tensor) -> Tensor:
        """Map latents (B, D, h, w) to features (B, C, h, w)."""
        return self.mid_block(self.conv_in(latent))

    def rest(self, x: Tensor) -> Tensor:
        """Map features (B, C, h, w) to pictures (B, 3, H, W)."""
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(normed(self.conv_norm_out, x))).float()

    def rest_in_bands(self, x: Tensor) -> Tensor:
        """Do the same in less memory; the features are written over."""
        larger = 2 ** (len(self.up_blocks) - 1)
        bands = list(x.split(max(BAND // (x.shape[3] * larger**2), 1), 2))
        for level in self.up_blocks:
            assert isinstance(level, Level)
            for resnet in level.resnets:
                assert isinstance(resnet, Resnet)
                resnet_in_bands(resnet, bands)
            for resize in level.upsamplers:
                assert isinstance(resize, Resize)
                for i, part in enumerate(conv_in_bands(resize.conv, bands, _doubled, 2)):
                    bands[i] = part
        act = activated(self.conv_norm_out, bands)
        return torch.cat([*conv_in_bands(self.conv_out, bands, act)], 2).float()


class StageEncoder(Encoder):
    """The encoder, to be trained in a first stage: `models.first_stage.AutoencoderKL`.

    Args:
        shape: (C, H, W) of the pictures; H and W divisible by 2 for each size but the first.
        latent: 2 D, for means and log-variances.
        channels: width at each size, the picture's first.
        blocks: residual blocks at each size.
        groups: of the normalisations.
        attention: there is attention at the smallest size.

    Attributes:
        grid: (h, w).
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int,
        channels: Sequence[int] = (64, 128, 128),
        blocks: int = 1,
        groups: int = 32,
        attention: bool = False,
    ) -> None:
        super().__init__(channels, blocks, latent, groups, attention, shape[0])
        self.widths, self.blocks, self.groups = list(channels), blocks, groups
        self.latent, factor = latent, 2 ** (len(channels) - 1)
        if shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"images of {shape[1]} x {shape[2]} do not divide by {factor}; choose a size that "
                f"does, or set data.multiple to {factor}"
            )
        self.grid = (shape[1] // factor, shape[2] // factor)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to grids (B, 2 D, h, w)."""
        return super().forward(image).float()


class StageDecoder(Decoder):
    """The decoder for it; one more residual block at each size.

    Args:
        shape: (C, H, W) of the pictures.
        latent: D.
        channels: as the encoder's, and the rest too.
        blocks: as the encoder's.
        groups: of the normalisations.
        attention: there is attention at the smallest size.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int,
        channels: Sequence[int] = (64, 128, 128),
        blocks: int = 1,
        groups: int = 32,
        attention: bool = False,
    ) -> None:
        super().__init__(channels, blocks, latent, groups, attention, shape[0])

    @property
    def last(self) -> Tensor:
        """The weights of the last convolution."""
        return self.conv_out.weight

    def forward(self, latent: Tensor) -> Tensor:
        """Map grids (B, D, h, w) to images (B, C, H, W), without a bound on their values."""
        return self.rest(self.first(latent))


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

    def decode(self, latent: Tensor, bands: bool = False) -> Tensor:
        """Map latents (B, D, h, w) to images (B, 3, H, W), not clipped.

        Args:
            latent: of the pictures.
            bands: in bands, which take less memory; not for training.
        """
        latent = latent / self.scale + self.shift
        if self.post_quant_conv is not None:
            latent = self.post_quant_conv(latent)
        x = self.decoder.first(latent)
        return self.decoder.rest_in_bands(x) if bands else self.decoder.rest(x)


def resnet_in_bands(resnet: Resnet, x: list[Tensor]) -> None:
    """Replace a map x, in bands, by resnet(x)."""
    h, short = [], resnet.conv_shortcut
    for i, part in enumerate(conv_in_bands(resnet.conv1, x, activated(resnet.norm1, x))):
        h.append(part)
        if short is not None:
            x[i] = short(x[i])
    for i, part in enumerate(conv_in_bands(resnet.conv2, h, activated(resnet.norm2, h))):
        x[i] += part


def conv_in_bands(
    conv: nn.Conv2d, x: list[Tensor], before: Callable[[Tensor], Tensor], factor: int = 1
) -> Iterator[Tensor]:
    """Yield conv(before(x)) of a map x, in bands, band after band.

    When a band has been yielded, the same band of x is read no more and can be replaced.

    Args:
        conv: of 3 x 3, padded to keep the size.
        x: its input, (B, C, rows, W) each, from top to bottom.
        before: acts on each row by itself, and makes `factor` rows of it.
        factor: see `before`.
    """
    above = None
    for i, band in enumerate(x):
        below = x[i + 1][:, :, :1] if i + 1 < len(x) else None
        part = before(torch.cat([rows for rows in (above, band, below) if rows is not None], 2))
        # One row on either side, of the `factor` that there are; of zeros beyond the picture.
        edges = (1 if rows is None else 1 - factor for rows in (above, below))
        part = F.pad(part, (0, 0, *edges))
        above = band[:, :, -1:].clone()
        yield F.conv2d(part, conv.weight, conv.bias, padding=(0, 1))


def activated(norm: GroupNorm, x: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return silu(norm(x)) as a function of rows of a map x, in bands, with its statistics."""
    count, channels = x[0].shape[:2]
    total = x[0].new_zeros(2, count, norm.groups, dtype=torch.float64)
    for band in x:  # two means; `torch.var_mean` takes five times as long on a CPU
        part = band.float()
        mean = part.mean((2, 3), keepdim=True)
        variance = (part - mean).square_().mean((2, 3))
        mean = mean.flatten(1).double()
        moments = torch.stack([mean, variance + mean**2])  # (2, B, C)
        total += band.shape[2] * moments.unflatten(2, (norm.groups, -1)).mean(3)
    mean, square = total / sum(band.shape[2] for band in x)
    told = torch.stack([mean, (square - mean**2 + norm.eps).rsqrt()]).float()
    mean, scale = told.repeat_interleave(channels // norm.groups, 2)  # (B, C) each
    scale = scale * norm.weight
    shift = (norm.bias - mean * scale)[:, :, None, None]
    scale = scale[:, :, None, None]
    return lambda part: F.silu((part.float() * scale).add_(shift), inplace=True)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
