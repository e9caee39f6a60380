"""EfficientNet-Lite0, for features: convolutions with their batch norms folded in.

Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", table
1; the Lite variant drops squeeze-and-excitation and uses ReLU6. An inverted residual block expands
its channels (1x1), filters each on its own (k x k, depthwise), and projects back (1x1, linear).

TensorFlow's "SAME" rule pads a strided convolution's odd pixel right and below, which PyTorch can
only do by copying the image. Turned by 180 degrees, image and filters, the odd pixel comes first,
and symmetric padding does the same: of an even side the last padded pixel is not read, and an odd
side takes one less. So the network sees the image turned, with turned filters: the same numbers in
two thirds of the time. The paddings are those of 224 pixels at all sizes, as in the published
PyTorch module, whose features these are to equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import fold_norm

# (repeats, kernel, stride of the first, expansion, output channels)
_STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
_EPSILON = 1e-3
_SPATIAL_STAGE = 4  # the last at stride 16: 112 channels


class _Conv(nn.Conv2d):
    """A convolution of a turned image, padded as the published module pads the image itself."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1):
            return super().forward(x)
        sides = zip(self.kernel_size, x.shape[2:], strict=True)
        pad = [(kernel - 1) // 2 - side % 2 for kernel, side in sides]
        return F.conv2d(x, self.weight, self.bias, self.stride, pad, groups=self.groups)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        self.expand = _Conv(inputs, inner, 1, 1, 1) if expand > 1 else None
        self.depthwise = _Conv(inner, inner, kernel, stride, inner)
        self.project = _Conv(inner, outputs, 1, 1, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return y.add_(x) if self.residual else y


class EfficientNetLite0(nn.Module):
    """Maps images (B, 3, H, W), normalised as `(pixel - 127) / 128`, to features.

    For inference only: batch norms are folded in by `load_published`,
    and there is no dropout.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, 32, 3, 2, 1)
        self.stages = nn.ModuleList()
        channels = 32
        for repeats, kernel, stride, expand, outputs in _STAGES:
            blocks = [_Block(channels, outputs, kernel, stride, expand)]
            blocks += [_Block(outputs, outputs, kernel, 1, expand) for _ in range(repeats - 1)]
            self.stages.append(nn.Sequential(*blocks))
            channels = outputs
        self.head = _Conv(channels, 1280, 1, 1, 1)
        self.classify = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pooled features (B, 1280), the map (B, 112, H/16, W/16), and logits (B, 1000)."""
        x = x.flip(2, 3).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.stem(x), inplace=True)
        spatial = x
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index == _SPATIAL_STAGE:
                spatial = x
        pooled = F.relu6(self.head(x), inplace=True).float().mean((2, 3))
        logits = F.linear(pooled, self.classify.weight, self.classify.bias)
        return pooled, spatial.flip(2, 3), logits

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Load weights in the key layout of the `efficientnet-lite-pytorch` package.

        Raises:
            ValueError: a key is missing, left over, or of another shape.
        """
        state = {key: value for key, value in state.items() if "num_batches" not in key}
        folded = {}

        def fold(own: str, conv: str, norm: str) -> None:
            weight, bias = fold_norm(state, conv, norm, _EPSILON)
            folded[f"{own}.weight"], folded[f"{own}.bias"] = weight.flip(2, 3), bias

        try:
            fold("stem", "_conv_stem", "_bn0")
            fold("head", "_conv_head", "_bn1")
            blocks = [(n, m) for n, m in self.named_modules() if isinstance(m, _Block)]
            for index, (own, block) in enumerate(blocks):
                theirs = f"_blocks.{index}"
                if block.expand is not None:
                    fold(f"{own}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
                fold(f"{own}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
                fold(f"{own}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
            for kind in ("weight", "bias"):
                folded[f"classify.{kind}"] = state.pop(f"_fc.{kind}")
            self.load_state_dict(folded)
        except KeyError as missing:
            raise ValueError(f"not EfficientNet-Lite0 weights: no key {missing}") from None
        except RuntimeError as error:
            raise ValueError(f"not EfficientNet-Lite0 weights: {error}") from None
        if state:
            raise ValueError(f"not EfficientNet-Lite0 weights: unknown key {next(iter(state))!r}")
