"""Weights into networks without a second copy.

A network is built without memory (on torch's meta device) and given tensors that are views of the
file. Only what must be in another form is copied, tensor by tensor, and its part of the file is
then let go: weights in the format of the matrix products, convolutions with channels last unless
their input tells the layout. Normalisations stay in float32.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from trilemma import device
from trilemma.networks.layers import GroupNorm
from trilemma.stable import files

Network = TypeVar("Network", bound=nn.Module)


def fill(
    network: Network,
    tensors: Mapping[str, Tensor],
    told: str,
    where: torch.device,
    kind: torch.dtype,
    views: bool = False,
) -> Network:
    """Give a network on the meta device its weights, and return it ready to run.

    Args:
        network: built on the meta device.
        tensors: views of a file, under the network's names.
        told: what the tensors are, for errors.
        where: the device to run on.
        kind: of matrix products and convolutions.
        views: convolutions keep the file's layout: of a network whose input has channels last.

    Raises:
        UserError: tensors do not fit.
    """
    files.check_fit(network.state_dict(), tensors, told)
    plain = {
        f"{name}.{key}"
        for name, module in network.named_modules()
        if isinstance(module, nn.LayerNorm | GroupNorm)
        for key in ("weight", "bias")
    }
    last, mapped = device.channels_last(where, kind) and not views, _mapped()
    for name in network.state_dict():
        tensor = tensors[name]
        form = torch.float32 if name in plain else kind
        channels = torch.channels_last if last and tensor.ndim == 4 else torch.contiguous_format
        made = tensor.to(where, form).contiguous(memory_format=channels)
        place, _, key = name.rpartition(".")
        module = network.get_submodule(place)
        if key in module._buffers:
            setattr(module, key, made)
        else:
            setattr(module, key, nn.Parameter(made, requires_grad=False))
        if made.data_ptr() != tensor.data_ptr():
            _let_go(tensor, mapped)
    return network.eval()


def _mapped() -> list[tuple[int, int]]:
    """Return the addresses (first, after) at which safetensors files are mapped; Linux only."""
    if platform.system() != "Linux":
        return []
    spans = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            if line.rstrip().endswith(".safetensors"):
                begin, end = line.split(maxsplit=1)[0].split("-")
                spans.append((int(begin, 16), int(end, 16)))
    return spans


def _let_go(tensor: Tensor, mapped: list[tuple[int, int]]) -> None:
    """Tell the system that the mapped part of a file behind a tensor is not needed for now.

    The numbers stay readable: they would be read from the file again. Other memory would be wiped,
    so only what lies in a `mapped` file is let go.
    """
    start, page = tensor.data_ptr(), mmap.PAGESIZE
    end = start + tensor.numel() * tensor.element_size()
    first, after = -(-start // page) * page, end // page * page
    if after > first and any(begin <= first and after <= last for begin, last in mapped):
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(after - first), mmap.MADV_DONTNEED)
