"""Which device, number format, memory layout and compilation pay on this hardware.

A choice made here changes speed and rounding only. What each is worth is measured by the scripts in
`benchmarks/`, their tables are in `docs/benchmarks.md`.
"""

from __future__ import annotations

import ctypes
import logging
import math
import platform
import time
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import torch
from torch import nn

from trilemma.errors import UserError
from trilemma.networks import products

log = logging.getLogger(__name__)

FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick(name: str | None = None) -> torch.device:
    """Return the named device, or the fastest here: CUDA, then Apple's MPS, then the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    here = [kind for kind, count in counts.items() if count]
    if name is None:
        return torch.device(here[0])
    kind, _, index = name.partition(":")
    if kind not in here or (index and not (index.isdigit() and int(index) < counts[kind])):
        raise UserError(f"device '{name}' is not there; this machine has {', '.join(here)}")
    return torch.device(name)


def name(device: torch.device) -> str:
    """Return what the maker calls a GPU, or the processor of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the number format of matrix products: `precision` is auto, bf16 or fp32.

    "auto" is bfloat16 where the processor multiplies faster in it, else float32.
    """
    if precision in FORMATS:
        return FORMATS[precision]
    if precision != "auto":
        raise UserError(f"precision '{precision}' is not known; use auto, {', '.join(FORMATS)}")
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # AMX, the other way in which x86 multiplies bfloat16, comes with AVX512-BF16 always.
        can = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        fast = can and _bf16_gain() > 1.2
    return torch.bfloat16 if fast else torch.float32


@cache
def _bf16_gain() -> float:
    """Return how much faster this processor multiplies bfloat16 than float32; takes 0.1 s.

    Instructions for bfloat16 do not tell: with AMX they are several times as fast as float32, on an
    AMD Zen 5 twice, on an Intel processor whose AMX is out of reach they come to 0.6.
    """
    a = torch.randn(768, 768)
    formats = {torch.float32: a, torch.bfloat16: a.bfloat16()}
    least = dict.fromkeys(formats, math.inf)
    with torch.inference_mode():
        for _ in range(6):  # by turns, so that other work on the machine meets both
            for dtype, x in formats.items():
                start = time.perf_counter()
                x @ x
                least[dtype] = min(least[dtype], time.perf_counter() - start)
    return least[torch.float32] / least[torch.bfloat16]


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Return a context in which matrix products and convolutions run in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def channels_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether convolutions are faster with channels last in memory."""
    return device.type == "cpu" or (device.type == "cuda" and dtype != torch.float32)


def prepare(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move `module` to `device`, laid out in memory as pays there; return it.

    On a CPU convolutions with many weights on few pixels become matrix products. Sets the process
    up too: TF32 for the float32 matrix products of CUDA, and memory that is kept for the next step.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    if device.type == "cpu":
        _keep_memory()
        products.use(module)
    module.to(device)
    if channels_last(device, dtype):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _keep_memory() -> None:
    """Let the C library keep freed memory: the next step will want as much again.

    By default glibc hands blocks of megabytes back to the kernel when they are freed, and each new
    one costs a page fault for every 4 kB: 5 to 10 percent of a training step.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt's settings in malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def maybe_compile(module: nn.Module, mode: str, device: torch.device) -> nn.Module:
    """Compile `module` in place where it pays; `mode` is auto, on or off.

    In place, so the names of its parameters stay; the work is done at the first call. "auto"
    compiles on CUDA only: on a CPU a U-Net takes one to two minutes to compile for a gain of a
    fifth at most, so there it is for long runs that ask. Where nothing can be compiled the module
    runs as it is, and the log says why.
    """
    if mode not in ("auto", "on", "off"):
        raise UserError(f"compile '{mode}' is not known; use auto, on or off")
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return module
    trouble = _compiler_trouble(device)
    if trouble is None:
        module.compile()
    else:
        log.warning("not compiled, so slower: %s; compile=off silences this", trouble)
    return module


@cache
def _compiler_trouble(device: torch.device) -> str | None:
    """Compile something small on `device`; return why that fails, or None."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:
        return str(error).strip().splitlines()[0]
    return None


def seed(value: int, device: torch.device) -> None:
    """Seed torch's own generators, of the CPU and of `device`.

    `torch.manual_seed` also writes down the call stack for each kind of device that is not there,
    which takes half a millisecond to one: much, for small networks, at every step.
    """
    torch.default_generator.manual_seed(value)
    if device.type != "cpu":
        torch.manual_seed(value)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; call before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
