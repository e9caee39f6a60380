"""What drawing costs: images per second, network calls, parameters, memory."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trilemma import memory
from trilemma.device import synchronize
from trilemma.memory import peak_memory

_SECONDS = 1.0  # a batch size is timed for at least so long
_FEW = 2  # images that tell what memory one takes


def speed(
    model: nn.Module,
    draw: Callable[[int], object],
    batch_sizes: Sequence[int] = (1, 128),
    longest: float = math.inf,
) -> dict[str, Any]:
    """Measure what drawing costs.

    Args:
        model: the model that draws; its direct children are its networks.
        draw: draws that many images in one batch.
        batch_sizes: batches to time, each after one drawn to warm up.
        longest: seconds that a batch may take: of a slow model, smaller ones are timed. Where this
            is said, nor is one drawn that memory has no room for.

    Returns:
        `by_batch`: images per second for each batch size; `images_per_second`, `batch`: of the
        last one; `room`: how many images memory was seen to have room for at a time, or None where
        that was not looked at; `calls`: forward passes an image takes through the network that is
        called most (a guided step counts twice: it sees every image with its condition and
        without); `parameters`; `memory`: bytes at the peak of drawing the last batch size, beyond
        what was in use before, or None where the system does not tell.
    """
    where = next(model.parameters()).device
    with network_calls(model) as calls:
        draw(1)
    largest, room = max(batch_sizes), None
    if longest < math.inf:
        largest = _batch_within(longest, draw, largest, where)
        few = min(_FEW, largest)
        room = memory.room(few, peak_memory(lambda: draw(few), where))
        largest = min(largest, room or largest)
    fits, taken = _fitting(draw, largest, where)
    if fits < largest:
        largest = room = fits
    by_batch = {}
    for size in sorted({min(size, largest) for size in batch_sizes}):
        if size not in (1, largest):  # these have been drawn
            draw(size)
        synchronize(where)
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < _SECONDS:
            draw(size)
            synchronize(where)
            count += size
        by_batch[str(size)] = count / elapsed
    return {
        "images_per_second": by_batch[str(largest)],
        "batch": largest,
        "room": room,
        "by_batch": by_batch,
        "calls": max(calls.values(), default=0),
        "parameters": sum(p.numel() for p in model.parameters()),
        "memory": taken,
    }


def foresee(
    draw: Callable[[int], object], where: torch.device, patience: float
) -> tuple[float, float]:
    """Return a and b in seconds: drawing a batch of s images takes about a + b s.

    As a batch of 1 tells and one of 4, or of 2 where 4 might take more than `patience` seconds;
    each is drawn twice, for the first time may take longer.
    """

    def seconds(size: int) -> float:
        start = time.perf_counter()
        draw(size)
        synchronize(where)
        return time.perf_counter() - start

    one = min(seconds(1), seconds(1))
    more = 4 if 4 * one <= patience else 2
    each = max(0.0, min(seconds(more), seconds(more)) - one) / (more - 1)
    return max(0.0, one - each), each


def _fitting(
    draw: Callable[[int], object], size: int, where: torch.device
) -> tuple[int, int | None]:
    """Return how many images, `size` or that halved, find room, and the bytes that they take."""
    try:
        return size, peak_memory(lambda: draw(size), where)
    except torch.OutOfMemoryError:  # of a GPU, where a few do not tell beforehand
        if size == 1:
            raise
    torch.cuda.empty_cache()
    return _fitting(draw, size // 2, where)


def _batch_within(
    longest: float, draw: Callable[[int], object], most: int, where: torch.device
) -> int:
    """Return `most`, or the largest power of two below that is foreseen to take `longest` s."""
    once, each = foresee(draw, where, longest)
    size = most
    while size > 1 and once + size * each > longest:
        size = 1 << ((size - 1).bit_length() - 1)
    return size


@contextmanager
def network_calls(model: nn.Module) -> Iterator[Counter[str]]:
    """Count the images that pass through each network of a model while the context is open.

    A network is a direct child of the model whose first argument is a tensor, images in front.
    """
    counted: Counter[str] = Counter()

    def count(name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(_: nn.Module, arguments: tuple) -> None:
            if arguments and isinstance(arguments[0], Tensor):
                counted[name] += len(arguments[0])

        return hook

    handles = [
        child.register_forward_pre_hook(count(name)) for name, child in model.named_children()
    ]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()
