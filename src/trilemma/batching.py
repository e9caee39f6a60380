"""How many pictures are drawn at a time: as many as memory has room for, up to `LARGEST`.

A picture does not depend on the batch it is drawn in, so the choice changes speed and rounding
only. On a CPU, where memory that is not there ends the process, the first few pictures tell what
one takes. On a GPU, where few pictures at a time are slow, the largest batch is tried first and
halved for as long as it finds no room.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trilemma.errors import UserError
from trilemma.memory import peak_memory, room

LARGEST = 128
FEW = 16  # pictures that tell what one takes


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
            self.size = min(LARGEST, room(count, taken) or LARGEST)
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
