"""Inception v3 as the FID knows it.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna 2016, "Rethinking the Inception Architecture for Computer
Vision", table 1, in the form that Google released on 5 December 2015 and Heusel et al. 2017 built
the FID on. It departs from the paper and from later releases: 1008 classes; average pooling leaves
the padding out of its mean; and the very last block pools by the maximum.

The names of the convolutions are those of the PyTorch port of those weights
(`pt_inception-2015-12-05`), which uses torchvision's. Batch norms are folded in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.networks.layers import fold_norm

_EPSILON = 1e-3

# A step of a branch: a convolution (name, output channels, kernel, stride), or a pooling, or a list
# of convolutions side by side whose outputs are joined. A branch is a list of steps; the outputs of
# a block's branches are joined.
Step = tuple | str | list


def _conv(name: str, outputs: int, high: int = 1, wide: int | None = None, stride: int = 1) -> Step:
    return name, outputs, (high, high if wide is None else wide), stride


def _grid35(pool: int) -> list[list[Step]]:
    return [
        [_conv("branch1x1", 64)],
        [_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)],
        [
            _conv("branch3x3dbl_1", 64),
            _conv("branch3x3dbl_2", 96, 3),
            _conv("branch3x3dbl_3", 96, 3),
        ],
        ["average", _conv("branch_pool", pool)],
    ]


def _grid17(inner: int) -> list[list[Step]]:
    return [
        [_conv("branch1x1", 192)],
        [
            _conv("branch7x7_1", inner),
            _conv("branch7x7_2", inner, 1, 7),
            _conv("branch7x7_3", 192, 7, 1),
        ],
        [
            _conv("branch7x7dbl_1", inner),
            _conv("branch7x7dbl_2", inner, 7, 1),
            _conv("branch7x7dbl_3", inner, 1, 7),
            _conv("branch7x7dbl_4", inner, 7, 1),
            _conv("branch7x7dbl_5", 192, 1, 7),
        ],
        ["average", _conv("branch_pool", 192)],
    ]


def _grid8(pooling: str) -> list[list[Step]]:
    return [
        [_conv("branch1x1", 320)],
        [
            _conv("branch3x3_1", 384),
            [_conv("branch3x3_2a", 384, 1, 3), _conv("branch3x3_2b", 384, 3, 1)],
        ],
        [
            _conv("branch3x3dbl_1", 448),
            _conv("branch3x3dbl_2", 384, 3),
            [_conv("branch3x3dbl_3a", 384, 1, 3), _conv("branch3x3dbl_3b", 384, 3, 1)],
        ],
        [pooling, _conv("branch_pool", 192)],
    ]


_TO_17: list[list[Step]] = [
    [_conv("branch3x3", 384, 3, stride=2)],
    [
        _conv("branch3x3dbl_1", 64),
        _conv("branch3x3dbl_2", 96, 3),
        _conv("branch3x3dbl_3", 96, 3, stride=2),
    ],
    ["halve"],
]
_TO_8: list[list[Step]] = [
    [_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, stride=2)],
    [
        _conv("branch7x7x3_1", 192),
        _conv("branch7x7x3_2", 192, 1, 7),
        _conv("branch7x7x3_3", 192, 7, 1),
        _conv("branch7x7x3_4", 192, 3, stride=2),
    ],
    ["halve"],
]
_BLOCKS: dict[str, list[list[Step]]] = {
    "Mixed_5b": _grid35(32),
    "Mixed_5c": _grid35(64),
    "Mixed_5d": _grid35(64),
    "Mixed_6a": _TO_17,
    "Mixed_6b": _grid17(128),
    "Mixed_6c": _grid17(160),
    "Mixed_6d": _grid17(160),
    "Mixed_6e": _grid17(192),
    "Mixed_7a": _TO_8,
    "Mixed_7b": _grid8("average"),
    "Mixed_7c": _grid8("maximum"),
}
_SPATIAL_BLOCK = "Mixed_6d"  # TensorFlow's "mixed_6"


def _pool(kind: str, x: Tensor) -> Tensor:
    if kind == "halve":
        return F.max_pool2d(x, 3, stride=2)
    if kind == "maximum":
        return F.max_pool2d(x, 3, stride=1, padding=1)
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _Block(nn.Module):
    """Branches side by side, their outputs joined."""

    def __init__(self, inputs: int, branches: list[list[Step]]) -> None:
        super().__init__()
        self.branches = branches
        self.outputs = sum(self._build(inputs, branch) for branch in branches)

    def _build(self, channels: int, steps: list[Step]) -> int:
        for step in steps:
            if isinstance(step, list):
                channels = sum(self._build(channels, [each]) for each in step)
            elif isinstance(step, tuple):
                name, outputs, (high, wide), stride = step
                padding = (high // 2, wide // 2) if stride == 1 else 0
                conv = nn.Conv2d(channels, outputs, (high, wide), stride, padding)
                self.add_module(name, conv)
                channels = outputs
        return channels

    def _step(self, step: Step, x: Tensor) -> Tensor:
        if isinstance(step, str):
            return _pool(step, x)
        if isinstance(step, list):
            return torch.cat([self._step(each, x) for each in step], 1)
        return F.relu(self.get_submodule(step[0])(x), inplace=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the branches' outputs, not joined yet."""
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = self._step(step, y)
            outputs.append(y)
        return outputs


class InceptionV3(nn.Module):
    """Maps images (B, 3, 299, 299) in [-1, 1] to features; for inference only."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = nn.Conv2d(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = nn.Conv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = nn.Conv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = nn.Conv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = nn.Conv2d(80, 192, 3)
        channels = 192
        for name, branches in _BLOCKS.items():
            block = _Block(channels, branches)
            self.add_module(name, block)
            channels = block.outputs
        self.fc = nn.Linear(channels, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pooled features (B, 2048), a map (B, 192, 17, 17), and logits (B, 1008).

        The map is the first branch of TensorFlow's `mixed_6`, where the sFID is taken. The logits
        leave out the bias, as the Inception score does.
        """
        for conv in (self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3):
            x = F.relu(conv(x), inplace=True)
        x = _pool("halve", x)
        for conv in (self.Conv2d_3b_1x1, self.Conv2d_4a_3x3):
            x = F.relu(conv(x), inplace=True)
        x = spatial = _pool("halve", x)
        for name in _BLOCKS:
            outputs = self.get_submodule(name)(x)
            if name == _SPATIAL_BLOCK:
                spatial = outputs[0]
            x = torch.cat(outputs, 1)
        pooled = x.mean((2, 3))
        return pooled, spatial, F.linear(pooled, self.fc.weight)

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Load weights in the key layout of `pt_inception-2015-12-05`.

        Raises:
            ValueError: a key is missing, left over, or of another shape.
        """
        state = {key: value for key, value in state.items() if "num_batches" not in key}
        folded = {}
        try:
            for name, module in self.named_modules():
                if isinstance(module, nn.Conv2d):
                    weight, bias = fold_norm(state, f"{name}.conv", f"{name}.bn", _EPSILON)
                    folded[f"{name}.weight"], folded[f"{name}.bias"] = weight, bias
            folded["fc.weight"], folded["fc.bias"] = state.pop("fc.weight"), state.pop("fc.bias")
            self.load_state_dict(folded)
        except KeyError as missing:
            raise ValueError(f"not the FID's Inception weights: no key {missing}") from None
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"not the FID's Inception weights: {reason}") from None
        if state:
            raise ValueError(f"not the FID's Inception weights: unknown key {next(iter(state))!r}")
