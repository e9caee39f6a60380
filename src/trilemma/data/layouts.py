"""Recognise how a folder or zip of pictures is laid out.

| layout | what is looked for |
|---|---|
| translation | `trainA/ trainB/` (and `testA/ testB/`): B is the pictures, A the unpaired source |
| splits | `train/`, with `valid/` or `test/` beside it or not: they name the split |
| class folders | every picture lies in one of two or more folders: the first folder is its class |
| tables | metadata.csv/jsonl/parquet, CelebA's lists, NVIDIA's dataset.json |
| captions | `img.txt` or `img.caption` beside `img.png`, a caption on each line |
| shards | WebDataset's tar files: `img.txt`, `img.json` and `img.cls` beside `img.jpg` |
| unlabelled | anything else: every picture at any depth |

Splits combine with everything; tables and captions combine with class folders, and a table has the
last word on what both say. A column that holds only 0 and 1 is an attribute when at least half of
the pictures have it; those that lack it are not used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from trilemma.data.listing import (
    METADATA_SUFFIXES,
    PICTURE_SUFFIXES,
    Files,
    Item,
    Listing,
    Unusable,
    count_suffixes,
    natural,
    suffix,
)
from trilemma.data.metadata import (
    LABEL_COLUMNS,
    PARTITIONS,
    SPLIT_COLUMNS,
    SPLITS,
    TEXT_COLUMNS,
    Facts,
    bit,
    read_facts,
)
from trilemma.data.shards import Shards
from trilemma.data.table import Parquet
from trilemma.errors import UserError

_DOMAINS = {"trainA": ("train", "source"), "trainB": ("train", "image"),
            "validA": ("valid", "source"), "validB": ("valid", "image"),
            "valA": ("valid", "source"), "valB": ("valid", "image"),
            "testA": ("test", "source"), "testB": ("test", "image")}  # fmt: skip


def recognise_rows(files: Parquet) -> Listing:
    """Return the pictures of a table's rows and what the rows say."""
    names = list(files.paths())
    if not names:
        raise UserError(f"no pictures in {files.place}: it has no rows")
    facts = Facts(tables=[files.place.name], rows=files.rows)
    return _combine(names, Listing("unlabelled", [Item(name) for name in names]), facts, {})


def recognise_shards(files: Shards) -> Listing:
    """Return the pictures in WebDataset's shards and what lies beside them."""
    paths = sorted(files.paths(), key=natural)
    pictures = [path for path in paths if suffix(path) in PICTURE_SUFFIXES]
    if not pictures:
        raise UserError(_nothing(files, paths))
    tables = {path for path in paths if suffix(path) in METADATA_SUFFIXES}
    places = Listing("unlabelled", [Item(path) for path in pictures])
    facts = Facts(tables=["json and cls files"], rows=files.rows(pictures))
    captions = _captions(pictures, tables, files)
    return _combine(pictures, places, facts, captions)


def recognise(files: Files) -> Listing:
    """Return the pictures of `files` and what is known of them."""
    paths = sorted(files.paths(), key=natural)
    pictures = [p for p in paths if suffix(p) in PICTURE_SUFFIXES]
    if not pictures:
        raise UserError(_nothing(files, paths))
    root = _common_folder(paths)
    domains = {"trainA", "trainB"} & {_first(p, root) for p in pictures}
    if len(domains) == 2:
        return _translation(pictures, root)
    if domains:
        (other,) = {"trainA", "trainB"} - domains
        raise UserError(
            f"{files.place} holds pictures in {root}{domains.pop()} and none in {root}{other}; "
            "translation needs pictures of both domains"
        )
    tables = [p for p in paths if suffix(p) in METADATA_SUFFIXES]
    facts = read_facts(tables, pictures, files.read)
    places = _by_folder(pictures, root, facts.folders_are_classes)
    captions = _captions(pictures, set(tables), files)
    return _combine(pictures, places, facts, captions)


def _nothing(files: Files, paths: list[str]) -> str:
    seen = f"saw {len(paths)} files: {count_suffixes(paths)}" if paths else "it is empty"
    if files.unusable:
        path, reason = next(iter(files.unusable.items()))
        seen += f"; {len(files.unusable)} more cannot be used, as {path or 'the folder'}: {reason}"
    expected = "expected .png, .jpg, .webp, .bmp, .gif or .tif files in it or in its subfolders"
    return f"no pictures in {files.place}: {seen}; {expected}"


def _common_folder(paths: list[str]) -> str:
    """Return the folders that hold everything, "photos/2019/"; they say nothing of a picture."""
    root = ""
    while True:
        firsts = {_first(p, root) for p in paths}
        if len(firsts) != 1 or None in firsts or (first := firsts.pop()) is None:
            return root
        if first.lower() in SPLITS:
            return root
        root += first + "/"


def _first(path: str, root: str) -> str | None:
    """Return the first folder of `path` below `root`, None for a file right there."""
    first, slash, _ = path[len(root) :].partition("/")
    return first if slash else None


def _translation(pictures: list[str], root: str) -> Listing:
    items, notes = [], []
    outside = 0
    for path in pictures:
        found = _DOMAINS.get(_first(path, root) or "")
        if found is None:
            outside += 1
        else:
            items.append(Item(path, split=found[0], domain=found[1]))
    if outside:
        notes.append(f"{outside} pictures outside trainA, trainB, testA, testB are not used")
    return Listing("translation (trainA to trainB, unpaired)", items, notes=notes)


def _by_folder(pictures: list[str], root: str, folders_are_classes: bool) -> Listing:
    """Return splits and classes as the folders' names tell them."""
    firsts = {(_first(p, root) or "").lower() for p in pictures}
    has_splits = any(SPLITS.get(first) == "train" for first in firsts)
    splits, labels, notes = {}, {}, []
    outside = 0
    for path in pictures:
        first = _first(path, root)
        inside = root
        if has_splits:
            splits[path] = SPLITS.get((first or "").lower(), "")
            if splits[path]:
                inside = f"{root}{first}/"
            else:
                outside += 1
        labels[path] = _first(path, inside)
    if outside:
        notes.append(f"{outside} pictures outside the folders of the splits are for training")
        splits = {path: split or "train" for path, split in splits.items()}
    elif set(splits.values()) == {"train"}:
        splits = {}  # a lone train/ says nothing: a part of it is kept for testing
    counts = Counter(labels.values())
    classes = len(counts) > 1 and None not in counts and len(pictures) >= 2 * len(counts)
    classes = classes and folders_are_classes
    if folders_are_classes and not classes and len(counts) > 1:
        bare = counts.pop(None, 0)
        why = f"{bare} pictures lie outside them" if bare else "most hold a single picture"
        notes.append(f"the {len(counts)} folders are not taken as classes: {why}")
    items = [
        Item(path, splits.get(path, ""), labels[path] if classes else None) for path in pictures
    ]
    names = sorted({label for label in labels.values() if label}, key=natural) if classes else []
    return Listing("class folders" if classes else "unlabelled", items, names, notes=notes)


def _captions(pictures: list[str], tables: set[str], files: Files) -> dict[str, list[str]]:
    """Return the captions in `img.txt` or `img.caption` beside the pictures, one a line."""
    captions = {}
    for picture in pictures:
        stem = PurePosixPath(picture).with_suffix("")
        beside = [f"{stem}.txt", f"{stem}.caption", f"{picture}.txt"]
        found = next((path for path in beside if path in tables), None)
        if found is not None:
            try:
                text = files.read(found).decode("utf-8-sig", errors="replace")
            except Unusable:
                continue
            captions[picture] = _texts(text.splitlines())
    return captions


def _combine(
    pictures: list[str], places: Listing, facts: Facts, captions: dict[str, list[str]]
) -> Listing:
    """Return the listing of `places` with what tables and captions add."""
    text_column, split_column = facts.column(TEXT_COLUMNS), facts.column(SPLIT_COLUMNS)
    label_column, bits = facts.column(LABEL_COLUMNS), facts.bits()
    attribute_names = [name for name, filled in bits.items() if 2 * filled >= len(facts.rows)]
    notes = places.notes + facts.notes
    for name in [name for name in bits if name not in attribute_names]:
        told = f"only {bits[name]} of {len(facts.rows)} pictures have 0 or 1 there"
        notes.append(f"column {name} is not taken as an attribute: {told}")
    if facts.missing:
        some = ", ".join(facts.missing[:3])
        notes.append(f"{len(facts.missing)} files named in the tables are not there: {some}")
    required = label_column is not None or bool(attribute_names)
    table = " or ".join(facts.tables)
    items, unusable, uncaptioned = [], {}, 0
    for place in places.items:
        row = facts.rows.get(place.path)
        if row is None:
            if required:
                unusable[place.path] = f"not in {table}"
                continue
            row = {}
        has = {name: bit(row.get(name)) for name in attribute_names}
        empty = next((name for name, value in has.items() if value is None), None)
        if label_column is not None and row.get(label_column) in (None, ""):
            empty = label_column
        if empty is not None:
            unusable[place.path] = f"no {empty} in {table}"
            continue
        said = row.get(text_column) if text_column else None
        texts = _texts(said if isinstance(said, list) else [said])
        texts = texts or captions.get(place.path, [])
        uncaptioned += not texts
        split = str(row.get(split_column, "")).strip().lower() if split_column else ""
        items.append(
            Item(
                path=place.path,
                split={**SPLITS, **PARTITIONS}.get(split, place.split),
                label=place.label if label_column is None else str(row[label_column]),
                text=texts[0] if texts else "",
                attributes=tuple(value or 0 for value in has.values()),
                more=tuple(texts[1:]),
            )
        )
    if not items:
        path, reason = next(iter(unusable.items()))
        raise UserError(
            f"no picture can be used: {len(unusable)} are left out, as {path}: {reason}"
        )
    captioned = len(items) - uncaptioned
    if captioned and uncaptioned:
        notes.append(f"{uncaptioned} of {len(items)} pictures have no caption")
    names = places.label_names
    if label_column is not None:
        names = sorted({item.label for item in items if item.label is not None}, key=natural)
    return Listing(
        _layout(places, facts, label_column, bool(attribute_names), bool(captioned), captions),
        _settle_splits(items),
        names,
        attribute_names,
        unusable,
        notes,
        facts.rows,
    )


def _texts(told: Iterable[Any]) -> list[str]:
    """Return those of several captions that say something, their white space made even."""
    texts = (" ".join(str(text).split()) for text in told if text is not None)
    return list(dict.fromkeys(text for text in texts if text))


def _settle_splits(items: list[Item]) -> list[Item]:
    """Where some pictures name their split, those that do not are for training."""
    if len({bool(item.split) for item in items}) == 1:
        return items
    return [item if item.split else replace(item, split="train") for item in items]


def _layout(
    places: Listing,
    facts: Facts,
    label_column: str | None,
    attributes: bool,
    captioned: bool,
    captions: dict[str, list[str]],
) -> str:
    """Name the layout."""
    parts = []
    if label_column is not None:
        parts.append("labels")
    elif places.label_names:
        parts.append("class folders")
    if captioned:
        parts.append("captions")
    if attributes:
        parts.append("attributes")
    if not parts:
        return "unlabelled"
    where = [PurePosixPath(t).name for t in facts.tables]
    if captions:
        where.append("text files beside the pictures")
    return " and ".join(parts) + (f" ({', '.join(dict.fromkeys(where))})" if where else "")
