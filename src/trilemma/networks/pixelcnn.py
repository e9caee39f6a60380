"""A gated PixelCNN in two streams, that draws a picture at the cost of one pass over it.

van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders": the down stream
sees the rows above a pixel, the right stream what is left of it in its row, and the down stream
tells the right one at every block, so that together they see all that comes before in raster order
and have no blind spot (figure 1). A block is a gated convolution, told the class (equation 4),

    y = tanh(W_f * x + V_f^T h) sigmoid(W_g * x + V_g^T h),

with a residual connection around it. Rather than by masks, causality comes from shifting the input
by one and padding on one side (Salimans et al. 2017, "PixelCNN++", section 2.3). Dilations let few
blocks see the whole picture (van den Oord et al. 2016, "WaveNet", section 2.1), and instead of a
channel of ones the streams read two of coordinates, 0 outside of the picture.

With a Memory each convolution keeps the end of its input, so that a feature is computed once and
never again (Ramachandran et al. 2017, "Fast Generation for Convolutional Autoregressive Models"): a
picture of H x W pixels takes H steps of the down stream, W pixels each, and H W of the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOWN, RIGHT = 2, 3  # the axes along which the streams flow

Past = dict[nn.Module, Tensor]
"""The end of every convolution's input."""


@dataclass
class Memory:
    """What PixelCNN remembers between two pixels.

    Attributes:
        row: of the next pixel; begins at the first row that is to be drawn.
        column: of the next pixel.
        rows: how many rows the down stream has come to know.
        down: the past of the down stream.
        right: the past of the right stream in this row.
        told: what the down stream tells the right one in this row, (B, 2C, 1, W) for each block.
    """

    row: int = 0
    column: int = 0
    rows: int = 0
    down: Past = field(default_factory=dict)
    right: Past = field(default_factory=dict)
    told: list[Tensor] = field(default_factory=list)


class CausalConv(nn.Module):
    """A convolution that looks back along `axis`: at its own place and at what came before.

    Before the first place are zeros, or what `past` kept of the call before. Across the other axis
    it looks to both sides.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], axis: int, dilation: int = 1
    ) -> None:
        super().__init__()
        self.axis, self.reach = axis, dilation * (kernel[axis - 2] - 1)
        across = dilation * (kernel[1] // 2) if axis == DOWN else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=(0, across), dilation=dilation)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h, w); `past` is read and brought up to date."""
        if past is not None and self in past:
            x = torch.cat([past[self], x], self.axis)
        else:
            x = F.pad(x, (0, 0, self.reach, 0) if self.axis == DOWN else (self.reach, 0))
        if past is not None:
            past[self] = x.narrow(self.axis, x.shape[self.axis] - self.reach, self.reach)
        return self.conv(x)


class Block(nn.Module):
    """x + out(tanh(a) sigmoid(b)), where a, b = conv(x) + told.

    `told` is (B, 2C, 1 or h, 1 or w): the class, and in the right stream the down stream.
    """

    def __init__(self, channels: int, kernel: tuple[int, int], axis: int, dilation: int) -> None:
        super().__init__()
        self.conv = CausalConv(channels, 2 * channels, kernel, axis, dilation)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, told: Tensor | None, past: Past | None) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        h = self.conv(x, past)
        a, b = (h if told is None else h + told).chunk(2, dim=1)
        return x + self.out(a.tanh() * b.sigmoid())


class PixelCNN(nn.Module):
    """Features of every pixel from the pixels before it in raster order, and the class.

    Args:
        in_channels: of the picture.
        channels: width of both streams.
        dilations: of the blocks; two rows and three columns, so far apart, meet in each.
        classes: K, 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 32,
        dilations: Sequence[int] = (1, 2, 4, 8, 1, 2, 4),
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.width = channels
        self.down_in = CausalConv(in_channels + 2, channels, (3, 7), DOWN)
        self.right_in = CausalConv(in_channels + 2, channels, (1, 4), RIGHT)
        self.down = nn.ModuleList(Block(channels, (2, 3), DOWN, d) for d in dilations)
        self.right = nn.ModuleList(Block(channels, (1, 2), RIGHT, d) for d in dilations)
        self.tell = nn.ModuleList(nn.Conv2d(channels, 2 * channels, 1) for _ in dilations)
        both = 2 * 2 * channels * len(dilations)
        self.label = nn.Linear(classes, both, bias=False) if classes else None

    def forward(self, image: Tensor, label: Tensor, memory: Memory | None = None) -> Tensor:
        """Map images (B, in_channels, H, W) and labels (B, K) to features of each pixel.

        Args:
            image: in [-1, 1].
            label: one-hot rows.
            memory: of the calls before, which were for the pixels before, with the same label.

        Returns:
            (B, channels, H, W); with `memory`, of the next pixel alone, (B, channels, 1, 1), and
            only the pixels before it in `image` are read.
        """
        height, width = image.shape[2:]
        if memory is None:
            told = self._down(self._read(image, -1, height - 1), label, None)
            return self._right(F.pad(self._read(image, 0, height), (1, -1)), told, None)
        row, column = memory.row, memory.column
        if column == 0:
            above = self._read(image, memory.rows - 1, row)
            memory.told = [told[:, :, -1:] for told in self._down(above, label, memory.down)]
            memory.rows, memory.right = row + 1, {}
        left = F.pad(self._read(image, row, row + 1), (1, -1))[..., column : column + 1]
        told = [each[..., column : column + 1] for each in memory.told]
        memory.row, memory.column = (row, column + 1) if column + 1 < width else (row + 1, 0)
        return self._right(left, told, memory.right)

    def _read(self, image: Tensor, start: int, stop: int) -> Tensor:
        """Return rows start to stop of image and coordinates; row -1, above it, is zero."""
        height, width = image.shape[2:]
        rows = F.pad(image[:, :, max(start, 0) : stop], (0, 0, max(-start, 0), 0))
        down = torch.arange(start + 1, stop + 1, device=image.device)[:, None] / height
        across = torch.arange(1, width + 1, device=image.device) / width
        place = torch.stack([down.expand(-1, width), across * (down > 0)])  # (2, h, W)
        return torch.cat([rows, place.to(rows.dtype).expand(len(rows), -1, -1, -1)], dim=1)

    def _down(self, above: Tensor, label: Tensor, past: Past | None) -> list[Tensor]:
        """Return what each block of the right stream is told, (B, 2C, h, W)."""
        v = self.down_in(above, past)
        of_class: list[Tensor | None] = [None] * (2 * len(self.down))
        if self.label is not None:
            of_class = list(self.label(label)[:, :, None, None].chunk(2 * len(self.down), dim=1))
        told = []
        for i, (block, tell) in enumerate(zip(self.down, self.tell, strict=True)):
            v = block(v, of_class[2 * i], past)
            h, bias = tell(v), of_class[2 * i + 1]
            told.append(h if bias is None else h + bias)
        return told

    def _right(self, left: Tensor, told: Sequence[Tensor], past: Past | None) -> Tensor:
        """Return the features (B, C, h, w) of the pixels right of `left`."""
        h = self.right_in(left, past)
        for block, each in zip(self.right, told, strict=True):
            h = block(h, each, past)
        return h
