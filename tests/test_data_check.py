"""The report on a folder of pictures."""

import json
import shutil

import pytest
from PIL import Image, ImageEnhance

import pictures
from trilemma import data


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


def test_packaged_set(tmp_path):
    report = data.check("fashion")
    assert report["classes"]["Sneaker"] == 1200 and report["splits"]["test"] == 2000
    assert report["split_rule"] == "given" and report["shape"] == [1, 28, 28]
    text = data.describe(report)
    assert "12000 usable; grey, decoded to 28 x 28" in text and "10000 train, 2000 test" in text
