"""A Dataset in memory-mapped uint8, and the endless, stateless stream of its batches.

The training order is a pure function of the seed: epoch e of a data set of N pictures is the
permutation pi_e that sorts the keys h(seed, e, i), i = 0..N-1, and the global stream is
pi_0, pi_1, pi_2, ... one after the other, so the picture at global position p is

    i(p) = pi_{p div N}(p mod N)

h is SplitMix64's finaliser (Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number
Generators"). Flips, which of several captions is told, and the seeds of the per-image random
streams are hashes of (seed, p) too. So a run resumed at any position, or shared by any number of
processes, sees exactly the pictures that an uninterrupted single process sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilemma.batch import Batch, Condition, Rng, to_float
from trilemma.data.buckets import turn

# These keep the uses of h apart.
_ORDER, _STREAM, _FLIP, _SOURCE_ORDER, _SOURCE_FLIP, _CAPTION, _BUCKET = range(1, 8)


@dataclass(frozen=True)
class Dataset:
    """Pictures of one shape, and what is known of them.

    Attributes:
        name: the name or path it was loaded from.
        split: "train", "test" or "all".
        fingerprint: hash of the contents, the split and the settings (size, channels, background).
        images: (N, C, H, W) uint8, usually memory-mapped.
        label: (N,) int64 class indices into `label_names`, or None.
        label_names: the classes.
        attributes: (N, A) uint8, 0 or 1, in the order of `attribute_names`, or None.
        attribute_names: the attributes.
        text: N captions ("" where a picture has none), the first of each picture, or None.
        captions: all captions of each picture, where some have several; else None.
        source: (M, C, H, W) uint8, the unpaired pictures of the other domain, or None.
        skipped: the files that cannot be used, and why: path -> reason.
    """

    name: str
    split: str
    fingerprint: str
    images: np.ndarray
    label: np.ndarray | None = None
    label_names: list[str] = field(default_factory=list)
    attributes: np.ndarray | None = None
    attribute_names: list[str] = field(default_factory=list)
    text: list[str] | None = None
    source: np.ndarray | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    captions: list[list[str]] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one picture."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def tensor(self, indices: Sequence[int] | np.ndarray | Tensor | slice) -> Tensor:
        """Return the pictures at `indices` as uint8 (B, C, H, W)."""
        rows = _rows(indices, len(self))
        return torch.from_numpy(np.ascontiguousarray(self.images[rows]))

    def condition(self, indices: Sequence[int] | np.ndarray | Tensor | slice) -> Condition:
        """Return what is known of the pictures at `indices`, of several captions the first.

        The pictures of an unpaired source domain belong to no picture in particular: picture i is
        given source i modulo their number.
        """
        rows = _rows(indices, len(self))
        source_rows = None if self.source is None else rows % len(self.source)
        return self._condition(rows, source_rows, None, None)

    def _condition(
        self,
        rows: np.ndarray,
        source_rows: np.ndarray | None,
        source_flip: np.ndarray | None,
        caption: np.ndarray | None,
    ) -> Condition:
        source = None
        if self.source is not None and source_rows is not None:
            source = _floats(self.source, source_rows, source_flip)
        text = None if self.text is None else [self.text[i] for i in rows]
        if self.captions is not None and caption is not None:
            choices = [self.captions[i] for i in rows]
            text = [some[int(k) % len(some)] for some, k in zip(choices, caption, strict=True)]
        return Condition(
            count=len(rows),
            label=None if self.label is None else torch.from_numpy(self.label[rows]),
            attributes=None
            if self.attributes is None
            else torch.from_numpy(self.attributes[rows].astype(np.float32)),
            text=text,
            source=source,
        )


def batches(
    dataset: Dataset,
    size: int,
    *,
    seed: int,
    start: int = 0,
    flip: bool = False,
    rank: int = 0,
    world: int = 1,
    kept: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yield training batches without end.

    Args:
        dataset: the pictures.
        size: pictures in a step, over all processes.
        seed: the order, the flips and the random streams follow from it.
        start: pictures seen by all processes before the first batch.
        flip: mirror every other picture, at random, left to right.
        rank: this process.
        world: number of processes; each takes its contiguous share of every step.
        kept: (1 or 2, N, ...) what the model's codec keeps of each picture and, with `flip`, of
            each mirrored; or None.
    """
    if not len(dataset):
        raise ValueError(f"{dataset.name} has no pictures in its split {dataset.split!r}")
    if size < 1 or size % world:
        raise ValueError(f"a step of {size} images cannot be shared by {world} processes equally")
    share = size // world
    order, source_order = _Order(len(dataset), seed, _ORDER), None
    if dataset.source is not None:
        source_order = _Order(len(dataset.source), seed, _SOURCE_ORDER)
    while True:
        first = start + rank * share
        positions = np.arange(first, first + share, dtype=np.int64)
        flips = _hash(seed, _FLIP, positions) >> np.uint64(63) == 1 if flip else None
        source_flips = _hash(seed, _SOURCE_FLIP, positions) >> np.uint64(63) == 1 if flip else None
        captions = None if dataset.captions is None else _hash(seed, _CAPTION, positions)
        rows = order.at(positions)
        source_rows = None if source_order is None else source_order.at(positions)
        seeds = (_hash(seed, _STREAM, positions) >> np.uint64(1)).astype(np.int64)
        yield Batch(
            image=_floats(dataset.images, rows, flips),
            condition=dataset._condition(rows, source_rows, source_flips, captions),
            seen=start,
            rng=Rng(torch.from_numpy(seeds)),
            kept=None if kept is None else _kept(kept, rows, flips),
        )
        start += size


def bucketed(
    sets: Sequence[Dataset],
    size: int,
    *,
    seed: int,
    start: int = 0,
    kept: Sequence[np.ndarray | None],
    **place: Any,
) -> Iterator[Batch]:
    """Yield training batches without end, each of one of several sets; `buckets.turn` says which.

    Arguments as of `batches`, `kept` for each set; `start` is a multiple of `size`.
    """
    counts = [len(each) for each in sets]
    seeds = (_hash(seed, _BUCKET, np.arange(len(sets))) >> np.uint64(1)).tolist()
    streams: dict[int, Iterator[Batch]] = {}
    while True:
        of, at = turn(counts, size, seed, start // size)
        if of not in streams:  # from then on its turns follow each other in its own order
            own = {"seed": seeds[of], "start": at, "kept": kept[of]}
            streams[of] = batches(sets[of], size, **own, **place)
        yield replace(next(streams[of]), seen=start)
        start += size


class _Order:
    """The row at each global position; keeps the permutations of the epochs last asked for."""

    def __init__(self, count: int, seed: int, purpose: int) -> None:
        self.count, self.seed, self.purpose = count, seed, purpose
        self._epochs: dict[int, np.ndarray] = {}

    def at(self, positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, self.count)
        rows = np.empty_like(positions)
        needed = range(int(epochs[0]), int(epochs[-1]) + 1)
        self._epochs = {e: p for e, p in self._epochs.items() if e in needed}
        for epoch in needed:
            if epoch not in self._epochs:
                key = int(_hash(self.seed, self.purpose, np.array([epoch]))[0])
                keys = _hash(key, self.purpose, np.arange(self.count))
                self._epochs[epoch] = np.argsort(keys, kind="stable")
            here = epochs == epoch
            rows[here] = self._epochs[epoch][places[here]]
        return rows


def _hash(seed: int, purpose: int, values: np.ndarray) -> np.ndarray:
    """Return 64 well-mixed bits for each of `values`, a function of (seed, purpose, value)."""
    start = (seed + purpose * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    state = _mix(np.array([start], np.uint64))
    return _mix(state + values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(state: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's step to uint64 `state`; arithmetic wraps modulo 2**64."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _rows(indices: Sequence[int] | np.ndarray | Tensor | slice, count: int) -> np.ndarray:
    """Return `indices` as int64 row numbers in [0, count)."""
    if isinstance(indices, slice):
        return np.arange(count)[indices]
    rows = np.asarray(indices, dtype=np.int64).reshape(-1)
    if len(rows) and (rows.min() < -count or rows.max() >= count):
        raise IndexError(f"index outside the data set's {count} pictures")
    return rows % count if count else rows


def _floats(images: np.ndarray, rows: np.ndarray, flips: np.ndarray | None) -> Tensor:
    """Return `images[rows]` as float (B, C, H, W) in [-1, 1], mirrored where `flips` says."""
    taken = images[rows]
    if flips is not None:
        taken[flips] = taken[flips][..., ::-1]
    return to_float(torch.from_numpy(np.ascontiguousarray(taken)))


def _kept(kept: np.ndarray, rows: np.ndarray, flips: np.ndarray | None) -> Tensor:
    """Return what is kept of the pictures at `rows`, mirrored where `flips` says."""
    side = 0 if flips is None else flips.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(kept[side, rows]))
