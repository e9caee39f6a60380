"""Invertible networks: the layers of RealNVP and Glow, and both networks.

Dinh, Sohl-Dickstein, Bengio (2017), "Density Estimation Using Real NVP"; Kingma, Dhariwal (2018),
"Glow: Generative Flow with Invertible 1x1 Convolutions". Each layer is a bijection y = f(x) that
tells log |det dy/dx|, of each image:

    actnorm           y = exp(s) (x + b), s, b of each channel    H W sum s       (Glow, 3.1)
    1x1 convolution   y = P L (U + diag(d)) x at each pixel       H W sum log |d|  (Glow, 3.2)
    coupling          y_a = x_a,  y_b = exp(s) x_b + t,           sum s           (RealNVP, 3.2-3.4)
                      where s and t are any functions of x_a
    squeeze           2 x 2 pixels to channels                    0               (RealNVP, 3.6)
    logit             logit of a pixel, drawn in from 0 and 1     its slope's     (RealNVP, 4.1)

The bijections themselves, log-determinants included, are computed in the format of x, float32 or
wider, whatever autocast says; only the networks that make s and t follow autocast. s and t may be
any function of x_a, a rounded one too, so the likelihood stays exact; what comes back through the
inverse is then off by a fraction of a level.

Three departures from the papers, all to make the loss of an image its own affair, whatever the
batch, the split of a batch or the number of processes:

- Actnorm begins as the identity, not from the statistics of the first batch, and learns at
  `PACE` times the rate. Pixels lie in [-1, 1] already; the layers of a level move together, so a
  scale that is wrong by a factor of 10 is put right in some tens of Adam's steps.
- RealNVP has actnorm where the paper has batch normalisation, as Glow argues (section 3.1).
- s = g tanh(.), with one learned g for each channel, as in RealNVP, for Glow as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACE = 3.0  # how much faster than others the log-scales of actnorm learn (Glow's code, too)
MARGIN = 0.05  # by which the logit pulls pixels in from 0 and 1


class Bijection(nn.Module, ABC):
    """An invertible layer."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, C, H, W) to y (B, C', H', W') and log |det dy/dx|, (B,) or one for all."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """Map y back to x."""


class Chain(Bijection):
    """One bijection after the other."""

    def __init__(self, *layers: Bijection) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x forward; the log-determinants add up."""
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, log_det = layer(x)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor) -> Tensor:
        """Undo the layers, last first."""
        for layer in reversed(self.layers):
            y = cast(Bijection, layer).inverse(y)
        return y


class Squeeze(Bijection):
    """2 x 2 pixels become 4 channels: (B, C, H, W) to (B, 4 C, H / 2, W / 2)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Fold; a permutation of numbers has determinant 1."""
        return F.pixel_unshuffle(x, 2), x.new_zeros(())

    def inverse(self, y: Tensor) -> Tensor:
        """Unfold."""
        return F.pixel_shuffle(y, 2)


class Logit(Bijection):
    """The logit of a + (1 - 2 a) u, of pixels u = (x + 1) / 2 in [0, 1], a = MARGIN."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map [-1, 1] to a little less than all numbers."""
        p = MARGIN + (0.5 - MARGIN) * (x + 1)
        low, high = p.log(), (1 - p).log()
        slope = torch.as_tensor(0.5 - MARGIN, dtype=x.dtype, device=x.device).log()
        return low - high, (slope - low - high).flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """Map all numbers to a little more than [-1, 1]."""
        return (y.sigmoid() - MARGIN) / (0.5 - MARGIN) - 1


class ActNorm(Bijection):
    """A scale and a shift of each channel, the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift, then scale."""
        log_scale = PACE * self.log_scale
        return (x + self.bias) * log_scale.exp(), x[0, 0].numel() * log_scale.sum()

    def inverse(self, y: Tensor) -> Tensor:
        """Scale back, then shift back."""
        return y * (-PACE * self.log_scale).exp() - self.bias


class InvertibleConv(Bijection):
    """A 1x1 convolution by W = P L (U + diag(d)), a random rotation at first.

    P is a permutation that stays, L lower triangular with ones on its diagonal, U strictly upper
    triangular; the signs of d stay, so W remains invertible.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.permutation: Tensor
        self.sign: Tensor
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))

    def _triangles(self) -> tuple[Tensor, Tensor]:
        """Return L and U + diag(d), (C, C) each."""
        one = torch.eye(len(self.sign), dtype=self.lower.dtype, device=self.lower.device)
        diagonal = torch.diag(self.sign * self.log_diagonal.exp())
        return self.lower.tril(-1) + one, self.upper.triu(1) + diagonal

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply each pixel by W."""
        with torch.autocast(x.device.type, enabled=False):
            lower, upper = self._triangles()
            y = F.conv2d(x, (self.permutation @ lower @ upper)[:, :, None, None])
        return y, x[0, 0].numel() * self.log_diagonal.sum()

    def inverse(self, y: Tensor) -> Tensor:
        """Multiply each pixel by the inverse of W, found by two triangular systems."""
        with torch.autocast(y.device.type, enabled=False):
            lower, upper = self._triangles()
            half = torch.linalg.solve_triangular(
                lower, self.permutation.T, upper=False, unitriangular=True
            )
            inverse = torch.linalg.solve_triangular(upper, half, upper=True)
            return F.conv2d(y, inverse[:, :, None, None])


class Scale(nn.Module):
    """Cuts what a network makes (B, 2 C, H, W) into log-scale, g tanh(.), and shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, raw: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-scale and shift (B, C, H, W), in the format of `like`."""
        log_scale, shift = raw.to(like.dtype).chunk(2, dim=1)
        return self.gain * log_scale.tanh(), shift


class Coupling(Bijection):
    """One half of the channels scales and shifts the other.

    Args:
        channels: C, even.
        network: maps the half that stays (B, C / 2, H, W) to (B, C, H, W).
        flip: the second half stays, rather than the first.
    """

    def __init__(self, channels: int, network: nn.Module, flip: bool = False) -> None:
        super().__init__()
        self.network, self.flip = network, flip
        self.scale = Scale(channels // 2)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, dim=1)
        return (second, first) if self.flip else (first, second)

    def _join(self, stays: Tensor, moves: Tensor) -> Tensor:
        return torch.cat([moves, stays] if self.flip else [stays, moves], dim=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift one half."""
        stays, moves = self._halves(x)
        log_scale, shift = self.scale(self.network(stays), x)
        return self._join(stays, moves * log_scale.exp() + shift), log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """Shift and scale it back: the other half, which says how, is there unchanged."""
        stays, moves = self._halves(y)
        log_scale, shift = self.scale(self.network(stays), y)
        return self._join(stays, (moves - shift) * (-log_scale).exp())


class Checkerboard(Bijection):
    """The pixels of one colour of a checkerboard scale and shift those of the other.

    Args:
        channels: C.
        network: maps (B, C, H, W), with the pixels that move at 0, to (B, 2 C, H, W).
        parity: 0 or 1, the colour that stays.
    """

    def __init__(self, channels: int, network: nn.Module, parity: int) -> None:
        super().__init__()
        self.network, self.parity = network, parity
        self.scale = Scale(channels)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(x.shape[2], device=x.device)[:, None]
        columns = torch.arange(x.shape[3], device=x.device)
        stays = ((rows + columns) % 2 == self.parity).to(x.dtype)  # (H, W)
        log_scale, shift = self.scale(self.network(x * stays), x)
        return log_scale * (1 - stays), shift * (1 - stays)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift the pixels of one colour."""
        log_scale, shift = self._affine(x)
        return x * log_scale.exp() + shift, log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """Shift and scale them back."""
        log_scale, shift = self._affine(y)
        return (y - shift) * (-log_scale).exp()


class MultiScale(nn.Module):
    """Levels of bijections; after each but the last, half of the channels are done.

    RealNVP, section 3.6. What is done goes into the latent as it is, or, with a network in
    `priors`, less a mean and over a scale that are functions of what goes on: the half is then
    Gaussian under that mean and scale (Glow's code). The latent is one row, the last level first.

    Args:
        shape: (C, H, W) of the pictures.
        levels: the bijections.
        priors: for each level but the last, maps what goes on (B, C / 2, h, w) to (B, C, h, w); or
            empty.
    """

    def __init__(
        self, shape: Sequence[int], levels: Sequence[Bijection], priors: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.levels = nn.ModuleList(levels)
        channels, height, width = shape
        self.sizes = []  # of the parts of a latent, in the order in which they are done
        for _ in levels[:-1]:
            channels, height, width = 2 * channels, height // 2, width // 2
            self.sizes.append((channels, height, width))
        self.sizes.append((4 * channels, height // 2, width // 2))
        self.done = nn.ModuleList(
            Coupling(2 * size[0], prior) for size, prior in zip(self.sizes, priors, strict=False)
        )

    @property
    def top(self) -> int:
        """How many numbers of a latent come from the last level: the first ones."""
        channels, height, width = self.sizes[-1]
        return channels * height * width

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map pictures (B, C, H, W) to latents (B, C H W) and the log-determinant (B,)."""
        total, parts = x.new_zeros(len(x)), []
        for i, level in enumerate(self.levels):
            x, log_det = level(x)
            total = total + log_det
            if i < len(self.levels) - 1:
                if self.done:
                    x, log_det = self.done[i](x)
                    total = total + log_det
                x, part = x.chunk(2, dim=1)
                parts.append(part.flatten(1))
        return torch.cat([x.flatten(1), *reversed(parts)], dim=1), total

    def forward(self, latent: Tensor) -> Tensor:
        """Map latents (B, C H W) to pictures (B, C, H, W)."""
        counts = [channels * height * width for channels, height, width in self.sizes]
        parts = latent.split(counts[::-1], dim=1)[::-1]
        x = parts[-1].unflatten(1, self.sizes[-1])
        for i in reversed(range(len(self.levels))):
            if i < len(self.levels) - 1:
                x = torch.cat([x, parts[i].unflatten(1, self.sizes[i])], dim=1)
                if self.done:
                    x = cast(Bijection, self.done[i]).inverse(x)
            x = cast(Bijection, self.levels[i]).inverse(x)
        return x


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    """Start at 0: what a coupling does begins as the identity."""
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _check(shape: Sequence[int], levels: int) -> None:
    _, height, width = shape
    if levels < 1 or height % 2**levels or width % 2**levels:
        raise ValueError(
            f"pictures of {width}x{height} cannot be halved {levels} times; take sides that are a "
            f"multiple of {2 ** max(1, levels)} ([data] multiple), or fewer levels"
        )


class Glow(MultiScale):
    """Glow: at each level a squeeze, then steps of actnorm, 1x1 convolution and coupling.

    Args:
        shape: (C, H, W) of the pictures.
        levels: L; the sides must halve so often.
        steps: K, at each level.
        channels: width of the coupling networks.
    """

    def __init__(
        self, shape: Sequence[int], levels: int = 2, steps: int = 16, channels: int = 128
    ) -> None:
        _check(shape, levels)
        chains, priors = [], []
        c = shape[0]
        for level in range(levels):
            c *= 4
            layers: list[Bijection] = [Squeeze()]
            for _ in range(steps):
                network = _three_convolutions(c // 2, channels, c)
                layers += [ActNorm(c), InvertibleConv(c), Coupling(c, network)]
            chains.append(Chain(*layers))
            if level < levels - 1:
                c //= 2
                priors.append(_zero(nn.Conv2d(c, 2 * c, 3, padding=1)))
        super().__init__(shape, chains, priors)


def _three_convolutions(channels: int, width: int, out: int) -> nn.Sequential:
    """Glow, section 5: 3x3, 1x1 and 3x3 convolutions with ReLU between them, the last at 0."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.ReLU(),
        _zero(nn.Conv2d(width, out, 3, padding=1)),
    )


class RealNVP(MultiScale):
    """RealNVP: at each level couplings on checkerboards, a squeeze, couplings on channels.

    The last level ends with couplings on checkerboards after its squeeze, too (section 3.6).

    Args:
        shape: (C, H, W) of the pictures.
        levels: the sides must halve so often.
        couplings: of each kind at each level.
        channels: width of the coupling networks.
        blocks: residual blocks of each coupling network.
    """

    def __init__(
        self,
        shape: Sequence[int],
        levels: int = 2,
        couplings: int = 4,
        channels: int = 64,
        blocks: int = 2,
    ) -> None:
        _check(shape, levels)
        chains = []
        c = shape[0]

        def checkerboards(c: int) -> list[Bijection]:
            made: list[Bijection] = []
            for i in range(couplings):
                network = ResidualNetwork(c, channels, 2 * c, blocks)
                made += [Checkerboard(c, network, i % 2), ActNorm(c)]
            return made

        for level in range(levels):
            layers: list[Bijection] = [Logit()] if level == 0 else []
            layers += [*checkerboards(c), Squeeze()]
            c *= 4
            for i in range(couplings):
                network = ResidualNetwork(c // 2, channels, c, blocks)
                layers += [Coupling(c, network, flip=i % 2 == 1), ActNorm(c)]
            if level == levels - 1:
                layers += checkerboards(c)
            chains.append(Chain(*layers))
            c //= 2
        super().__init__(shape, chains)


class ResidualNetwork(nn.Module):
    """A convolution, residual blocks of two, and one more that starts at 0."""

    def __init__(self, channels: int, width: int, out: int, blocks: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                _zero(nn.Conv2d(width, width, 1)),
            )
            for _ in range(blocks)
        )
        self.leave = _zero(nn.Conv2d(width, out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, out, H, W)."""
        h = self.enter(x)
        for block in self.blocks:
            h = h + block(h)
        return self.leave(F.relu(h))
