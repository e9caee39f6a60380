"""The U-Net of denoising diffusion.

Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", appendix B, in the block layout
of Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models". On every level a
few residual blocks, each told the time t through e(t), a small network on sinusoidal features:

    h = conv(silu(norm(x))) + linear(silu(e)),    x <- x + conv(silu(norm(h)))

with self-attention on the levels whose feature maps are small, a strided convolution down to the
next level, nearest-neighbour upsampling and a convolution up again, and every output of the way
down concatenated to the input of its mirror block on the way up. The last convolution of each
residual block starts at zero, so a new network is nearly the identity between its skips.

With `norm = "scale-shift"`, `resample = "biggan"`, heads of 64 channels and attention on several
levels it is the ADM of Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis",
section 3: the second normalisation of each residual block is scaled and shifted by e instead,

    h = conv((1 + scale(e)) norm(h) + shift(e))          (AdaGN)

and levels are joined by residual blocks whose two branches are both resampled, as in BigGAN.

Pictures whose sides cannot be halved so often are continued at the right and lower edge by their
last pixels, up to the next size that can, and cut again at the end.

With `cross` each attention to the places is followed by one to the tokens of a caption: Rombach et
al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import (
    CrossAttention,
    Embedded,
    GroupNorm,
    attend,
    check_tokens,
    sinusoidal,
    upsample_conv,
)

Resample = Callable[[Tensor], Tensor]


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(channels, groups=min(32, channels // 4))


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResidualBlock(nn.Module):
    """Two convolutions, told the time between them, added to the input.

    Args:
        inputs: channels.
        outputs: channels.
        embedding: width of the time embedding.
        dropout: probability of dropping a feature before the second convolution.
        scale_shift: the time scales and shifts normalised features; else it shifts features.
        resample: halves or doubles the map, of the input and before the first convolution.
        rescale: divides the sum by sqrt(2), so that its variance stays: Song et al. 2021,
            "Score-Based Generative Modeling through Stochastic Differential Equations".
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        dropout: float,
        scale_shift: bool = False,
        resample: Resample | None = None,
        rescale: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample, self.rescale = scale_shift, resample, rescale
        self.norm_in = _norm(inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.shift = nn.Linear(embedding, 2 * outputs if scale_shift else outputs)
        self.norm_out = _norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, inputs, H, W), told by silu(e) (B, D), to (B, outputs, H', W')."""
        h = F.silu(self.norm_in(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv_in(h)
        told = self.shift(embedding).float()[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm_out(h), 1 + scale)
        else:
            h = self.norm_out(h + told)
        h = self.skip(x) + self.conv_out(self.dropout(F.silu(h)))
        return h * 0.5**0.5 if self.rescale else h


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, added to the input.

    With tokens of width `cross` also attention to these, added too.
    """

    def __init__(self, channels: int, head_channels: int | None, cross: int = 0) -> None:
        super().__init__()
        self.heads = 1 if head_channels is None else max(1, channels // head_channels)
        self.norm = _norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = _zero(nn.Linear(channels, channels))
        self.norm_cross = _norm(channels) if cross else None
        self.cross = CrossAttention(channels, cross, self.heads) if cross else None
        if self.cross is not None:
            _zero(self.cross.out)

    def forward(self, x: Tensor, told: Embedded) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        b, c, height, width = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        h = self.qkv(h).view(b, height * width, 3, self.heads, c // self.heads)
        q, k, v = h.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, HW, C / heads)
        h = attend(q, k, v).transpose(1, 2).flatten(2)  # (B, HW, C)
        x = x + self.out(h).transpose(1, 2).view(b, c, height, width)
        if self.cross is None or self.norm_cross is None:
            return x
        h = self.norm_cross(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        h = self.cross(h, told.tokens, told.mask)
        return x + h.transpose(1, 2).view(b, c, height, width)


class Level(nn.Module):
    """A residual block, then attention where the level has it."""

    def __init__(self, block: ResidualBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor, told: Embedded) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x, told)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by two, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2H, 2W)."""
        return upsample_conv(x, self.conv.weight, self.conv.bias)


class UNet(nn.Module):
    """The denoising U-Net: `network(x, time, embedded)`.

    The defaults are the CIFAR-10 network of Ho et al. (35.7 million parameters).

    Args:
        in_channels: channels of x, plus those of `embedded.image` where one is given.
        out_channels: channels of the output.
        channels: width of the first level.
        multipliers: width of each level in units of `channels`.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: feature map sizes that get self-attention.
        size: image size, which decides at which levels those are.
        patch: the network works on `patch` x `patch` pixels folded into channels.
        dropout: probability of dropping a feature inside residual blocks.
        head_channels: channels of an attention head; one head if None, as in Ho et al.
        embedding_dim: width of the time embedding, of `embedded.vector` and of `embedded.tokens`;
            4 * channels if None.
        norm: shift or scale-shift: what the time does between a residual block's convolutions.
        resample: conv, one convolution between levels; or biggan, a residual block.
        rescale: whether the sums of residual blocks are divided by sqrt(2).
        cross: whether attention to places is followed by attention to `embedded.tokens`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        size: int = 32,
        patch: int = 1,
        dropout: float = 0.0,
        head_channels: int | None = None,
        embedding_dim: int | None = None,
        norm: str = "shift",
        resample: str = "conv",
        rescale: bool = False,
        cross: bool = False,
    ) -> None:
        super().__init__()
        for what, said, known in (
            ("norm", norm, ("shift", "scale-shift")),
            ("resample", resample, ("conv", "biggan")),
        ):
            if said not in known:
                raise ValueError(f"{what} '{said}' is not one of {', '.join(known)}")
        self.multiple = patch * 2 ** (len(multipliers) - 1)
        self.in_channels, self.channels, self.patch = in_channels, channels, patch
        self.embedding_dim, self.cross = embedding_dim or 4 * channels, cross
        self.time = nn.Sequential(
            nn.Linear(channels, self.embedding_dim),
            nn.SiLU(),
            nn.Linear(self.embedding_dim, self.embedding_dim),
        )

        def level(
            inputs: int, outputs: int, attends: bool, change: Resample | None = None
        ) -> Level:
            block = ResidualBlock(
                inputs,
                outputs,
                self.embedding_dim,
                dropout,
                scale_shift=norm == "scale-shift",
                resample=change,
                rescale=rescale,
            )
            tokens = self.embedding_dim if cross else 0
            return Level(block, Attention(outputs, head_channels, tokens) if attends else None)

        def down(width: int) -> nn.Module:
            if resample == "biggan":
                return level(width, width, False, _halve)
            return nn.Conv2d(width, width, 3, stride=2, padding=1)

        def up(width: int) -> nn.Module:
            return level(width, width, False, _double) if resample == "biggan" else Upsample(width)

        width, resolution = channels, (size + -size % self.multiple) // patch
        self.conv_in = nn.Conv2d(in_channels * patch**2, width, 3, padding=1)
        skips = [width]
        self.down = nn.ModuleList()
        for depth, multiplier in enumerate(multipliers):
            if depth:
                self.down.append(down(width))
                skips.append(width)
                resolution //= 2
            for _ in range(blocks):
                self.down.append(level(width, multiplier * channels, resolution in attention))
                width = multiplier * channels
                skips.append(width)
        self.middle = nn.ModuleList([level(width, width, True), level(width, width, False)])
        self.up = nn.ModuleList()
        for depth, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                attends = resolution in attention
                self.up.append(level(width + skips.pop(), multiplier * channels, attends))
                width = multiplier * channels
            if depth:
                self.up.append(up(width))
                resolution *= 2
        self.norm_out = _norm(width)
        self.conv_out = _zero(nn.Conv2d(width, out_channels * patch**2, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, embedded: Embedded | None = None) -> Tensor:
        """Map images x (B, C, H, W) at times (B,) in [0, 1] to (B, out_channels, H, W).

        Raises:
            ValueError: tokens without `cross`, or the other way round.
        """
        embedded = embedded or Embedded()
        check_tokens(embedded, self.cross)
        height, width = x.shape[-2:]
        e = self.time(sinusoidal(1000 * time, self.channels))  # (B, D)
        if embedded.vector is not None:
            e = e + embedded.vector
        if embedded.image is not None:
            x = torch.cat([x, embedded.image], dim=1)
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        e = F.silu(e)
        x = self.conv_in(F.pixel_unshuffle(x, self.patch))
        skips = [x]
        for module in self.down:
            x = module(x, e, embedded) if isinstance(module, Level) else module(x)
            skips.append(x)
        for module in self.middle:
            x = module(x, e, embedded)
        for module in self.up:
            if not isinstance(module, Level):
                x = module(x)
            elif module.block.resample is None:
                x = module(torch.cat([x, skips.pop()], dim=1), e, embedded)
            else:
                x = module(x, e, embedded)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch)[..., :height, :width]
