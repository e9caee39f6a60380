"""The report on a folder of pictures."""

import json
import shutil

import pytest
from PIL import Image, ImageEnhance

import pictures
from trilemma import data
from trilemma.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_counts(tmp_path):
    root = pictures.class_folders(tmp_path / "p", {"cats": 6, "dogs": 70})
    pictures.save(pictures.picture(1, (80, 50)).convert("L"), root / "cats" / "x.jpg")
    report = data.check(root)
    assert report == json.loads(json.dumps(report))
    assert report["layout"] == "class folders" and report["container"] == "folder"
    assert report["pictures"] == 77 and report["classes"] == {"cats": 7, "dogs": 70}
    assert report["sizes"] == {"40x40": 76, "80x50": 1}
    assert report["modes"] == {"RGB": 76, "L": 1} and report["formats"] == {"PNG": 76, "JPEG": 1}
    assert sum(report["splits"].values()) == 77 and report["split_rule"] == "by content"
    assert report["unusable"] == [] and report["captions"] == 0
    words = " ".join(report["warnings"])
    assert "only 77 pictures" in words and "77 pictures are smaller than 64" in words
    assert "1 pictures are not square" in words and "unbalanced" not in words


def test_unbalanced_classes_and_captions(tmp_path):
    root = pictures.class_folders(tmp_path / "p", {"cats": 2, "dogs": 40})
    (root / "cats" / "0000.txt").write_text("a cat")
    report = data.check(root, size=32)
    assert report["captions"] == 1 and "captions" in report["layout"]
    assert any("unbalanced classes: from 2 to 40" in line for line in report["warnings"])
    assert any("41 of 42 pictures have no caption" in note for note in report["notes"])


def test_exact_and_near_duplicates(tmp_path):
    root = pictures.folder(tmp_path / "p", 20)
    shutil.copy(root / "0003.png", root / "copy.png")
    original = Image.open(root / "0005.png")
    original.save(root / "near.jpg", quality=90)
    ImageEnhance.Brightness(original).enhance(1.02).save(root / "brighter.png")
    report = data.check(root)
    assert report["exact_duplicates"] == [["0003.png", "copy.png"]]
    assert [set(group) for group in report["near_duplicates"]] == [
        {"0005.png", "near.jpg", "brighter.png"}
    ]
    text = data.describe(report)
    assert "0003.png = copy.png" in text and "exact duplicates: 1" in text


def test_flat_pictures_of_other_colours_are_no_duplicates(tmp_path):
    for k in range(5):
        pictures.save(Image.new("RGB", (16, 16), (40 * k, 0, 0)), tmp_path / "p" / f"{k}.png")
    assert data.check(tmp_path / "p")["near_duplicates"] == []


def test_attributes_are_counted(tmp_path):
    root = pictures.folder(tmp_path / "p", 4)
    rows = [{"file_name": f"{k:04d}.png", "hat": k % 2, "tall": 1} for k in range(4)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = data.check(root)
    assert report["attributes"] == {"hat": 2, "tall": 4}
    assert report["layout"] == "attributes (metadata.jsonl)"


def test_unpaired_domains(tmp_path):
    root = pictures.translation(tmp_path / "p")
    report = data.check(root)
    assert report["layout"] == "translation (trainA to trainB, unpaired)"
    assert report["source_splits"] == {"train": 6, "valid": 0, "test": 2}
    assert any("only 6 pictures of one domain" in line for line in report["warnings"])
    assert report["advice"][0].endswith(f"trilemma train cyclegan --data {root}")
    text = data.describe(report)
    assert "8 usable, of domain A: 6 train, 2 test" in text and "these are domain B" in text


def test_a_domain_without_a_picture_that_can_be_used(tmp_path):
    for bad in "AB":
        root = pictures.translation(tmp_path / bad)
        for folder in (f"train{bad}", f"test{bad}"):
            for path in (root / folder).glob("*.png"):
                path.write_bytes(b"")
    words = " ".join(data.check(tmp_path / "A")["warnings"])
    assert "one of trainA and trainB has no picture that can be used" in words
    with pytest.raises(UserError, match="none of the trainB pictures .*trainB/0000.png: empty"):
        data.check(tmp_path / "B")


def test_tiles_for_recipes_that_enlarge(tmp_path):
    root = pictures.folder(tmp_path / "p", 3, (200, 140))
    pictures.save(pictures.picture(9, (300, 30)), root / "flat.png")
    report = data.check(root, size=64)
    assert report["tiles"] == {"side": 64, "count": 18, "too_small": 1}
    assert "18 of 64 x 64 for recipes that enlarge pictures" in data.describe(report)
    assert "1 pictures are too small" in data.describe(report)
    assert len(data.load(root, split="all", size=64, tiles=True)) == 18
    assert "enlarge pictures" not in data.describe(data.check(pictures.folder(tmp_path / "q"), 32))


def test_a_crop_larger_than_all_pictures(tmp_path):
    root = pictures.folder(tmp_path / "p", 3, (60, 40))
    with pytest.raises(UserError, match="none of the 3 .*0000.png: smaller than the crop: 60 x 40"):
        data.load(root, size=48, tiles=True)


def test_packaged_set(tmp_path):
    report = data.check("fashion")
    assert report["classes"]["Sneaker"] == 1200 and report["splits"]["test"] == 2000
    assert report["split_rule"] == "given" and report["shape"] == [1, 28, 28]
    text = data.describe(report)
    assert "12000 usable; grey, decoded to 28 x 28" in text and "10000 train, 2000 test" in text
