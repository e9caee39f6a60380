"""Convolutions with many weights on few pixels, as matrix products: the same numbers, sooner.

A convolution is the product of all windows of its input with its filters (Chellapilla, Puri, Simard
2006, "High Performance Convolutional Neural Networks for Document Processing"). A transposed one is
a product that makes windows, added up where they overlap. Taking windows and adding them up are
linear, and each is the other's transpose, so each is the other's gradient.

PyTorch's convolutions on a CPU (oneDNN) rearrange their weights at every call; with a thousand
channels on maps of 1 to 7 pixels a training step consists of that. A product does not, but copies
each pixel as often as windows overlap there. So it pays where there are many weights to a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# With so many weights to a pixel a product is the faster one, at any batch: docs/benchmarks.md.
WEIGHTS_PER_PIXEL = 100_000
LEARNING = 20_000  # the same in bfloat16, where the weights learn


def use(module: nn.Module) -> None:
    """Let the convolutions in `module` be products where that pays; parameters and names stay."""
    for part in module.modules():
        if not isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            continue
        zeros = part.padding_mode == "zeros" and not isinstance(part.padding, str)
        if part.groups > 1 or part.dilation != (1, 1) or not zeros:
            continue
        if isinstance(part, nn.Conv2d):
            part._conv_forward = MethodType(_conv2d, part)  # type: ignore[method-assign]
        elif type(part).forward is nn.ConvTranspose2d.forward:
            part.forward = MethodType(_conv_transpose2d, part)  # type: ignore[method-assign]


def _conv2d(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert not isinstance(layer.padding, str)
    sides = zip(x.shape[2:], layer.padding, layer.kernel_size, layer.stride, strict=False)
    pixels = [(n + 2 * p - k) // s + 1 for n, p, k, s in sides]
    if not _pays(x, weight, pixels):
        return nn.Conv2d._conv_forward(layer, x, weight, bias)
    return conv2d(x, weight, bias, layer.stride, layer.padding)


def _conv_transpose2d(
    layer: nn.ConvTranspose2d, x: Tensor, output_size: list[int] | None = None
) -> Tensor:
    assert not isinstance(layer.padding, str)
    if output_size is not None or not _pays(x, layer.weight, x.shape[2:]):
        return nn.ConvTranspose2d.forward(layer, x, output_size)
    more = layer.output_padding
    return conv_transpose2d(x, layer.weight, layer.bias, layer.stride, layer.padding, more)


def _pays(x: Tensor, weight: Tensor, pixels: Sequence[int]) -> bool:
    if x.device.type != "cpu" or x.ndim != 4:
        return False
    learns = torch.is_grad_enabled() and weight.requires_grad
    least = LEARNING if learns and _format(x) == torch.bfloat16 else WEIGHTS_PER_PIXEL
    return 0 < least * pixels[0] * pixels[1] <= weight.numel()


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """`F.conv2d` of x (B, C, H, W) and weights (O, C, h, w); to be differentiated at will."""
    windows = _Windows.apply(x.to(_format(x)), weight.shape[2:], stride, padding)
    rows = windows.flatten(0, 2).flatten(1)  # (B H' W', h w C)
    out = F.linear(rows, weight.permute(0, 2, 3, 1).flatten(1), bias)
    return out.unflatten(0, windows.shape[:3]).permute(0, 3, 1, 2)


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:
    """`F.conv_transpose2d` of x (B, C, H, W) and weights (C, O, h, w)."""
    kernel = weight.shape[2:]
    sides = zip(x.shape[2:], stride, padding, kernel, output_padding, strict=True)
    size = [(n - 1) * s - 2 * p + k + more for n, s, p, k, more in sides]
    pixels = x.permute(0, 2, 3, 1)
    rows = pixels.flatten(0, 2) @ weight.permute(0, 2, 3, 1).flatten(1)  # (B H W, h w O)
    windows = rows.view(*pixels.shape[:3], *kernel, -1)
    image = _Sum.apply(windows, size, stride, padding)
    return image if bias is None else image + bias.to(image.dtype)[:, None, None]


def _format(x: Tensor) -> torch.dtype:
    """Return the number format in which x is multiplied: autocast's, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Windows(torch.autograd.Function):
    """Maps images (B, C, H, W) to their windows (B, H', W', h, w, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> Tensor:
        ctx.rest = image.shape[2:], stride, padding
        image = image.contiguous(memory_format=torch.channels_last)
        (top, left), (down, across) = padding, stride
        rows = F.pad(image, (left, left, top, top)).permute(0, 2, 3, 1)
        windows = rows.unfold(1, kernel[0], down).unfold(2, kernel[1], across)
        return windows.permute(0, 1, 2, 4, 5, 3).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Sum.apply(gradient, *ctx.rest), None, None, None


class _Sum(torch.autograd.Function):
    """Maps windows (B, H', W', h, w, C) to images (B, C, *size): sums in float32 at least."""

    @staticmethod
    def forward(
        ctx: Any,
        windows: Tensor,
        size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> Tensor:
        count, high, wide, *kernel, channels = windows.shape
        ctx.rest = kernel, stride, padding
        (top, left), (down, across) = padding, stride
        wider = torch.promote_types(windows.dtype, torch.float32)
        canvas = windows.new_zeros(
            count, size[0] + 2 * top, size[1] + 2 * left, channels, dtype=wider
        )
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                part = canvas[:, i : i + down * high : down, j : j + across * wide : across]
                part += windows[:, :, :, i, j]
        inner = canvas[:, top : top + size[0], left : left + size[1]].to(windows.dtype)
        return inner.contiguous().permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Windows.apply(gradient, *ctx.rest), None, None, None
