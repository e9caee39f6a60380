"""Small pieces that several networks share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Embedded:
    """A condition as networks read it; each field may be absent.

    Attributes:
        vector: (B, D), joined to the time embedding.
        tokens: (B, T, D), a sequence to attend to.
        image: (B, C, H, W), concatenated to the input.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    image: Tensor | None = None


def sinusoidal(position: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sine and cosine features (B, dim) of positions (B,); Vaswani et al. 2017, section 3.5.

    `dim` must be even.
    """
    half = dim // 2
    exponent = torch.arange(half, device=position.device, dtype=torch.float32) / half
    angle = position.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (B, half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def one_hot(label: Tensor | None, classes: int, count: int, device: torch.device) -> Tensor:
    """Labels (B,) as rows (B, classes) of zeros and a one; `classes` may be 0: (B, 0).

    Raises ValueError when there are classes and no label, or a label that is none of them.
    """
    if not classes:
        return torch.zeros(count, 0, device=device)
    if label is None:
        raise ValueError(f"this model draws one of {classes} classes: it needs a label")
    if label.numel() and not 0 <= int(label.min()) <= int(label.max()) < classes:
        raise ValueError(
            f"labels from {int(label.min())} to {int(label.max())} were given; "
            f"the model knows 0 to {classes - 1}"
        )
    return F.one_hot(label, classes).float()


def check_shape(what: str, tensor: Tensor, *shape: int) -> None:
    """Raise ValueError when a batch of `what` is not of shape (B, *shape)."""
    if tensor.shape[1:] != shape:
        raise ValueError(
            f"{what} of shape {tuple(tensor.shape)} were given; "
            f"expected (B, {', '.join(map(str, shape))})"
        )


def halvings(size: int) -> tuple[int, int]:
    """How often to halve a side of `size` pixels to come to 4 to 7: (times, what is left).

    A size that does not halve evenly is rounded up: 28 -> (2, 7), 64 -> (4, 4), 36 -> (3, 5).
    Raises ValueError below 8 pixels.
    """
    if size < 8:
        raise ValueError(f"a side of {size} pixels is too short: this network needs at least 8")
    times = math.floor(math.log2(size / 4))
    return times, -(-size // 2**times)


class GroupNorm(nn.Module):
    """Normalises groups of channels, image by image; Wu & He 2018, "Group Normalization".

    Computed and returned in float32 whatever the format of x: sums over many values need it, and
    PyTorch's bfloat16 kernel for channels-last tensors on a CPU is several times slower.
    """

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...) to float32 (B, C, ...)."""
        return F.group_norm(x.float(), self.groups, self.weight, self.bias, self.eps)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention softmax(q k^T / sqrt(D)) v of q, k, v (B, heads, N, D); Vaswani et al. 2017, (1).

    PyTorch's fused kernel, except in bfloat16 on a CPU, where two matrix products with a softmax
    between them take a third of its time as long as the (N, N) weights are small.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 1024:
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1)  # (B, heads, N, N)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest-neighbour upsampling of x (B, C, H, W) by two, then convolution by (O, C, 3, 3).

    Each output pixel meets only 2x2 different input pixels. So the two steps are one transposed
    convolution of stride 2 whose 4x4 kernel sums, along rows and columns, the weights that meet
    the same input pixel: 4 products per output instead of 9. On a CPU only, where it was measured.
    """
    if x.device.type != "cpu":
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    o, c = weight.shape[:2]
    meets = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    meets = torch.kron(meets, meets)  # (16, 9)
    kernel = meets @ weight.permute(0, 2, 3, 1).reshape(o, 9, c)  # (O, 16, C)
    kernel = kernel.view(o, 4, 4, c).permute(3, 0, 1, 2)  # (C, O, 4, 4)
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def fold_norm(
    state: dict[str, Tensor], conv: str, norm: str, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Take a convolution and the batch norm after it out of `state`; return them as one.

    A batch norm that no longer learns is an affine map, so it merges into the weights and a bias:
    `w gamma / sqrt(var + eps)` and `beta - mean gamma / sqrt(var + eps)`, here in float64.

    Raises:
        KeyError: a key is not there.
    """
    variance = state.pop(f"{norm}.running_var").double()
    scale = state.pop(f"{norm}.weight") * torch.rsqrt(variance + epsilon)
    bias = state.pop(f"{norm}.bias") - state.pop(f"{norm}.running_mean") * scale
    return state.pop(f"{conv}.weight") * scale[:, None, None, None], bias
