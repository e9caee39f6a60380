"""Pictures in a few sizes near their own proportions, and whose turn it is."""

import collections
import random

import numpy as np
import pytest
from PIL import Image

import pictures
from trilemma import data
from trilemma.data import buckets


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(("side", "multiple", "step"), [(512, 8, 64), (1024, 16, 64), (32, 8, 8)])
def test_sizes_are_of_about_equal_area(side, multiple, step):
    made = buckets.sizes(side, multiple)
    assert (side, side) in made and len(made) == len(set(made))
    assert {(w, h) for h, w in made} >= {(h, w) for h, w in made if h == side // 4} - {None}
    for height, width in made:
        assert height % step == width % step == 0
        assert max(height, width) <= 4 * min(height, width)
        if side > 32:
            assert 0.85 < height * width / side**2 < 1.15


def test_a_picture_goes_where_its_proportions_are_nearest():
    among = [(16, 64), (32, 32), (64, 16)]
    assert buckets.nearest(among, 100, 100) == (32, 32)
    assert buckets.nearest(among, 100, 199) == (32, 32)
    assert buckets.nearest(among, 100, 201) == (16, 64)
    assert buckets.nearest(among, 900, 100) == (64, 16)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_all_pictures_are_seen_equally_often(batch):
    counts = [7, 1, 4]
    seen = collections.Counter()
    orders = []
    for step in range(2 * sum(counts)):  # two rounds of `batch` epochs each
        bucket, place = buckets.turn(counts, batch, 5, step)
        orders.append(bucket)
        for at in range(place, place + batch):
            assert seen[bucket, at] == 0
            seen[bucket, at] += 1
    for bucket, count in enumerate(counts):
        places = sorted(at for which, at in seen if which == bucket)
        assert places == list(range(2 * batch * count))
    assert orders[: sum(counts)] != sorted(orders[: sum(counts)])
    other = [buckets.turn(counts, batch, 6, step)[0] for step in range(len(orders))]
    assert other != orders
    steps = random.Random(0).sample(range(24), 24)  # a function of the step alone
    assert [buckets.turn(counts, batch, 5, step)[0] for step in steps] == [orders[s] for s in steps]


def test_one_bucket_is_the_plain_order():
    assert [buckets.turn([5], 3, 0, step) for step in range(6)] == [(0, 3 * s) for s in range(6)]


def wide(width, height):
    """Return a picture that is red, but for a tenth of it at either end of its longer side."""
    image = Image.new("RGB", (width, height), "red")
    if width != height:
        along = (width // 10, height) if width > height else (width, height // 10)
        for corner in ((0, 0), (width - along[0], height - along[1])):
            image.paste("blue", (*corner, corner[0] + along[0], corner[1] + along[1]))
    return image


def folder(root):
    root.mkdir()
    shapes = [(100, 100)] * 12 + [(200, 100)] * 6 + [(100, 210)] * 5 + [(900, 100)]
    for i, shape in enumerate(shapes):
        wide(*shape).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text(f"picture {i}")
    turned = wide(200, 100).transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # the viewer turns it: wide again
    turned.save(root / "turned.jpg", exif=exif)
    (root / "turned.txt").write_text("picture turned")
    return root


def test_each_size_has_its_pictures_and_captions(tmp_path):
    made = data.load_buckets(folder(tmp_path / "p"), 32, multiple=8, split="all", channels=3)
    counts = {part.shape: len(part) for part in made}
    assert counts == {(3, 16, 64): 1, (3, 24, 48): 7, (3, 32, 32): 12, (3, 48, 24): 5}
    told = {part.shape[1:]: part.text for part in made}
    assert set(told[24, 48]) == {*(f"picture {i}" for i in range(12, 18)), "picture turned"}
    assert told[16, 64] == ["picture 23"]
    assert len({part.fingerprint for part in made}) == 4
    for part in made:
        ends = part.images[:, 2, :, :2] if part.shape[2] > part.shape[1] else part.images[:, 2, :2]
        whole = part.shape[1:] in ((24, 48), (48, 24))  # of 9 : 1 the ends are cut off
        assert (ends.mean() > 200) == whole
    train = data.load_buckets(tmp_path / "p", 32, multiple=8, channels=3)
    test = data.load_buckets(tmp_path / "p", 32, multiple=8, channels=3, split="test")
    assert sum(map(len, train)) + sum(map(len, test)) == 25 and test
    texts = [text for part in (*train, *test) for text in part.text]
    assert sorted(texts) == sorted(text for part in made for text in part.text)
    for part in test:
        (same,) = (whole for whole in made if whole.shape == part.shape)
        row = same.text.index(part.text[0])
        assert np.array_equal(part.images[0], same.images[row])


def test_squares_are_what_they_are_without_buckets(tmp_path):
    root = pictures.folder(tmp_path / "p", 6)
    (one,) = data.load_buckets(root, 32, multiple=8)
    assert np.array_equal(one.images, data.load(root, size=32).images)


def test_check_tells_the_buckets(tmp_path):
    report = data.check(folder(tmp_path / "p"))
    assert report["buckets"]["side"] == 512
    assert sum(report["buckets"]["sizes"].values()) == 25
    assert report["buckets"]["sizes"]["512x512"] == 12
    assert report["sizes"]["200x100"] == 7  # turned upright
    assert "finetune --buckets" in data.describe(report)
