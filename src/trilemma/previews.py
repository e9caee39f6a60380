"""Sheets of what a model can do so far, drawn while it learns, in a bounded share of the time.

Fixed seeds, captions and pictures, so that sheets of one run show its progress. A model that draws
slowly shows fewer pictures, in the extreme one, rather than hold up its training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from trilemma import drawing, edit, restoring, translation
from trilemma.batching import Batching
from trilemma.data import Dataset
from trilemma.device import synchronize
from trilemma.model import DrawsEmbeddings
from trilemma.sampling import Trained

SHARE = 0.25  # of the training time so far that all sheets may take
LEAST = 20.0  # seconds that a sheet may take in any case


class Previews:
    """Draws the sheets of a run.

    Args:
        folder: where they are written, each named by the images seen.
        say: told once that sheets have fewer pictures.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.spent, self.told = 0.0, False

    def draw(self, trained: Trained, data: Dataset, elapsed: float) -> None:
        """Write a sheet.

        Args:
            trained: the model as it is.
            data: what it is trained on.
            elapsed: seconds that it was trained.
        """
        if trained.classifies or trained.matches or isinstance(trained.model, DrawsEmbeddings):
            return
        start = time.perf_counter()
        if trained.translates:
            made = translation.sheet(trained, data)
        elif trained.enlarges or trained.repairs:
            made = restoring.sheet(trained, data)
        elif not trained.draws:
            made = edit.sheet(trained, data)
        else:
            made = self._samples(trained, max(LEAST, SHARE * elapsed - self.spent))
        self.folder.mkdir(exist_ok=True)
        made.save(self.folder / f"{trained.progress['seen']:09d}.png")
        self.spent += time.perf_counter() - start

    def _samples(self, trained: Trained, allowed: float) -> Image.Image:
        """Lay out drawn pictures; of buckets, rows of each size, the most frequent first."""
        columns = 10 if trained.conditional else 8
        sizes = trained.data["buckets"][:columns] or [trained.data["shape"][1:]]
        n = columns * (columns // len(sizes))
        parts = []
        for height, width in sizes:
            size = [height, width] if trained.data["buckets"] else None
            images = _within(trained, n, size, allowed / len(sizes))
            if len(images) < n and not self.told:
                self.told = True
                self.say(
                    f"drawing is slow: sheets have fewer than {n} pictures, to take {LEAST:.0f} s "
                    f"or {SHARE:.0%} of the training time; --set train.grids=2 draws fewer sheets"
                )
            texts, beside = trained.texts(n, None), min(columns, len(images))
            if texts is None:
                parts.append(drawing.grid(images, beside))
            else:
                least = 96 * width // trained.data["shape"][2]
                parts.append(drawing.captioned(images, texts[: len(images)], beside, least))
        return drawing.stacked(parts)


def _within(trained: Trained, n: int, size: Sequence[int] | None, allowed: float) -> Tensor:
    """Draw as many of n pictures as are done in `allowed` seconds, one at least."""
    doubling = Doubling(trained.where, allowed)
    drawn = []
    for images in trained.batches(n, batch=doubling, size=size):
        drawn.append(images)
        if not doubling.size:
            break
    return torch.cat(drawn)


class Doubling(Batching):
    """One picture, then twice as many each time, or the rest, as long as they are done in time.

    Args:
        where: the device that draws.
        allowed: seconds for all batches.

    Attributes:
        size: of the next batch; 0 where there is no time for one.
    """

    def __init__(self, where: torch.device, allowed: float) -> None:
        super().__init__(where)
        self.allowed, self.room, self.size = allowed, self.size, 1

    def draw(self, draw: Callable[[int], Tensor], left: int) -> Tensor | None:
        """Draw the next batch, as `Batching.draw`."""
        measures, start = self.measures, time.perf_counter()
        drawn = super().draw(draw, left)
        synchronize(self.where)
        took = time.perf_counter() - start
        self.allowed -= took
        if drawn is None or measures:
            self.room = self.size  # as many as memory has room for
        if drawn is not None:
            count = len(drawn)
            rest = left - count
            size = rest if took * rest <= self.allowed * count else 2 * count
            self.size = min(size, self.room) if took * size <= self.allowed * count else 0
        return drawn
