"""Which device, number format, memory layout and compilation pay on this hardware.

A choice here changes speed and rounding only. What each is worth is measured in
`docs/benchmarks.md` by the scripts in `benchmarks/`.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import AbstractContextManager

import torch
from torch import nn

from trilemma.errors import UserError

log = logging.getLogger(__name__)


def pick(name: str | None = None) -> torch.device:
    """Return the named device, or the fastest here: CUDA, then Apple's MPS, then the CPU."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None:
        return torch.device(next((kind for kind, here in present.items() if here), "cpu"))
    kind = name.partition(":")[0]
    if not present.get(kind, kind == "cpu"):
        here = [kind for kind, is_here in present.items() if is_here] + ["cpu"]
        raise UserError(f"device {name!r} is not available; this machine has {', '.join(here)}")
    return torch.device(name)


def dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the number format of matrix products: `precision` is auto, bf16, fp16 or fp32.

    "auto" is bfloat16 where the processor multiplies in it, else float32.
    """
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision in named:
        return named[precision]
    if precision != "auto":
        raise UserError(f"precision {precision!r} is not one of auto, {', '.join(named)}")
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Return a context in which matrix products and convolutions run in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def channels_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether convolutions are faster with channels last in memory."""
    return device.type == "cpu" or (device.type == "cuda" and dtype != torch.float32)


def maybe_compile(module: nn.Module, mode: str, device: torch.device) -> nn.Module:
    """Compile `module` in place where it pays; `mode` is auto, on or off.

    In place, so the names of its parameters stay. "auto" compiles on CUDA, and on a CPU with a
    C++ compiler.
    """
    if mode not in ("auto", "on", "off"):
        raise UserError(f"compile {mode!r} is not one of auto, on, off")
    has_compiler = device.type == "cuda" or shutil.which("c++") or shutil.which("g++")
    if mode == "on" or (mode == "auto" and device.type in ("cpu", "cuda") and has_compiler):
        module.compile()
    return module


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; call before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
