"""Captions: several of one picture, templates over what is known, and which is told when."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from trilemma import data
from trilemma.data import batches, named
from trilemma.data.captions import compose
from trilemma.data.listing import Item, Listing
from trilemma.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pictures(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (40 * i, 10, 200)).save(folder / f"{i}.png")
    return folder


def captions(folder, **options):
    """Return the captions of each picture, in the order of the pictures."""
    found = data.load(folder, split="all", **options)
    told = found.captions or [[text] for text in found.text]
    return [told[i] for i in np.argsort(found.images[:, 0, 0, 0])]


ALL = [["cat", "a cat"], ["dog"], ["bird", "a bird", "wings"], [""]]


def test_several_captions_as_lists_in_jsonl(tmp_path):
    folder = pictures(tmp_path / "p")
    rows = [{"file_name": f"{i}.png", "text": each} for i, each in enumerate(ALL)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(folder) == ALL


def test_several_captions_as_lists_in_parquet(tmp_path):
    pyarrow, parquet = (pytest.importorskip(f"pyarrow{part}") for part in ("", ".parquet"))

    folder = pictures(tmp_path / "p")
    table = pyarrow.table({"file_name": [f"{i}.png" for i in range(4)], "captions": ALL})
    parquet.write_table(table, folder / "metadata.parquet")
    assert captions(folder) == ALL


def test_several_captions_as_rows_of_a_csv(tmp_path):
    folder = pictures(tmp_path / "p")
    rows = [f'{i}.png,"{text}"' for i, each in enumerate(ALL) for text in each]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    assert captions(folder) == ALL


def test_several_captions_as_lines_beside_the_pictures(tmp_path):
    folder = pictures(tmp_path / "p")
    for i, each in enumerate(ALL):
        (folder / f"{i}.txt").write_text("\n\n  ".join(each) + "\n")
    assert captions(folder) == ALL


def test_which_caption_is_told_follows_from_seed_and_position(tmp_path):
    folder = pictures(tmp_path / "p", 2)
    (folder / "0.txt").write_text("one\ntwo\nthree")
    (folder / "1.txt").write_text("four")
    found = data.load(folder, split="all")

    def told(start, count, seed=0, **options):
        stream = batches(found, 4, seed=seed, start=start, **options)
        return [text for _ in range(count) for text in next(stream).condition.text]

    whole = told(0, 30)
    assert set(whole) == {"one", "two", "three", "four"} and whole.count("four") == 60
    assert min(whole.count(word) for word in ("one", "two", "three")) > 8
    assert told(40, 5) == whole[40:60], "a resumed run is told other captions"
    halves = [told(0, 1, rank=rank, world=2) for rank in range(2)]
    assert halves[0] + halves[1] == whole[:4]
    assert told(0, 30, seed=1) != whole
    assert {found.condition([i]).text[0] for i in range(2)} == {"one", "four"}


def listing():
    items = [
        Item("0", label="food", text="an apple", attributes=(1,)),
        Item("1", label="food", attributes=(0,)),
        Item("2", label="animal", text="a fox", attributes=(0,), more=("a red fox",)),
    ]
    rows = {
        "0": {"name": "apple", "keywords": ["fruit", "red"]},
        "1": {"name": "pear", "keywords": []},
        "2": {"name": "", "keywords": ["wild"]},
    }
    names = ["animal", "food"]
    return Listing("labels", items, names, ["bright"], rows=rows)


def made(*templates):
    return [[item.text, *item.more] for item in compose(listing(), templates).items]


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        (["name"], [["apple"], ["pear"], [""]]),
        (["{name} drawing"], [["apple drawing"], ["pear drawing"], [""]]),
        (["name", "{label}: {name}"], [["apple", "food: apple"], ["pear", "food: pear"], [""]]),
        (["{name}, {keywords}"], [["apple, fruit", "apple, red"], [""], [""]]),
        (["{text}"], [["an apple"], [""], ["a fox", "a red fox"]]),
        (["a {bright:bright} {label}"], [["a bright food"], ["a food"], ["a animal"]]),
        (["{label}{bright:, bright}"], [["food, bright"], ["food"], ["animal"]]),
        (["label", "{label}"], [["food"], ["food"], ["animal"]]),
    ],
)
def test_templates(templates, expected):
    assert made(*templates) == expected


def test_pictures_without_a_caption_are_counted():
    assert compose(listing(), ["name"]).notes == [
        "1 of 3 pictures get no caption from the templates"
    ]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{colour}", "asks for 'colour'; the pictures have bright, keywords, label, name, text"),
        ("an emoji", "is the same for every picture: write columns in braces"),
        ("{name", "is not well formed"),
        ("{name} {unset}", "asks for 'unset'"),
    ],
)
def test_templates_that_cannot_be_used(template, told):
    with pytest.raises(UserError, match=told):
        made(template)


def test_templates_of_classes_and_of_named_sets(tmp_path, monkeypatch):
    for k, name in enumerate(("cat", "dog")):
        for i in range(2):
            path = pictures(tmp_path / "p" / name, 1) / "0.png"
            path.rename(path.with_name(f"{k}{i}.png"))
    found = data.load(tmp_path / "p", split="all", captions=["a picture of a {label}"])
    assert sorted(found.text) == ["a picture of a cat"] * 2 + ["a picture of a dog"] * 2
    assert data.load(tmp_path / "p", split="all").text is None


def test_a_parquet_file_of_pictures(tmp_path):
    pyarrow, parquet = (pytest.importorskip(f"pyarrow{part}") for part in ("", ".parquet"))

    content = [path.read_bytes() for path in sorted(pictures(tmp_path / "p").glob("*.png"))]
    columns = {
        "code": ["A", "B", "C", "D"],
        "name": ["black", "blue", "violet", "pink"],
        "keywords": [["dark", "night"], [], ["flower"], ["warm"]],
        "category": ["cold", "cold", "warm", "warm"],
    }
    forms = [content, [{"bytes": each, "path": None} for each in content]]
    for number, form in enumerate(forms):
        file = tmp_path / f"emoji{number}.parquet"
        parquet.write_table(pyarrow.table({**columns, "image": form}), file)
        found = data.load(file, split="all")
        assert found.label_names == ["cold", "warm"] and found.text is None
        assert captions(file, captions=["name", "{keywords} {category}"]) == [
            ["black", "dark cold", "night cold"], ["blue"],
            ["violet", "flower warm"], ["pink", "warm warm"],
        ]  # fmt: skip
    form = [None, *content[1:]]
    parquet.write_table(pyarrow.table({**columns, "image": form}), file)
    assert data.load(file, split="all").skipped == {"0000000": "no picture in this row"}
    parquet.write_table(pyarrow.table(columns), file)
    with pytest.raises(UserError, match=r"no column of pictures \(bytes\); its columns: code"):
        data.load(file)
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is not a readable parquet file"):
        data.load(file)
    with pytest.raises(UserError, match=r"a folder of pictures, or a \.zip, \.parquet or \.tar"):
        named.find(str(tmp_path / "p" / "0.png"))


def shard(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_webdataset_shards(tmp_path):
    content = [path.read_bytes() for path in sorted(pictures(tmp_path / "p").glob("*.png"))]
    folder = tmp_path / "shards"
    folder.mkdir()
    shard(folder / "000.tar", {
        "a.png": content[0], "a.txt": b"one\nfirst", "a.cls": b"0", "a.json": b'{"artist": "X"}',
        "b.png": content[1], "b.txt": b"two", "b.cls": b"1", "b.json": b'{"artist": "Y"}',
    })  # fmt: skip
    shard(folder / "001.tar", {
        "a.png": content[2], "a.json": b'{"caption": "three", "artist": "X"}', "a.cls": b"1",
        "c.png": content[3], "c.json": b'{"caption": "four", "artist": "Z"}', "c.cls": b"0",
    })  # fmt: skip
    for source in (folder, folder / "{000..001}.tar"):
        assert captions(str(source)) == [["one", "first"], ["two"], ["three"], ["four"]]
    found = data.load(folder, split="all", captions=["by {artist}"])
    assert found.label_names == ["0", "1"]
    assert captions(folder, captions=["by {artist}"]) == [["by X"], ["by Y"], ["by X"], ["by Z"]]
    assert captions(str(folder / "000.tar")) == [["one", "first"], ["two"]]
    whole = (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(b"no tar" + whole[6:900])
    cut = data.load(folder, split="all")
    assert len(cut) == 2 and "damaged" in cut.skipped["001.tar"]
    with pytest.raises(UserError, match=r"002\.tar is not there"):
        data.load(str(folder / "{000..002}.tar"))
    shard(folder / "001.tar", {"a.png": content[0], "a.json": b"{"})
    with pytest.raises(UserError, match=r"001/a\.json: "):
        data.load(folder)
