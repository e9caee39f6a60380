"""Sheets drawn while training take a bounded share of its time."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from trilemma import drawing, previews
from trilemma.previews import Doubling, Previews


class Clock:
    """Time that passes only where something takes some."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(previews, "time", made)
    monkeypatch.setattr("trilemma.memory.available", lambda: 1 << 40)
    return made


def drawn(clock, n, allowed, seconds):
    """The sizes of batches that are drawn; `seconds(size)` is what one takes."""
    batching, sizes = Doubling(torch.device("cpu"), allowed), []

    def draw(count):
        clock.now += seconds(count)
        return torch.zeros(count)

    while sum(sizes) < n and batching.size:
        sizes.append(len(batching.draw(draw, n - sum(sizes))))
    return sizes


def test_what_is_fast_is_drawn_after_one_picture(clock):
    assert drawn(clock, 64, 20, lambda size: 0.1 * size) == [1, 63]


def test_what_is_slow_is_drawn_as_long_as_there_is_time(clock):
    sizes = drawn(clock, 64, 20, lambda size: 1.0 * size)
    assert sizes == [1, 2, 4, 8] and clock.now <= 20
    assert drawn(clock, 64, 20, lambda size: 1000.0 * size) == [1]


def test_what_takes_one_time_for_all_is_drawn_whole_in_few_batches(clock):
    sizes = drawn(clock, 100, 50, lambda size: 5.0)
    assert sum(sizes) == 100 and len(sizes) <= 6 and clock.now <= 50


def test_memory_limits_batches_too(clock, monkeypatch):
    monkeypatch.setattr("trilemma.batching.peak_memory", lambda draw, where: [draw(), 100][1])
    monkeypatch.setattr("trilemma.memory.available", lambda: 2000)
    assert drawn(clock, 25, 20, lambda size: 0.0) == [1, 10, 10, 4]


class Slow:
    """What a trained model that draws slowly says and does."""

    classifies = matches = translates = enlarges = repairs = conditional = False
    draws, model, path, where = True, torch.nn.Linear(1, 1), "slow", torch.device("cpu")
    data, progress = {"buckets": [], "shape": [1, 4, 4]}, {"seen": 7}

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def texts(self, n, text):
        return None

    def batches(self, n, batch, size):
        def draw(count):
            self.clock.now += self.seconds * count
            return torch.zeros(count, 1, 4, 4, dtype=torch.uint8)

        while n:
            images = batch.draw(draw, n)
            yield images
            n -= len(images)


def test_sheets_take_a_share_of_the_training_time(clock, tmp_path):
    said = []
    sheets, slow = Previews(tmp_path / "samples", said.append), Slow(clock, 2.0)
    for elapsed, pictures in ((10, 7), (400, 31), (410, 7)):
        before = clock.now
        sheets.draw(slow, None, elapsed)
        assert clock.now - before == 2 * pictures and sheets.spent == clock.now
        made = Image.open(tmp_path / "samples" / f"{slow.progress['seen']:09d}.png")
        wanted = drawing.grid(torch.zeros(pictures, 1, 4, 4).byte(), min(pictures, 8))
        assert made.size == wanted.size
        slow.progress = {"seen": slow.progress["seen"] + 1}
    assert len(said) == 1 and "fewer than 64 pictures" in said[0]
