"""Batches are as large as memory has room for, and pictures do not depend on them."""

import functools
from pathlib import Path

import pytest
import torch

import tiny
import trilemma
from trilemma import batching, memory
from trilemma.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batching")
    data = tiny.pictures(folder / "data")
    changes = tiny.overrides("vae")
    return trilemma.train("vae", data, out=folder / "run", steps=2, overrides=changes, quiet=True)


@pytest.fixture
def sizes(run, monkeypatch):
    """The sizes of the batches that are drawn."""
    seen = []
    whole = type(run.model).sample

    @functools.wraps(whole)
    def sample(self, condition, rng, **options):
        seen.append(condition.count)
        return whole(self, condition, rng, **options)

    monkeypatch.setattr(type(run.model), "sample", sample)
    return seen


@pytest.mark.parametrize(
    ("free", "expected"),
    [(10**9, [16, 128, 56]), (4000, [16, *[20] * 9, 4]), (10, [16, *[1] * 184])],
)
def test_the_first_pictures_tell_how_many_have_room(run, sizes, monkeypatch, free, expected):
    def peak(draw, where):
        draw()
        return 100 * sizes[-1]  # a picture takes 100 bytes

    monkeypatch.setattr(batching, "peak_memory", peak)
    monkeypatch.setattr(memory, "available", lambda: free)
    images = run.sample(200, seed=5)
    assert sizes == expected
    apart = run.sample(200, seed=5, batch=64)
    assert (images.int() - apart.int()).abs().max() <= 1


def test_few_pictures_are_drawn_at_once_and_nothing_is_measured(run, sizes, monkeypatch):
    monkeypatch.setattr(batching, "peak_memory", None)
    run.sample(16)
    assert sizes == [16]


def test_where_nobody_tells_what_is_free_the_largest_is_taken(run, sizes, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: None)
    run.sample(150)
    assert sizes == [16, 128, 6]


def test_a_batch_that_finds_no_room_on_a_gpu_is_halved():
    sizes = []

    def draw(count):
        sizes.append(count)
        if count > 40:
            raise torch.OutOfMemoryError("no room")
        return torch.zeros(count)

    chosen = batching.Batching(torch.device("cuda"))
    drawn = 0
    while drawn < 70:
        images = chosen.draw(draw, 70 - drawn)
        drawn += 0 if images is None else len(images)
    assert sizes == [70, 35, 35]


@pytest.mark.parametrize(("given", "advice"), [(64, "a smaller --batch"), (None, "--device cpu")])
def test_too_little_memory_is_told(given, advice):
    def draw(count):
        raise torch.OutOfMemoryError("no room")

    chosen = batching.Batching(torch.device("cuda"), given)
    with pytest.raises(UserError, match=advice):
        while chosen.draw(draw, 64) is None:
            pass


def test_a_container_s_limit_counts(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2000 kB\n",
        "/sys/fs/cgroup/memory.max": "1000000\n",
        "/sys/fs/cgroup/memory.current": "400000\n",
    }
    monkeypatch.setattr(Path, "exists", lambda self: str(self) in files)
    monkeypatch.setattr(Path, "read_text", lambda self: files[str(self)])
    assert memory.available() == 600_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory.available() == 2_048_000
    files.clear()
    assert memory.available() is None
