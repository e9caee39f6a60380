"""Dataset, the stateless stream of batches, and the packaged data sets."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import pictures
from trilemma import data
from trilemma.data.dataset import Dataset, batches
from trilemma.data.named import PACKAGED
from trilemma.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for this file's tests, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def small(count=10, sources=None):
    """A data set whose picture i is filled with i, but for its left column of 255."""
    images = np.repeat(np.arange(count, dtype=np.uint8), 3 * 16).reshape(count, 3, 4, 4)
    images[..., 0] = 255
    source = None
    if sources:
        source = np.repeat(np.arange(sources, dtype=np.uint8), 48).reshape(sources, 3, 4, 4)
    return Dataset(
        "small", "train", "0", images,
        label=np.arange(count) % 3, label_names=["a", "b", "c"],
        attributes=np.eye(count, 2, dtype=np.uint8), attribute_names=["x", "y"],
        text=[str(i) for i in range(count)], source=source,
    )  # fmt: skip


def take(stream, count):
    return [next(stream) for _ in range(count)]


def texts(found):
    return [text for batch in found for text in batch.condition.text]


def same(a, b):
    conditions = (a.condition, b.condition)
    assert torch.equal(a.image, b.image)
    assert torch.equal(a.rng.seeds, b.rng.seeds)
    assert conditions[0].text == conditions[1].text
    assert torch.equal(conditions[0].label, conditions[1].label)
    assert torch.equal(conditions[0].attributes, conditions[1].attributes)


def test_each_epoch_shows_every_picture_once_in_a_new_order():
    seen = texts(take(batches(small(), 5, seed=0), 6))
    epochs = [seen[k : k + 10] for k in (0, 10, 20)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_follows_from_the_seed():
    a, b, c = (texts(take(batches(small(), 5, seed=s), 4)) for s in (1, 1, 2))
    assert a == b != c


@pytest.mark.parametrize("start", [4, 12, 40, 41])
def test_starting_in_the_middle_continues_the_same_stream(start):
    whole = take(batches(small(), 1, seed=3, flip=True), 60)
    later = next(batches(small(), 12, seed=3, start=start, flip=True))
    assert later.seen == start
    for k, single in enumerate(whole[start : start + 12]):
        assert torch.equal(single.image[0], later.image[k])
        assert single.condition.text[0] == later.condition.text[k]
        assert single.rng.seeds[0] == later.rng.seeds[k]


def test_the_shares_of_processes_concatenate_to_the_single_stream():
    alone = take(batches(small(), 6, seed=0, flip=True), 5)
    shares = [take(batches(small(), 6, seed=0, flip=True, rank=r, world=3), 5) for r in range(3)]
    for step, whole in enumerate(alone):
        images = torch.cat([share[step].image for share in shares])
        seeds = torch.cat([share[step].rng.seeds for share in shares])
        assert torch.equal(images, whole.image)
        assert torch.equal(seeds, whole.rng.seeds)
        assert {share[step].seen for share in shares} == {whole.seen} == {6 * step}


def test_a_step_larger_than_the_data_takes_several_epochs():
    batch = next(batches(small(4), 10, seed=0))
    counts = torch.bincount(batch.condition.label)
    assert len(batch) == 10 and counts.sum() == 10
    assert sorted(batch.condition.text[:4]) == sorted(batch.condition.text[4:8])


def test_flips_mirror_about_half_and_only_where_asked():
    plain = next(batches(small(), 1000, seed=0)).image
    flipped = next(batches(small(), 1000, seed=0, flip=True)).image
    assert (plain[..., 0] == 1).all() and not (plain[..., -1] == 1).any()
    turned = (flipped[..., -1] == 1).all(-1).all(-1)
    assert 430 < turned.sum() < 570
    assert torch.equal(torch.where(turned[:, None, None, None], flipped.flip(-1), flipped), plain)


def test_random_streams_differ_between_images_epochs_and_seeds():
    a = torch.cat([b.rng.seeds for b in take(batches(small(), 10, seed=0), 50)])
    b = torch.cat([b.rng.seeds for b in take(batches(small(), 10, seed=1), 50)])
    assert len(torch.unique(torch.cat([a, b]))) == 1000
    assert (a >= 0).all()


def test_images_are_scaled_to_minus_one_and_one():
    image = next(batches(small(), 10, seed=0)).image
    assert image.dtype == torch.float32 and image.max() == 1 and image.min() == -1


def test_unpaired_sources_take_their_own_order():
    stream = batches(small(10, sources=7), 7, seed=0)
    found = take(stream, 4)
    first = [(batch.condition.source[:, 0, 1, 1] * 127.5 + 127.5).round().int() for batch in found]
    assert all(sorted(numbers.tolist()) == list(range(7)) for numbers in first)
    assert len({tuple(numbers.tolist()) for numbers in first}) > 1
    later = next(batches(small(10, sources=7), 7, seed=0, start=21))
    assert torch.equal(later.condition.source, found[3].condition.source)


def test_condition_and_tensor_take_any_kind_of_index():
    dataset = small(sources=4)
    for indices in ([2, 9], np.array([2, 9]), torch.tensor([2, 9]), slice(2, 10, 7), [-8, -1]):
        condition = dataset.condition(indices)
        assert condition.count == 2 and condition.text == ["2", "9"]
        assert condition.label.tolist() == [2, 0] and condition.source.shape == (2, 3, 4, 4)
        assert dataset.tensor(indices)[:, 0, 0, 1].tolist() == [2, 9]
    with pytest.raises(IndexError):
        dataset.tensor([10])


def test_wrong_shares_are_refused():
    with pytest.raises(ValueError, match="5 images cannot be shared by 2"):
        next(batches(small(), 5, seed=0, world=2))


def test_fashion_is_balanced_and_split():
    train, test = data.load("fashion"), data.load("fashion", split="test")
    assert train.shape == (1, 28, 28) and len(train) == 10_000 and len(test) == 2_000
    assert np.bincount(train.label).tolist() == [1000] * 10
    assert np.bincount(test.label).tolist() == [200] * 10
    assert train.label_names[9] == "Ankle boot"
    assert isinstance(train.images, np.memmap) and train.images.dtype == np.uint8
    assert train.fingerprint != test.fingerprint
    trained = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in trained for image in test.images) <= 2  # of the original's own


def test_size_is_rounded_up_to_the_multiple():
    assert data.load("fashion", multiple=8).shape == (1, 32, 32)
    assert data.load("fashion", size=16, channels=3).shape == (3, 16, 16)


def test_emoji_has_labels_text_and_attributes():
    train, test = data.load("emoji"), data.load("emoji", split="test")
    assert train.shape == (3, 64, 64) and len(train) + len(test) == 7572
    assert len(train.label_names) == 10 and set(np.unique(test.label)) == set(range(10))
    assert 0.08 < len(test) / 7572 < 0.12
    woman, red = (train.attribute_names.index(name) for name in ("woman", "hair_red"))
    both = np.flatnonzero(train.attributes[:, woman] & train.attributes[:, red])
    assert len(both) and all("woman" in train.text[i] and "red" in train.text[i] for i in both)
    noto, twemoji = (train.attribute_names.index(name) for name in ("noto", "twemoji"))
    assert (train.attributes[:, noto] + train.attributes[:, twemoji] == 1).all()
    for tone in ("light", "medium", "dark"):
        column = train.attributes[:, train.attribute_names.index(f"skin_{tone}")]
        assert all("skin tone" in train.text[i] for i in np.flatnonzero(column))


def test_emoji_split_leaks_no_tone_variant_and_no_identical_drawing():
    with zipfile.ZipFile(PACKAGED / "emoji.zip") as archive:
        rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
    tones = {f"1F3F{k}" for k in "BCDEF"}
    splits = {}
    for row in rows:
        code = Path(row["file_name"]).stem
        base = "-".join(part for part in code.split("-") if part not in tones) or code
        splits.setdefault(base, set()).add(row["split"])
    assert len(splits) > 1500 and all(len(found) == 1 for found in splits.values())
    train, test = data.load("emoji"), data.load("emoji", split="test")
    trained = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in trained for image in test.images)


def test_packaged_files_are_small_and_licensed():
    files = list(PACKAGED.iterdir())
    assert sum(file.stat().st_size for file in files) < 28e6
    notices = "".join(file.read_text() for file in files if file.suffix == ".txt")
    for words in ("Zalando", "Noto Emoji", "Twemoji", "CC BY 4.0", "Cal Henderson"):
        assert words in notices
    assert "Apache License" in notices


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'fashon' is no data set .*fashion, emoji.*exists"):
        data.load("fashon")


def test_wrong_arguments_are_refused():
    for wrong in ({"split": "dev"}, {"channels": 4}, {"size": 0}):
        with pytest.raises(ValueError):
            data.load("fashion", **wrong)
    with pytest.raises(UserError, match="no colour"):
        data.load("fashion", background="lila")


def test_the_stream_does_not_depend_on_the_process(tmp_path):
    pictures.folder(tmp_path / "p", 12)
    code = (
        "import sys; from trilemma import data;"
        "d = data.load(sys.argv[1], size=16); b = next(data.batches(d, 24, seed=5, flip=True));"
        "print(d.fingerprint, float(b.image.double().pow(2).sum()), b.rng.seeds.sum().item())"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "p")]
    outputs = []
    for k in range(2):
        env = {
            **os.environ,
            "XDG_CACHE_HOME": str(tmp_path / f"cache{k}"),
            "PYTHONHASHSEED": str(k),
        }
        done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
