"""Weights laid out once as oneDNN multiplies by them, to draw in bfloat16 on a CPU.

PyTorch gives oneDNN matrices as they are, and oneDNN lays them out anew in every call: of layers of
1280 channels a fifth of the time over 16 x 16 places, and up to half over 8 x 8. The layouts and
the operations are those of PyTorch's own compiler. A packed layer cannot learn, be changed or be
saved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.networks.spatial_unet import Gated, Places

ops = torch.ops.mkldnn


class PackedLinear(nn.Module):
    """A linear layer.

    Args:
        weight: (out, in), bfloat16.
        bias: (out,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        packed = ops._reorder_linear_weight(weight.detach(), None)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return ops._linear_pointwise(
            x.to(self.weight.dtype), self.weight, self.bias, "none", [], ""
        )


class PackedGated(nn.Module):
    """A gated layer: GELU and product are done where the matrix products end."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        halves = zip(layer.weight.chunk(2), layer.bias.chunk(2), strict=True)
        self.value, self.gate = (PackedLinear(weight, bias) for weight, bias in halves)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        value, gate = self.value, self.gate
        x = x.to(gate.weight.dtype)
        open_ = ops._linear_pointwise(x, gate.weight, gate.bias, "gelu", [], "none")
        return ops._linear_pointwise.binary(x, open_, value.weight, value.bias, "mul")


class PackedConv(nn.Module):
    """A convolution."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.told = layer.padding, layer.stride, layer.dilation, layer.groups
        packed = ops._reorder_convolution_weight(layer.weight.detach(), *self.told)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, h, w)."""
        return ops._convolution_pointwise(
            x.to(self.weight.dtype), self.weight, self.bias, *self.told, "none", [], ""
        )


def pays(where: torch.device, kind: torch.dtype) -> bool:
    """Say whether networks are to be packed."""
    if where.type != "cpu" or kind != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(ops._is_mkldnn_bf16_supported())


def pack(network: nn.Module) -> None:
    """Pack a network's linear layers and convolutions, in place, one after another."""
    for name, layer in network.named_children():
        if isinstance(layer, Gated):
            setattr(network, name, PackedGated(layer.proj))
        elif isinstance(layer, nn.Linear | Places):
            setattr(network, name, PackedLinear(layer.weight.flatten(1), layer.bias))
        elif isinstance(layer, nn.Conv2d):
            setattr(network, name, PackedConv(layer))
        else:
            pack(layer)
