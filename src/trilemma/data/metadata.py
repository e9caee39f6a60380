"""Tables that say what pictures show: metadata.csv/jsonl/parquet, CelebA's lists, dataset.json.

Every kind is read into the same form, rows of named values for each picture, and `Facts` tells
which values are captions, labels, splits and attributes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from trilemma.data.listing import Unusable
from trilemma.errors import UserError

FILE_COLUMNS = ("file_name", "filename", "file", "image_id")
TEXT_COLUMNS = ("text", "texts", "caption", "captions", "prompt", "description")
LABEL_COLUMNS = ("label", "class", "category")
SPLIT_COLUMNS = ("split", "partition")
SPLITS = {
    "train": "train", "training": "train",
    "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test", "testing": "test",
}  # fmt: skip
PARTITIONS = {"0": "train", "1": "valid", "2": "test"}  # CelebA's
_BITS = {"0": 0, "1": 1, "-1": 0, "0.0": 0, "1.0": 1, "-1.0": 0, "true": 1, "false": 0}

Read = Callable[[str], bytes]
Row = dict[str, Any]


@dataclass
class Facts:
    """What the tables say of each picture.

    Attributes:
        tables: the names of the tables read.
        rows: picture -> its values, from all tables.
        missing: names in the tables that no picture bears.
        folders_are_classes: False when NVIDIA's dataset.json is there, whose folders only hold
            a thousand pictures each.
        notes: what a user should know.
    """

    tables: list[str] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    folders_are_classes: bool = True
    notes: list[str] = field(default_factory=list)

    def column(self, names: Collection[str]) -> str | None:
        """Return the first of `names` that any row has."""
        present = {key for row in self.rows.values() for key in row}
        return next((name for name in names if name in present), None)

    def bits(self) -> dict[str, int]:
        """Return the columns that hold only 0 and 1 (or -1 and 1), and how many rows fill each."""
        taken = {*TEXT_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS}
        filled: dict[str, int] = {}
        for row in self.rows.values():
            for name, value in row.items():
                if name not in taken and str(value).strip():
                    if bit(value) is None:
                        taken.add(name)
                        filled.pop(name, None)
                    else:
                        filled[name] = filled.get(name, 0) + 1
        return filled


def _gathered(known: Row, row: Row) -> Row:
    """Return the captions of a picture's row together with those of its rows before."""
    both = {name: (known.get(name), row[name]) for name in TEXT_COLUMNS if name in row}
    return {name: [*_listed(before), *_listed(new)] for name, (before, new) in both.items()}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def bit(value: Any) -> int | None:
    """Return a value of a 0/1 (or -1/1, or true/false) column as 0 or 1, None for another value."""
    return _BITS.get(str(value).strip().lower())


def read_facts(paths: Collection[str], pictures: Collection[str], read: Read) -> Facts:
    """Read every table among `paths` and match its rows to `pictures`."""
    facts = Facts()
    find = _Finder(pictures)
    for path in paths:
        reader = _READERS.get(PurePosixPath(path).name.lower())
        if reader is None:
            continue
        try:
            content = read(path)
            rows = list(reader(content))
        except (UserError, Unusable) as error:
            raise UserError(f"{path}: {error}") from None
        if path.lower().endswith("dataset.json") and b'"labels"' in content:
            facts.folders_are_classes = False
        if rows and rows[0][0] is None:
            columns = ", ".join(rows[0][1])
            facts.notes.append(f"{path} is not used: no column file_name (it has: {columns})")
            continue
        if not rows:  # another dataset.json, or an empty table
            continue
        facts.tables.append(path)
        folder = path.rpartition("/")[0]
        here: set[str] = set()  # the pictures of this table so far
        for name, row in rows:
            picture = find(folder, str(name))
            if picture is None:
                facts.missing.append(str(name))
                continue
            known = facts.rows.setdefault(picture, {})
            if picture in here:  # a row for each of its captions
                row = {**row, **_gathered(known, row)}
            known.update(row)
            here.add(picture)
    return facts


class _Finder:
    """Finds the picture a table means: by path, else by file name, else by name without suffix."""

    def __init__(self, pictures: Collection[str]) -> None:
        self._exact = set(pictures)
        self._loose: dict[str, str | None] = {}
        for picture in pictures:
            for key in {PurePosixPath(picture).name, PurePosixPath(picture).stem}:
                # A name borne by several pictures names none of them.
                self._loose[key] = None if key in self._loose else picture

    def __call__(self, folder: str, name: str) -> str | None:
        name = name.replace("\\", "/").removeprefix("./")
        exact = f"{folder}/{name}".lstrip("/")
        if exact in self._exact:
            return exact
        file = PurePosixPath(name)
        return self._loose.get(file.name) or self._loose.get(file.stem)


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")  # what spreadsheets save


def _named(rows: Iterator[Row]) -> Iterator[tuple[str | None, Row]]:
    for row in rows:
        row = {str(k).strip(): v for k, v in row.items() if k is not None and v is not None}
        column = next((c for c in FILE_COLUMNS if c in row), None)
        yield (None if column is None else row.pop(column)), row


def _csv(content: bytes) -> Iterator[tuple[str | None, Row]]:
    text = _text(content)
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    return _named(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))


def _jsonl(content: bytes) -> Iterator[tuple[str | None, Row]]:
    rows = []
    for number, line in enumerate(_text(content).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f'line {number}: expected an object, as {{"file_name": ...}}')
        rows.append(row)
    return _named(iter(rows))


def _parquet(content: bytes) -> Iterator[tuple[str | None, Row]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            'reading parquet needs pyarrow: pip install "trilemma[parquet]", '
            "or save the table as metadata.csv"
        ) from None
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except Exception as error:  # pyarrow's own errors share no base class but Exception
        raise UserError(f"not a readable parquet file: {error}") from None
    return _named(iter(table.to_pylist()))


def _celeba_attributes(content: bytes) -> Iterator[tuple[str | None, Row]]:
    lines = [line.split() for line in _text(content).splitlines() if line.strip()]
    if len(lines) < 2 or not lines[0][0].isdecimal():
        raise UserError("expected the number of pictures, the names, then one picture a line")
    names = lines[1]
    for number, (file, *values) in enumerate(lines[2:], 3):
        if len(values) != len(names):
            raise UserError(f"line {number}: {len(values)} values for {len(names)} attributes")
        yield file, dict(zip(names, values, strict=True))


def _celeba_partition(content: bytes) -> Iterator[tuple[str | None, Row]]:
    for number, line in enumerate(_text(content).splitlines(), 1):
        if not line.strip():
            continue
        file, _, part = line.strip().rpartition(" ")
        if part not in PARTITIONS:
            raise UserError(f"line {number}: expected a file and 0, 1 or 2")
        yield file.strip(), {"partition": part}


def _dataset_json(content: bytes) -> Iterator[tuple[str | None, Row]]:
    """NVIDIA's: {"labels": [["00000/img00000000.png", 6], ...]}, or null for no labels."""
    try:
        pairs = json.loads(_text(content))
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    pairs = pairs.get("labels") if isinstance(pairs, dict) else None
    for pair in pairs or []:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise UserError('"labels" should hold pairs of a file name and a class number')
        file, label = pair
        if isinstance(label, list):  # one-hot
            if sorted(label)[-2:] != [0, 1]:
                raise UserError(f"the label of {file} is neither a class number nor one-hot")
            label = label.index(1)
        yield file, {"label": label}


_READERS: dict[str, Callable[[bytes], Iterator[tuple[str | None, Row]]]] = {
    "metadata.csv": _csv,
    "metadata.jsonl": _jsonl,
    "metadata.parquet": _parquet,
    "list_attr_celeba.txt": _celeba_attributes,
    "list_attr_celeba.csv": _csv,
    "list_eval_partition.txt": _celeba_partition,
    "list_eval_partition.csv": _csv,
    "dataset.json": _dataset_json,
}
