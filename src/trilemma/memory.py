"""What a piece of work takes of memory, and how much there is."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path

import torch

SHARE = 0.5  # of the memory that is free may be taken


def room(count: int, taken: int | None) -> int | None:
    """Return how many pictures memory has room for at a time, 1 at least, or None if nobody tells.

    `count` of them have `taken` so many bytes, if that is known.
    """
    free = available()
    if taken is None or free is None:
        return None
    return max(1, int(SHARE * free * count / max(taken, 1)))


def available() -> int | None:
    """Return the bytes of memory that this process may still take, or None if nobody tells.

    Under Linux; where a container has a limit of its own (cgroup v2), at most what is left of that.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    line = next(s for s in meminfo.read_text().splitlines() if s.startswith("MemAvailable"))
    free = int(line.split()[1]) * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return max(free, 0)


def peak_memory(run: Callable[[], object], where: torch.device) -> int | None:
    """Return the bytes that `run` takes at its peak beyond what was in use before.

    On CUDA as torch's allocator counts them; on a CPU under Linux as the process's resident memory;
    elsewhere None. Freed memory that was kept for use again is first given back: it would hide what
    is taken.
    """
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        run()
        return torch.cuda.max_memory_allocated(where) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if where.type != "cpu" or not status.exists():
        run()
        return None
    _give_back_freed()
    try:
        reset.write_text("5")  # forgets the peak so far
    except OSError:  # a container may forbid it
        run()
        return None
    before = _kilobytes(status, "VmRSS")
    run()
    return max(0, _kilobytes(status, "VmHWM") - before) * 1024


def _give_back_freed() -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
