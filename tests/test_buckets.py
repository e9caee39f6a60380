"""Pictures in a few sizes near their own proportions, and whose turn it is."""

import collections
import random

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
import tiny
from trilemma import cli, codecs, data, drawing, evaluation, latents, sampling, training
from trilemma.data import buckets
from trilemma.errors import Interrupted, UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(("side", "multiple", "step"), [(512, 8, 64), (1024, 16, 64), (32, 8, 8)])
def test_sizes_are_of_about_equal_area(side, multiple, step):
    made = buckets.sizes(side, multiple)
    assert (side, side) in made and len(made) == len(set(made))
    assert [(w, h) for h, w in reversed(made)] == made
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


def sets():
    draw = np.random.default_rng(0)
    shapes = [(7, 16, 16), (5, 8, 32)]
    return [
        data.Dataset("p", "train", f"{h}", draw.integers(0, 256, (n, 3, h, w), np.uint8))
        for n, h, w in shapes
    ]


def test_batches_are_of_one_size_and_go_on_where_they_stopped():
    kept = [np.arange(2 * n).reshape(2, n) for n in (7, 5)]
    whole = data.bucketed(sets(), 4, seed=3, flip=True, kept=kept)
    first = [next(whole) for _ in range(12)]
    again = data.bucketed(sets(), 4, seed=3, start=5 * 4, flip=True, kept=kept)
    for before, batch in zip(first[5:], again, strict=False):
        assert torch.equal(before.image, batch.image) and before.seen == batch.seen
        assert torch.equal(before.rng.seeds, batch.rng.seeds)
        assert torch.equal(before.kept, batch.kept)
    assert {tuple(batch.image.shape) for batch in first} == {(4, 3, 16, 16), (4, 3, 8, 32)}
    assert sum(batch.image.shape[3] == 32 for batch in first) == 5  # of 12 batches of 4
    seeds = torch.cat([batch.rng.seeds for batch in first])
    assert len(seeds.unique()) == len(seeds)
    halves = [
        data.bucketed(sets(), 4, seed=3, flip=True, kept=kept, rank=r, world=2) for r in (0, 1)
    ]
    for batch, one, two in zip(first, *halves, strict=False):
        assert torch.equal(batch.image, torch.cat([one.image, two.image]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("photos") / "p")


@pytest.fixture(scope="module")
def stage(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("stage") / "run"
    training.train(
        "kl-f4", photos, out=out, size=16, steps=1, quiet=True, overrides=tiny.overrides("kl-f4")
    )
    return out


def fit(name, photos, stage, out, *changes, **options):
    changes = [*tiny.overrides(name), f'model.codec.stage.path="{stage}"', *changes]
    changes += ["data.multiple=8", "data.buckets=true", "train.log_every=1", "train.batch=5"]
    options = {"size": 16, "steps": 5, "quiet": True, **options}
    return training.train(name, photos, out=out, overrides=changes, **options)


def test_a_model_of_latents_learns_from_several_sizes(photos, stage, tmp_path, monkeypatch):
    seen, encoded = [], codecs.encoded

    def watched(codec, batch):
        x0 = encoded(codec, batch)
        seen.append(tuple(x0.shape))
        return x0

    monkeypatch.setattr("trilemma.models.diffusion.encoded", watched)

    def stop(trained, elapsed):
        raise Interrupted("as by Ctrl-C")

    saving = "train.save_every=0"
    whole = fit("text-latent", photos, stage, tmp_path / "whole", saving, steps=6)
    assert len({shape[2:] for shape in seen}) > 1 and {shape[:2] for shape in seen} == {(5, 4)}
    with pytest.raises(Interrupted):
        fit("text-latent", photos, stage, tmp_path / "parts", saving, steps=6, probe=stop, probes=2)
    parts = fit("text-latent", photos, stage, tmp_path / "parts", saving, steps=6, resume=True)
    pairs = zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    loaded = sampling.load(tmp_path / "parts")
    assert loaded.sample(1, text="picture", steps=2, size=[8, 32]).shape == (1, 3, 8, 32)
    assert loaded.sample(1, text="picture", steps=2).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="9 x 16 have no latents of a 4th"):
        loaded.sample(1, text="picture", steps=2, size=[9, 16])


def test_latents_of_each_size_are_kept(photos, stage, tmp_path, monkeypatch):
    made, keep = [], latents.keep

    def watched(*arguments):
        made.append(keep(*arguments))
        return made[-1]

    monkeypatch.setattr(latents, "keep", watched)
    fit("latent-dit", photos, stage, tmp_path / "run", steps=8)
    shapes = {kept.shape[2:] for kept in made}
    assert len(shapes) == len(made) > 1 and sum(kept.shape[1] for kept in made) == len(
        data.load(photos, size=16)
    )


def test_grids_show_the_sizes_and_scores_tell_that_they_are_of_squares(photos, stage, tmp_path):
    asked = "train.grids=1", "sample.steps=1"
    trained = fit("latent-dit", photos, stage, tmp_path / "run", *asked, steps=2)
    columns, sizes = (10 if trained.conditional else 8), trained.data["buckets"]
    assert sizes[0] == [16, 16] and 1 < len(sizes) <= columns
    (sheet,) = (tmp_path / "run" / "samples").iterdir()
    rows = columns // len(sizes)
    width = max(columns * (width + 2) - 2 for _, width in sizes)
    height = sum(rows * (height + 2) - 2 + 8 for height, _ in sizes) - 8
    assert Image.open(sheet).size == (width, height)
    loaded = sampling.load(tmp_path / "run")
    assert loaded.data["buckets"] == sizes
    result = evaluation.evaluate(loaded, photos, n=4, split="all", features="pixels", steps=1)
    assert result["protocol"]["size"] == [3, 16, 16]
    assert "squares cut out of the real ones" in result["warnings"][-1]
    with pytest.raises(UserError, match="32x8; expected squares"):
        evaluation.evaluate(loaded, photos, n=4, features="pixels", steps=1, size=[8, 32])


def test_captioned_grids_of_several_sizes_are_enlarged_alike():
    images = [torch.zeros(8, 3, *size, dtype=torch.uint8) for size in ((16, 16), (32, 8))]
    sheets = [drawing.captioned(i, ["a"] * 8, 8, 96 * i.shape[3] // 16) for i in images]
    assert [sheet.width for sheet in sheets] == [8 * (96 + 8), 8 * (48 + 8)]
    whole = drawing.stacked(sheets)
    assert whole.size == (sheets[0].width, sheets[0].height + 8 + sheets[1].height)


def test_what_takes_no_sizes_is_told(photos, tmp_path):
    changes = [*tiny.overrides("quick-gan"), "data.buckets=true"]
    with pytest.raises(UserError, match="buckets is for diffusion models .* quick-gan"):
        training.train("quick-gan", photos, out=tmp_path, steps=1, overrides=changes, quiet=True)


def test_sizes_from_the_command_line(photos, stage, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def call(*words):
        monkeypatch.setattr("sys.argv", ["trilemma", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code

    changes = [*tiny.overrides("latent-diffusion"), f'model.codec.stage.path="{stage}"']
    changes += ["data.multiple=8", "train.batch=4"]
    asked = [word for change in changes for word in ("--set", change)]
    call("train", "latent-diffusion", "--data", photos, "--size", 16, "--steps", 2, "--buckets",
         "--out", out, *asked)  # fmt: skip
    call("sample", out, "-n", 1, "--size", "32x8", "--steps", 2, "--out", out / "drawn")
    picture = Image.open(out / "drawn" / "00000.png")
    assert picture.size == (32, 8) and "Size: 32x8" in picture.text["parameters"]
