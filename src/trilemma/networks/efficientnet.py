"""EfficientNet-Lite0, for features: convolutions with their batch norms folded in.

Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", table
1; the Lite variant drops squeeze-and-excitation and uses ReLU6. An inverted residual block expands
its channels (1x1), filters each on its own (k x k, depthwise), and projects back (1x1, linear).

A batch norm that no longer learns is an affine map, so it merges into the convolution before it:
`w' = w * gamma / sqrt(var + eps)`, `b' = beta - mean * gamma / sqrt(var + eps)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """A convolution padded as at the network's native 224 pixels, whatever the input's size.

    There TensorFlow's "SAME" rule puts a strided convolution's odd pixel right and below. The
    published PyTorch module keeps those paddings at all sizes, and features are to equal its own.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        padding = (kernel - 1) // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups)
        before = (kernel - 2) // 2  # for stride 2
        after = kernel - 2 - before
        self.around = (before, after, before, after) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.around is None else F.pad(x, self.around))


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

    For inference only: batch norms are folded in by `load_published`, and there is no dropout.
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
        x = F.relu6(self.stem(x), inplace=True)
        spatial = x
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index == _SPATIAL_STAGE:
                spatial = x
        pooled = F.relu6(self.head(x), inplace=True).float().mean((2, 3))
        return pooled, spatial, F.linear(pooled, self.classify.weight, self.classify.bias)

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Load weights in the key layout of the `efficientnet-lite-pytorch` package.

        Raises:
            ValueError: if a key is missing, left over, or of another shape.
        """
        state = {key: value for key, value in state.items() if "num_batches" not in key}
        pairs = [(self.stem, "_conv_stem", "_bn0"), (self.head, "_conv_head", "_bn1")]
        blocks = [block for stage in self.stages for block in stage]
        for index, block in enumerate(blocks):
            convs = [block.expand, block.depthwise, block.project]
            names = ["_expand_conv", "_depthwise_conv", "_project_conv"]
            pairs += [
                (conv, f"_blocks.{index}.{name}", f"_blocks.{index}._bn{number}")
                for number, (conv, name) in enumerate(zip(convs, names, strict=True))
                if conv is not None
            ]
        own = {name: id(module) for name, module in self.named_modules()}
        names_of = {number: name for name, number in own.items()}
        folded = {}
        try:
            for conv, name, norm in pairs:
                variance = state.pop(f"{norm}.running_var")
                scale = state.pop(f"{norm}.weight") * torch.rsqrt(variance + _EPSILON)
                shift = state.pop(f"{norm}.bias") - state.pop(f"{norm}.running_mean") * scale
                key = names_of[id(conv)]
                folded[f"{key}.weight"] = state.pop(f"{name}.weight") * scale[:, None, None, None]
                folded[f"{key}.bias"] = shift
            folded["classify.weight"] = state.pop("_fc.weight")
            folded["classify.bias"] = state.pop("_fc.bias")
        except KeyError as missing:
            raise ValueError(f"not EfficientNet-Lite0 weights: no key {missing}") from None
        if state:
            raise ValueError(f"not EfficientNet-Lite0 weights: unknown key {next(iter(state))!r}")
        try:
            self.load_state_dict(folded)
        except RuntimeError as error:
            raise ValueError(f"not EfficientNet-Lite0 weights: {error}") from None
