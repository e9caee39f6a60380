"""The memory-mapped uint8 cache: every picture is decoded once for each setting.

    $XDG_CACHE_HOME/trilemma/data/            (~/.cache when unset; may be deleted at any time)
        index/<signature and settings>.json   -> the key
        <key>/                                images.npy source.npy label.npy attributes.npy
                                              text.json meta.json files.json; of buckets
                                              HEIGHTxWIDTH.npy and bucket.npy for images.npy

The signature is made of names, sizes and times, so a changed folder is noticed without reading it.
The key is a hash of the files' contents, of all that is known of them and of the settings, so a
folder that was only moved or touched is not decoded again. A cache is written under a temporary
name and then renamed: readers see all of it or nothing, and of two processes that build the same
cache the second finds the first one's.

Where nothing names a picture's split, its content does: a picture is for testing when the first 8
bytes of its file's SHA-256, as a fraction of 2**64, are below 0.1. Adding pictures moves no other,
equal files fall on the same side, and when that leaves no picture (or nothing else) for testing,
the one with the smallest hash is. Rows lie in the order train, valid, test.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from rich.console import Console
from rich.progress import track

from trilemma.data import buckets
from trilemma.data.buckets import Size
from trilemma.data.captions import compose
from trilemma.data.decode import Header, fitted, read_header, tiles
from trilemma.data.listing import Item, Listing, Source, Unusable
from trilemma.errors import UserError

VERSION = 1  # of the decoding rule and the files
TEST_SHARE = 0.1
NATIVE_LIMIT = 64
_WINDOW, _HANDFUL = 1024, 16  # pictures in flight, and dealt to a thread: bound the memory
_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Settings:
    """What the pixels depend on besides the files."""

    size: int | None
    multiple: int
    channels: int | None
    background: str
    tiles: bool = False
    captions: tuple[str, ...] = ()
    buckets: bool = False


@dataclass(frozen=True)
class Scanned:
    """A picture whose header could be read."""

    item: Item
    digest: str
    header: Header


def cache_root() -> Path:
    """Return the package's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trilemma"


def open_cache(source: Source, settings: Settings) -> Path:
    """Return the folder of the decoded pictures of `source`, building it when it is not there."""
    root = cache_root() / "data"
    asked = json.dumps([VERSION, source.signature, asdict(settings)])
    index = root / "index" / f"{_hash(asked)}.json"
    try:
        folder = root / json.loads(index.read_text())["key"]
        if (folder / "meta.json").exists():
            return folder
    except (OSError, ValueError, KeyError):
        pass  # not indexed yet, or the index is damaged: built below
    try:
        return _build(source, settings, root, index)
    except OSError as error:
        raise UserError(
            f"the cache in {root} cannot be written: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a folder with room"
        ) from None


def _build(source: Source, settings: Settings, root: Path, index: Path) -> Path:
    (root / "index").mkdir(parents=True, exist_ok=True)
    listing = source.listing()
    if settings.captions:
        listing = compose(listing, settings.captions)
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        scanned, unusable = _scan(source, listing, pool)
        side = _side(scanned, settings)
        key = _key(listing, scanned, unusable, settings, side)
        if not (root / key / "meta.json").exists():
            draft = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
            try:
                _write(source, listing, scanned, unusable, settings, side, pool, draft)
                _move(draft, root / key)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    draft_index = index.with_suffix(f".{uuid4().hex}")
    draft_index.write_text(json.dumps({"key": key, "name": source.name}))
    draft_index.replace(index)
    return root / key


def _move(draft: Path, folder: Path) -> None:
    """Rename `draft` to `folder`, unless another process has been faster."""
    os.chmod(draft, 0o755)  # mkdtemp's folders are the owner's alone
    try:
        draft.rename(folder)
    except OSError:
        if (folder / "meta.json").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)  # someone deleted a part of it
        draft.rename(folder)


def _scan(
    source: Source, listing: Listing, pool: ThreadPoolExecutor
) -> tuple[list[Scanned], dict[str, str]]:
    """Read every file once: its digest and header, or the reason it cannot be used."""

    def look(item: Item) -> Scanned | str:
        try:
            content = source.read(item.path)
            return Scanned(item, digest_of(content), read_header(content))
        except Unusable as error:
            return str(error)

    good, bad = [], dict(listing.unusable)
    for item, result in zip(
        listing.items, _in_order(pool, "reading pictures", look, listing.items), strict=True
    ):
        if isinstance(result, Scanned):
            good.append(result)
        else:
            bad[item.path] = result
    return good, bad


def digest_of(content: bytes | np.ndarray) -> str:
    """Return the SHA-256 of a picture's file, or of its pixels."""
    raw = content if isinstance(content, bytes) else content.tobytes()
    return hashlib.sha256(raw).hexdigest()


def _in_order(
    pool: ThreadPoolExecutor, title: str, function: Any, things: list[Any]
) -> Iterator[Any]:
    """Yield `function` of each thing, dealt out in handfuls to save hand-overs.

    Shows how far it is when there is much to do and somebody is looking.
    """

    def several(some: list[Any]) -> list[Any]:
        return [function(thing) for thing in some]

    starts = track(
        range(0, len(things), _WINDOW),
        title,
        console=Console(stderr=True),
        transient=True,
        disable=len(things) < 8 * _WINDOW or not sys.stderr.isatty(),
    )
    for start in starts:
        window = things[start : start + _WINDOW]
        handfuls = [window[k : k + _HANDFUL] for k in range(0, len(window), _HANDFUL)]
        for results in pool.map(several, handfuls):
            yield from results


def _side(scanned: list[Scanned], settings: Settings) -> int:
    """Return the side of the decoded pictures."""
    side = settings.size
    if side is None:
        sizes = {(s.header.width, s.header.height) for s in scanned}
        width, height = sizes.pop() if len(sizes) == 1 else (0, -1)
        side = width if width == height <= NATIVE_LIMIT else NATIVE_LIMIT
    return -(-side // settings.multiple) * settings.multiple


def _key(
    listing: Listing,
    scanned: list[Scanned],
    unusable: dict[str, str],
    settings: Settings,
    side: int,
) -> str:
    record: list[Any] = [VERSION, side, settings.channels, settings.background, listing.layout]
    record += ["tiles"] * settings.tiles  # caches without them keep the key they had
    record += ["buckets", settings.multiple] * settings.buckets
    record += [
        listing.label_names,
        listing.attribute_names,
        listing.notes,
        sorted(unusable.items()),
    ]
    digest = hashlib.sha256(json.dumps(record).encode())
    for s in scanned:
        i = s.item
        line: list[Any] = [i.path, i.split, i.label, i.text, i.attributes, i.domain, s.digest]
        line += [i.more] * bool(i.more)
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()[:32]


def _write(
    source: Source,
    listing: Listing,
    scanned: list[Scanned],
    unusable: dict[str, str],
    settings: Settings,
    side: int,
    pool: ThreadPoolExecutor,
    folder: Path,
) -> None:
    """Decode the pictures and write everything into `folder`."""
    known = buckets.sizes(side, settings.multiple) if settings.buckets else [(side, side)]

    def pixels(one: Scanned) -> list[np.ndarray] | str:
        try:
            content = source.read(one.item.path)
            if settings.tiles:
                return tiles(content, side, settings.background, grey=settings.channels == 1)
            return [fitted(content, known, settings.background, grey=settings.channels == 1)]
        except Unusable as error:
            return str(error)

    kept: list[Scanned] = []
    places: list[tuple[int, Size]] = []  # of each in the raw file, and its height and width
    grey = settings.channels != 3
    # The order and the channels are known when all is decoded: first 3 channels in reading order.
    raw = folder / "raw"
    with raw.open("wb") as stream:
        for one, result in zip(
            scanned, _in_order(pool, "decoding pictures", pixels, scanned), strict=True
        ):
            if isinstance(result, str):
                unusable[one.item.path] = result
                continue
            for picture in result:  # the tiles of one picture, or the picture
                grey = grey and len(picture) == 1
                size = picture.shape[1:]
                places.append((stream.tell(), size))
                stream.write(np.broadcast_to(picture, (3, *size)).tobytes())
                kept.append(one)
    wanted = [one for one in kept if one.item.domain == "image"]
    if not wanted:
        which = "trainB pictures" if kept else f"{len(unusable)} picture files"
        some = "; ".join(f"{path}: {reason}" for path, reason in list(unusable.items())[:5])
        raise UserError(f"none of the {which} of {source.name} can be used: {some}")
    splits = _splits(kept)
    rank = {one.item.path: _SPLITS.index(split) for one, split in zip(kept, splits, strict=True)}
    order = sorted(range(len(kept)), key=lambda row: rank[kept[row].item.path])
    images = [row for row in order if kept[row].item.domain == "image"]
    others = [row for row in order if kept[row].item.domain == "source"]
    channels = 1 if grey else 3
    found = [size for size in known if any(places[row][1] == size for row in images)]
    for size in found:
        rows = [places[row][0] for row in images if places[row][1] == size]
        name = f"{size[0]}x{size[1]}" if settings.buckets else "images"
        _gather(raw, rows, (channels, *size), folder / f"{name}.npy")
    if settings.buckets:
        bucket = [found.index(places[row][1]) for row in images]
        np.save(folder / "bucket.npy", np.array(bucket, np.int64))
    elif others:
        starts = [places[row][0] for row in others]
        _gather(raw, starts, (channels, side, side), folder / "source.npy")
    raw.unlink()
    items = [kept[row].item for row in images]
    if listing.label_names:
        number = {name: k for k, name in enumerate(listing.label_names)}
        np.save(folder / "label.npy", np.array([number[str(i.label)] for i in items], np.int64))
    if listing.attribute_names:
        np.save(folder / "attributes.npy", np.array([i.attributes for i in items], np.uint8))
    if any(item.text for item in items):
        texts = [[i.text, *i.more] if i.more else i.text for i in items]
        (folder / "text.json").write_text(json.dumps(texts))
    files = [
        {"path": one.item.path, "sha256": one.digest, "split": split, "label": one.item.label,
         "domain": one.item.domain, **asdict(one.header)}
        for one, split in zip((kept[r] for r in order), (splits[r] for r in order), strict=True)
    ]  # fmt: skip
    (folder / "files.json").write_text(json.dumps(files))
    count = {s: sum(rank[item.path] == k for item in items) for k, s in enumerate(_SPLITS)}
    other = {s: sum(rank[kept[r].item.path] == k for r in others) for k, s in enumerate(_SPLITS)}
    meta = {
        "container": source.container,
        "layout": listing.layout,
        "shape": [channels, side, side],
        "buckets": found if settings.buckets else [],
        "counts": count,
        "source_counts": other,
        "split_rule": "given" if any(item.split for item in items) else "by content",
        "label_names": listing.label_names,
        "attribute_names": listing.attribute_names,
        "notes": listing.notes,
        "unusable": unusable,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _splits(kept: list[Scanned]) -> list[str]:
    """Return the split of each picture, by content where nothing names it."""
    if any(one.item.split for one in kept):
        return [one.item.split or "train" for one in kept]
    digests = {one.digest for one in kept}
    test = {d for d in digests if int(d[:16], 16) < TEST_SHARE * 2**64}
    if not test or test == digests:
        test = {min(digests)} if len(digests) > 1 else set()
    return ["test" if one.digest in test else "train" for one in kept]


def _gather(raw: Path, starts: list[int], shape: tuple[int, int, int], target: Path) -> None:
    """Write the pictures that begin at `starts` of the file `raw` as `target`, in that order."""
    channels, height, width = shape
    whole = np.memmap(raw, np.uint8, "r")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(starts), *shape)}
    with target.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for start in starts:  # channels are apart, so the first ones are the first bytes
            stream.write(whole[start : start + channels * height * width].tobytes())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]
