"""Buckets: a few sizes of about equal area, so that pictures of any proportions lose little.

A picture goes to the bucket whose proportions are nearest to its own, is resized to cover it, and
its centre is cut out. Each batch is of one bucket. (NovelAI 2022, "NovelAI Improvements on Stable
Diffusion"; Podell et al. 2024, "SDXL: Improving Latent Diffusion Models for High-Resolution Image
Synthesis", section 2.3 and appendix I, whose sizes for a side of 1024 these are.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LONGEST = 4.0  # width over height, or height over width; longer pictures are cut to that
STEP = 64  # pixels between one bucket's width and the next one's, at most

Size = tuple[int, int]
"""Height and width."""


def sizes(side: int, multiple: int) -> list[Size]:
    """Return heights and widths of about side x side pixels, from the widest to the highest.

    Both are multiples of `multiple`.
    """
    step = max(1, min(STEP, side // 8) // multiple) * multiple
    wide = []
    for width in range(2 * side // step * step, side, -step):
        height = max(step, round(side**2 / width / step) * step)
        if width <= LONGEST * height:
            wide.append((height, width))
    return [*wide, (side, side), *((width, height) for height, width in reversed(wide))]


def nearest(among: Sequence[Size], height: int, width: int) -> Size:
    """Return the size whose proportions are nearest to a picture's, by the ratio of the two."""
    return min(among, key=lambda size: abs(math.log(size[1] * height / (size[0] * width))))


def turn(counts: Sequence[int], batch: int, seed: int, step: int) -> tuple[int, int]:
    """Return which bucket a step of training draws from, and where in that bucket's own order.

    A function of seed and step. In an epoch each bucket has a turn for every `batch` of its
    pictures, in an order shuffled anew; what is left over counts for its next epoch, so that all
    pictures are seen equally often in the end.

    Args:
        counts: pictures in each bucket.
        batch: pictures in a step.
        seed: of the order of turns.
        step: from 0 on.

    Returns:
        The bucket, and the place of the step's first picture in the bucket's endless order.
    """
    cycle, rest = divmod(step, sum(counts))  # in `batch` epochs nothing is left over
    for part in range(batch):
        before = [part * count // batch for count in counts]
        turns = [(part + 1) * count // batch - b for count, b in zip(counts, before, strict=True)]
        if rest < sum(turns):
            break
        rest -= sum(turns)
    order = np.repeat(np.arange(len(counts)), turns)
    np.random.default_rng([seed, cycle, part]).shuffle(order)
    bucket = int(order[rest])
    place = cycle * counts[bucket] + before[bucket] + int((order[:rest] == bucket).sum())
    return bucket, place * batch
