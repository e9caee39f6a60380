"""Every layout of pictures, in folders and in zips, and the data sets known by name."""

import gzip
import hashlib
import io
import json
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

import pictures
from trilemma import data
from trilemma.data import hub, named
from trilemma.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["folder", "zip", "deflated zip"])
def wrap(request, tmp_path):
    """Turn a folder into what the test reads: itself, or a zip of it."""

    def wrapped(folder):
        if request.param == "folder":
            return folder
        method = zipfile.ZIP_DEFLATED if "deflated" in request.param else zipfile.ZIP_STORED
        return pictures.zipped(folder, tmp_path / "pictures.zip", method)

    return wrapped


def load(path, split="all", size=8, **options):
    return data.load(path, split=split, size=size, **options)


def flat(path, colour, name):
    """A picture of one grey level, so that a test knows it again."""
    return pictures.save(Image.new("RGB", (8, 8), (colour, colour // 2, 9)), path / name)


def level(dataset):
    return dataset.images[:, 0, 4, 4].tolist()


def test_unlabelled_is_recursive(tmp_path, wrap):
    root = pictures.folder(tmp_path / "p", 5)
    pictures.folder(root / "deep" / "deeper", 4, seed=50)
    found = load(wrap(root))
    assert len(found) == 9 and found.label is None and found.text is None
    assert found.attributes is None and found.source is None


def test_one_folder_around_all_says_nothing(tmp_path, wrap):
    pictures.class_folders(tmp_path / "p" / "my photos" / "2019")
    assert load(wrap(tmp_path / "p")).label_names == ["cats", "dogs"]


def test_class_folders(tmp_path, wrap):
    root = pictures.class_folders(tmp_path / "p", {"10": 3, "9": 2, "b": 4})
    found = load(wrap(root))
    assert found.label_names == ["9", "10", "b"]
    assert np.bincount(found.label).tolist() == [2, 3, 4]
    assert data.check(root, size=8)["classes"] == {"9": 2, "10": 3, "b": 4}


def test_class_folders_below_splits(tmp_path, wrap):
    for k, (split, count) in enumerate((("train", 5), ("val", 3), ("test", 2))):
        for label in range(2):
            for number in range(count):
                flat(tmp_path / "p" / split / "ab"[label], 10 * k + label, f"{number}.png")
    source = wrap(tmp_path / "p")
    train, test, every = (load(source, s) for s in ("train", "test", "all"))
    assert (len(train), len(test), len(every)) == (10, 4, 20)
    assert set(level(train)) == {0, 1} and set(level(test)) == {20, 21}
    assert train.label_names == ["a", "b"] == test.label_names
    assert [k % 2 for k in level(test)] == test.label.tolist()


def test_validation_serves_for_testing_where_there_is_no_test(tmp_path):
    for split, colour in (("Train", 10), ("validation", 20)):
        for number in range(3):
            flat(tmp_path / "p" / split, colour, f"{number}.png")
    assert level(load(tmp_path / "p", "test")) == [20] * 3
    assert level(load(tmp_path / "p", "train")) == [10] * 3


def test_a_lone_train_folder_is_split_by_content(tmp_path):
    pictures.folder(tmp_path / "p" / "train", 12)
    train, test = load(tmp_path / "p", "train"), load(tmp_path / "p", "test")
    assert len(train) + len(test) == 12 and len(test) >= 1


def test_pictures_beside_folders_make_them_no_classes(tmp_path):
    root = pictures.class_folders(tmp_path / "p")
    pictures.folder(root, 1)
    report = data.check(root, size=8)
    assert report["layout"] == "unlabelled" and "not taken as classes" in report["notes"][0]


@pytest.mark.parametrize("kind", ["csv", "csv semicolon", "jsonl", "parquet"])
def test_metadata_tables(tmp_path, kind, wrap):
    root = tmp_path / "p"
    rows = []
    for k in range(6):
        flat(root / "images", 10 * k, f"{k}.png")
        row = {"file_name": f"images/{k}.png", "text": f"number {k}, é", "label": "ab"[k % 2]}
        rows.append(row | {"smiling": int(k > 2), "hat": [-1, 1][k % 2], "score": k})
    if kind.startswith("csv"):
        comma = ";" if "semicolon" in kind else ","
        lines = [
            comma.join(f'"{v}"' for v in row.values()) for row in [dict.fromkeys(rows[0]), *rows]
        ]
        lines[0] = comma.join(rows[0])
        encoding = "cp1252" if "semicolon" in kind else "utf-8-sig"
        (root / "metadata.csv").write_bytes("\r\n".join(lines).encode(encoding))
    elif kind == "jsonl":
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), root / "metadata.parquet")
    found = load(wrap(root))
    order = [k // 10 for k in level(found)]
    assert sorted(order) == list(range(6))
    assert found.text == [f"number {k}, é" for k in order]
    assert found.label.tolist() == [k % 2 for k in order] and found.label_names == ["a", "b"]
    assert found.attribute_names == ["smiling", "hat"]
    assert found.attributes.tolist() == [[int(k > 2), k % 2] for k in order]
    assert found.condition([0]).text == [f"number {order[0]}, é"]


def test_metadata_in_each_split_folder_with_a_split_column_winning(tmp_path):
    for split in ("train", "test"):
        rows = []
        for k in range(4):
            flat(tmp_path / "p" / split, 100 * (split == "test") + k, f"{k}.png")
            rows.append({"file_name": f"{k}.png", "caption": f"{split} {k}"})
        rows[0]["split"] = "test"
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / "p" / split / "metadata.jsonl").write_text(lines)
    train, test = load(tmp_path / "p", "train"), load(tmp_path / "p", "test")
    assert train.text == ["train 1", "train 2", "train 3"] and level(train) == [1, 2, 3]
    assert sorted(test.text) == ["test 0", "test 1", "test 2", "test 3", "train 0"]


@pytest.mark.parametrize("ending", [".txt", ".caption"])
def test_captions_beside_the_pictures(tmp_path, ending, wrap):
    for k in range(4):
        flat(tmp_path / "p" / "ab"[k % 2], 10 * k, f"{k}.png")
        if k < 3:
            (tmp_path / "p" / "ab"[k % 2] / f"{k}{ending}").write_text(f" number {k}\n of four ")
    (tmp_path / "p" / "a" / "readme.txt").write_text("no caption")
    found = load(wrap(tmp_path / "p"))
    order = [k // 10 for k in level(found)]
    assert found.captions == [[f"number {k}", "of four"] if k < 3 else [""] for k in order]
    assert found.text == [f"number {k}" if k < 3 else "" for k in order]
    assert found.label.tolist() == [k % 2 for k in order]


def test_pictures_a_table_does_not_name(tmp_path):
    root = pictures.folder(tmp_path / "p", 4)
    rows = [{"file_name": f"{k:04d}.png", "label": k, "text": ""} for k in range(3)]
    rows.append({"file_name": "gone.png", "label": 1})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = data.check(root, size=8)
    assert report["unusable"] == [{"path": "0003.png", "reason": "not in metadata.jsonl"}]
    assert any("gone.png" in note for note in report["notes"])
    assert report["classes"] == {"0": 1, "1": 1, "2": 1}


def test_pictures_without_an_attribute_that_the_others_have(tmp_path):
    root = pictures.folder(tmp_path / "p", 6)
    table = "file_name,hat,tall,seen,size\n0000.png,1,0,,3\n0001.png,,1,1,0\n"
    table += "0002.png,0,1,,1\n0003.png,1,,,1\n0004.png,1,1,,0\n"
    (root / "metadata.csv").write_text(table)
    report = data.check(root, size=8)
    assert report["unusable"] == [
        {"path": "0001.png", "reason": "no hat in metadata.csv"},
        {"path": "0003.png", "reason": "no tall in metadata.csv"},
        {"path": "0005.png", "reason": "not in metadata.csv"},
    ]
    assert report["attributes"] == {"hat": 2, "tall": 2}, "size is no attribute: it has a 3"
    assert report["notes"] == [
        "column seen is not taken as an attribute: only 1 of 5 pictures have 0 or 1 there"
    ]


def test_pictures_that_only_one_of_two_tables_names(tmp_path):
    root = pictures.folder(tmp_path / "p", 4)
    (root / "list_attr_celeba.txt").write_text("3\nBald\n0000.png 1\n0001.png -1\n0002.png 1\n")
    lines = "".join(f"{k:04d}.png {k % 2}\n" for k in range(4))
    (root / "list_eval_partition.txt").write_text(lines)
    report = data.check(root, size=8)
    (left_out,) = report["unusable"]
    assert left_out["path"] == "0003.png" and left_out["reason"].startswith("no Bald in list_attr")
    assert report["attributes"] == {"Bald": 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "0000.png"}\n{"file', "line 2 is not JSON"),
        ("metadata.parquet", "PAR?", "parquet"),
        ("list_attr_celeba.txt", "4\nA B\n0000.png 1\n", "1 values for 2 attributes"),
        ("dataset.json", '{"labels": [1, 2]}', "pairs"),
    ],
)
def test_damaged_tables_are_named(tmp_path, name, content, message):
    root = pictures.folder(tmp_path / "p", 4)
    (root / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        load(root)


def test_a_table_without_file_names_is_noted(tmp_path):
    root = pictures.folder(tmp_path / "p", 4)
    (root / "metadata.csv").write_text("title,year\nx,1\n")
    assert "no column file_name" in data.check(root, size=8)["notes"][0]


def celeba(root, count=12):
    """CelebA's files at a small scale; the first half for training."""
    lines = [str(count), "Bald Smiling"]
    parts = []
    for k in range(count):
        flat(root / "img_align_celeba", 10 * k, f"{k:06d}.jpg")
        lines.append(f"{k:06d}.jpg {'-1' if k % 2 else ' 1'}  {'1' if k % 3 else '-1'}")
        parts.append(f"{k:06d}.jpg {0 if k < 6 else 1 if k < 8 else 2}")
    (root / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (root / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return root


def test_celeba_attributes_and_partition(tmp_path, wrap):
    root = celeba(tmp_path / "p")
    source = wrap(root)
    train, test, every = (load(source, split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(every)) == (6, 4, 12)
    assert train.attribute_names == ["Bald", "Smiling"]
    expected = [[int(k % 2 == 0), int(k % 3 != 0)] for k in range(12)]
    assert train.attributes.tolist() == expected[:6] and test.attributes.tolist() == expected[8:]
    assert test.condition([0, 1]).attributes.tolist() == expected[8:10]


def test_celeba_by_name(tmp_path):
    celeba(tmp_path / "p")
    assert len(load(f"celeba:{tmp_path / 'p'}", "train")) == 6
    pictures.folder(tmp_path / "q")
    with pytest.raises(UserError, match="list_attr_celeba.txt"):
        load(f"celeba:{tmp_path / 'q'}")


def test_translation(tmp_path, wrap):
    source = wrap(pictures.translation(tmp_path / "p", 6))
    train, test = load(source, "train"), load(source, "test")
    assert len(train) == 7 and train.source.shape == (6, 3, 8, 8)
    assert len(test) == 2 and len(test.source) == 2
    batch = next(data.batches(train, 5, seed=0))
    assert batch.condition.source.shape == (5, 3, 8, 8)
    report = data.check(source, size=8)
    assert report["layout"].startswith("translation") and report["source_pictures"] == 8


@pytest.mark.parametrize("labels", ["numbers", "one-hot", "null"])
def test_nvidia_dataset_json(tmp_path, labels, wrap):
    pairs = []
    for k in range(6):
        name = f"0000{k // 3}/img{k:08d}.png"
        flat(tmp_path / "p" / f"0000{k // 3}", 10 * k, f"img{k:08d}.png")
        pairs.append([name, [int(k % 2 == c) for c in range(2)] if labels == "one-hot" else k % 2])
    content = {"labels": None if labels == "null" else pairs}
    (tmp_path / "p" / "dataset.json").write_text(json.dumps(content))
    found = load(wrap(tmp_path / "p"))
    if labels == "null":
        assert found.label is None  # the folders hold a thousand pictures each, no classes
    else:
        assert found.label.tolist() == [k // 10 % 2 for k in level(found)]
        assert found.label_names == ["0", "1"]


def test_zip_with_backslashes_junk_and_a_password(tmp_path):
    path = tmp_path / "p.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for k in range(4):
            archive.writestr(f"a\\{k}.png", pictures.encoded(pictures.picture(k)))
        archive.writestr("__MACOSX/a/._0.png", b"junk")
        archive.writestr("a/.DS_Store", b"junk")
        locked = zipfile.ZipInfo("a/locked.png")
        archive.writestr(locked, pictures.encoded(pictures.picture(9)))
    content = bytearray(path.read_bytes())
    local = content.find(b"a/locked.png") - 30
    central = content.rfind(b"a/locked.png") - 46
    content[local + 6] |= 1  # the flag of encryption, in both of its places
    content[central + 8] |= 1
    path.write_bytes(content)
    report = data.check(path, size=8)
    assert report["pictures"] == 4
    assert report["unusable"] == [{"path": "a/locked.png", "reason": "encrypted inside the zip"}]


def test_damaged_zip_member_is_listed(tmp_path):
    path = pictures.zipped(pictures.folder(tmp_path / "p", 4), tmp_path / "p.zip")
    content = bytearray(path.read_bytes())
    content[content.find(b"\x89PNG") + 60] ^= 0xFF
    path.write_bytes(content)
    report = data.check(path, size=8)
    assert report["pictures"] == 3 and "damaged inside the zip" in report["unusable"][0]["reason"]


def test_files_that_are_no_zip(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"no zip")
    (tmp_path / "x.rar").write_bytes(b"no zip")
    with pytest.raises(UserError, match="is not a zip file"):
        load(tmp_path / "x.zip")
    with pytest.raises(UserError, match=r"expected a folder of pictures, or a \.zip"):
        load(tmp_path / "x.rar")


# Data sets known by name


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def mnist(root, zipped=True):
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28), np.uint8)),
            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
        ):
            content = idx(array)
            if zipped:
                (root / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (root / f"{part}-{kind.replace('-', '.')}-ubyte").write_bytes(content)
    return root


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_files(tmp_path, zipped):
    mnist(tmp_path / "raw", zipped)
    train, test = (data.load(f"mnist:{tmp_path}", split=s) for s in ("train", "test"))
    assert train.shape == (1, 28, 28) and len(train) == 30 and len(test) == 20
    assert train.label[:12].tolist() == [*range(10), 0, 1] and train.label_names[3] == "3"
    expected = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    assert np.array_equal(train.images[:, 0], expected)


def test_fashion_mnist_from_a_folder(tmp_path):
    mnist(tmp_path / "f")
    found = data.load(f"fashion-mnist:{tmp_path / 'f'}")
    assert found.label_names[0] == "T-shirt/top" and len(found) == 30
    (tmp_path / "f" / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(UserError, match="truncated or damaged"):
        data.load(f"fashion-mnist:{tmp_path / 'f'}")


def test_fashion_mnist_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    origin = mnist(tmp_path / "origin")
    monkeypatch.setattr(named, "DEBIAN", tmp_path / "not installed")
    monkeypatch.setattr(named, "FASHION_URL", origin.as_uri())
    with pytest.raises(UserError, match="expected 8d4fb7e6c68d591d4c3dfef9ec88bf0d"):
        data.load("fashion-mnist")
    sums = {n: hashlib.md5((origin / n).read_bytes()).hexdigest() for n in named.FASHION_MD5}
    monkeypatch.setattr(named, "FASHION_MD5", sums)
    assert len(data.load("fashion-mnist")) == 30
    monkeypatch.setattr(named, "FASHION_URL", (tmp_path / "gone").as_uri())
    assert len(data.load("fashion-mnist", split="test")) == 20
    for file in (tmp_path / "cache" / "trilemma" / "downloads" / "fashion-mnist").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="cannot be fetched .*dataset-fashion-mnist"):
        data.load("fashion-mnist")


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar10_files(tmp_path, kind):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 4, 3072), np.uint8)
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    for name, part in zip(names, images, strict=True):
        if kind == "binary":
            rows = np.concatenate([np.arange(4, dtype=np.uint8)[:, None], part], 1)
            (tmp_path / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            content = {b"data": part, b"labels": [0, 1, 2, 3]}
            (tmp_path / name).write_bytes(pickle.dumps(content))
    train, test = (data.load(f"cifar10:{tmp_path}", split=s) for s in ("train", "test"))
    assert train.shape == (3, 32, 32) and len(train) == 20 and len(test) == 4
    assert np.array_equal(test.images, images[5].reshape(4, 3, 32, 32))
    assert test.label.tolist() == [0, 1, 2, 3] and test.label_names[3] == "cat"


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="refuses to load builtins.exec"):
        data.load(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "celeba"])
def test_named_sets_without_files_say_what_to_do(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=rf"trilemma\[hub\].*{name}:FOLDER"):
        data.load(name)
    with pytest.raises(UserError):
        data.load(f"{name}:{tmp_path}")


# The hub, through a stand-in for the `datasets` library with the part of its interface we use


class Feature:
    def __init__(self, names=None, dtype=None, decode=True):
        self.names, self.dtype, self.decode = names, dtype, decode


class Rows:
    """A split of a data set."""

    def __init__(self, features, columns):
        self.features, self._columns, self._fingerprint = features, columns, str(len(columns))

    def __len__(self):
        return len(self._columns["img"])

    def __getitem__(self, key):
        if isinstance(key, str):
            return self._columns[key]
        return {name: values[key] for name, values in self._columns.items()}

    def cast_column(self, name, feature):
        assert not feature.decode
        return self


def stand_in(splits, features):
    module = types.ModuleType("datasets")
    module.Image = type("Image", (Feature,), {})

    def load_dataset(name, configuration=None):
        if name != "someone/pictures":
            raise ConnectionError("offline")
        return {split: Rows(features(module), columns) for split, columns in splits.items()}

    module.load_dataset = load_dataset
    return module


def columns(count, seed):
    cells = [pictures.encoded(pictures.picture(seed + k)) for k in range(count)]
    return {
        "img": [{"bytes": cell, "path": None} for cell in cells],
        "fine": [k % 2 for k in range(count)],
        "caption": [f"number {seed + k}" for k in range(count)],
        "Bald": [k % 3 == 0 for k in range(count)],
    }


def features(module):
    return {
        "img": module.Image(),
        "fine": type("ClassLabel", (Feature,), {})(names=["cat", "dog"], dtype="int64"),
        "caption": type("Value", (Feature,), {})(dtype="string"),
        "Bald": type("Value", (Feature,), {})(dtype="bool"),
    }


def test_hub(tmp_path, monkeypatch):
    splits = {"train": columns(8, 0), "test": columns(4, 100)}
    splits["train"]["img"][5] = {"bytes": b"broken", "path": None}
    splits["train"]["img"][6] = None
    path = pictures.save(pictures.picture(7), tmp_path / "7.png")
    splits["train"]["img"][7] = {"bytes": None, "path": str(path)}
    monkeypatch.setitem(sys.modules, "datasets", stand_in(splits, features))
    train, test = (load("hf:someone/pictures", split=s) for s in ("train", "test"))
    assert len(train) == 6 and len(test) == 4
    assert train.text == [f"number {k}" for k in (0, 1, 2, 3, 4, 7)]
    assert train.label_names == ["cat", "dog"] and train.label.tolist() == [0, 1, 0, 1, 0, 1]
    assert train.attributes[:, 0].tolist() == [1, 0, 0, 1, 0, 0]
    with pytest.raises(UserError, match="nobody/nothing cannot be loaded: offline"):
        load("hf:nobody/nothing")


def test_hub_without_pictures(monkeypatch):
    only_text = {"caption": type("Value", (Feature,), {})(dtype="string")}
    module = stand_in({"train": {"img": [], "caption": []}}, lambda module: only_text)
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(UserError, match="no column of pictures"):
        hub.Hub("someone/pictures")


def test_hub_with_the_real_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    content = columns(6, 0)
    table = datasets.Dataset.from_dict(
        content,
        features=datasets.Features(
            img=datasets.Image(),
            fine=datasets.ClassLabel(names=["cat", "dog"]),
            caption=datasets.Value("string"),
            Bald=datasets.Value("bool"),
        ),
    )
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=table, test=table)
    )
    found = load("hf:someone/pictures", split="train")
    assert found.label.tolist() == [0, 1] * 3 and found.text[2] == "number 2"
    assert found.attributes[:, 0].tolist() == [1, 0, 0] * 2
    expected = Image.open(io.BytesIO(content["img"][0]["bytes"])).resize((8, 8), 1, reducing_gap=3)
    assert np.array_equal(found.images[0], np.asarray(expected).transpose(2, 0, 1))
