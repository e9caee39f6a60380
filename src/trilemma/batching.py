"""How many pictures are drawn at a time: as many as memory has room for, up to `LARGEST`.

A picture does not depend on the batch it is drawn in, so the choice changes speed and rounding
only. On a CPU, where memory that is not there ends the process, the first few pictures tell what
one takes. On a GPU, where few pictures at a time are slow, the largest batch is tried first and
halved for as long as it finds no room.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trilemma.errors import UserError
from trilemma.metrics.speed import peak_memory

LARGEST = 128
FEW = 16  # pictures that tell what one takes
SHARE = 0.5  # of the memory that is free may be taken


class Batching:
    """Chooses the size of batches while they are drawn.

    Args:
        where: the device that draws.
        given: pictures at a time; None chooses.

    Attributes:
        size: of the next batch.
    """

    def __init__(self, where: torch.device, given: int | None = None) -> None:
        self.where, self.given = where, given
        self.measures = given is None and where.type == "cpu"
        chosen = FEW if self.measures else LARGEST
        self.size = chosen if given is None else given

    def draw(self, draw: Callable[[int], Tensor], left: int) -> Tensor | None:
        """Draw the next batch, of `left` pictures at most; None if it found no room.

        `size` is then smaller: try again.

        Raises:
            UserError: a single picture, or a batch of the given size, finds no room.
        """
        count = min(self.size, left)
        if self.measures and left > count:
            self.measures = False
            drawn = []
            taken = peak_memory(lambda: drawn.append(draw(count)), self.where)
            free = available()
            if taken is None or free is None:
                self.size = LARGEST
            else:
                self.size = max(1, min(LARGEST, int(SHARE * free * count / max(taken, 1))))
            return drawn[0]
        try:
            return draw(count)
        except torch.OutOfMemoryError as error:
            if count == 1 or self.given:
                less = "a smaller --batch" if count > 1 else "smaller pictures"
                raise UserError(
                    f"{count} at a time find no room in the device's memory; try {less}, or "
                    "--device cpu"
                ) from error
        self.size = count // 2
        torch.cuda.empty_cache()
        return None


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
