"""Pictures in any layout to training batches: load, batches, check.

`load` takes a name or a path and returns a Dataset; `batches` turns it into the endless training
stream; `check` says what is in a folder and which of its files cannot be used; `pictures` reads a
few as they are needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ImageColor

from trilemma.data.cache import Settings, open_cache
from trilemma.data.check import check, describe
from trilemma.data.dataset import Dataset, batches, bucketed
from trilemma.data.decode import decode
from trilemma.data.listing import Unusable
from trilemma.data.named import NAMES, find
from trilemma.errors import UserError

Read = Callable[[], bytes | np.ndarray]

__all__ = [
    "NAMES",
    "Dataset",
    "batches",
    "bucketed",
    "check",
    "describe",
    "load",
    "load_buckets",
    "pictures",
]


def load(
    source: str | Path,
    *,
    split: str = "train",
    size: int | None = None,
    multiple: int = 1,
    channels: int | None = None,
    background: str = "white",
    tiles: bool = False,
    captions: Sequence[str] = (),
) -> Dataset:
    """Load pictures, decoded once and memory-mapped from then on.

    Args:
        source: a name (fashion, emoji, fashion-mnist, mnist, cifar10, celeba, hf:owner/name; the
            files of fashion-mnist, mnist, cifar10 and celeba may be given as NAME:FOLDER), or the
            path of a folder, zip or parquet file of pictures, or of tar shards, `{00..12}.tar`. A
            folder named as a data set is given as ./NAME.
        split: "train", "test" or "all". Pictures for validation are for testing where there are
            none for testing, and otherwise in "all" alone.
        size: side of the square pictures. None: their own size when all are squares of one size up
            to 64, else 64.
        multiple: the side is rounded up to a multiple of this.
        channels: 1 or 3. None: 1 when no picture has colour, else 3.
        background: what shows through transparent parts: a colour's name or #rrggbb.
        tiles: cut pictures into squares of `size` that do not overlap, and resize nothing. All of
            one picture are of one split; a picture smaller than that cannot be used.
        captions: templates over what is known of each picture, "{name} emoji": see `captions`. They
            take the place of the captions there are, which are `{text}`.
    """
    settings = Settings(size, multiple, channels, background, tiles, tuple(captions))
    (made,) = _load(source, split, settings)
    return made


def load_buckets(
    source: str | Path,
    size: int,
    *,
    split: str = "train",
    multiple: int = 1,
    channels: int | None = None,
    captions: Sequence[str] = (),
) -> list[Dataset]:
    """Load pictures in a few sizes of about size x size pixels, each as near its own as can be.

    Returns one Dataset for each size that any picture has (`buckets`), of the same classes; other
    arguments as `load`.
    """
    settings = Settings(size, multiple, channels, "white", False, tuple(captions), buckets=True)
    return _load(source, split, settings)


def _load(source: str | Path, split: str, settings: Settings) -> list[Dataset]:
    """Return one split of the pictures, for each size they have."""
    size, multiple, channels = settings.size, settings.multiple, settings.channels
    if split not in ("train", "test", "all"):
        raise ValueError(f"split is {split!r}; expected train, test or all")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels is {channels}; expected 1 or 3")
    if (size is not None and size < 1) or multiple < 1:
        raise ValueError(f"size {size} and multiple {multiple} should be positive")
    try:
        ImageColor.getrgb(settings.background)
    except ValueError:
        told = f"{settings.background!r} is no colour; expected a name or #rrggbb"
        raise UserError(told) from None
    return _open(open_cache(find(source), settings), str(source), split)


def pictures(
    source: str | Path, shape: Sequence[int], background: str = "white"
) -> tuple[list[str], torch.Tensor, dict[str, str]]:
    """Read pictures in their order, brought to one shape as for training, not cached.

    Args:
        source: one picture file, or what `load` takes.
        shape: (C, H, W) with H = W and C of 1 or 3.
        background: what shows through transparent parts.

    Returns:
        Their names, the pictures as uint8 (N, C, H, W), and path -> reason of what cannot be used.

    Raises:
        UserError: nothing there can be used.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() != ".zip":
        contents: Iterator[tuple[str, Read]] = iter([(path.name, path.read_bytes)])
        skipped: dict[str, str] = {}
    else:
        files = find(source)
        listing = files.listing()
        contents = ((item.path, partial(files.read, item.path)) for item in listing.items)
        skipped = dict(listing.unusable)
    taken: dict[str, np.ndarray] = {}
    for name, read in contents:
        try:
            pixels = decode(read(), shape[1], background, grey=shape[0] == 1)
        except Unusable as error:
            skipped[name] = str(error)
        else:
            taken[name] = np.broadcast_to(pixels, tuple(shape))
    if not taken:
        told = next((f"{name}: {reason}" for name, reason in skipped.items()), "no pictures")
        raise UserError(f"{source} holds no picture that can be used ({told})")
    return list(taken), torch.from_numpy(np.stack(list(taken.values()))), skipped


def _open(folder: Path, name: str, split: str) -> list[Dataset]:
    """Return one split of the cache in `folder`, for each size of its pictures."""
    meta = json.loads((folder / "meta.json").read_text())
    part = _rows(meta["counts"], split)
    if part.start == part.stop:
        counts = ", ".join(f"{count} {part}" for part, count in meta["counts"].items())
        raise UserError(f"{name} has no pictures in its split {split!r} (it has {counts})")

    def array(file: str, rows: slice = part) -> np.ndarray | None:
        path = folder / file
        return np.load(path, mmap_mode="r")[rows] if path.exists() else None

    label, attributes = array("label.npy"), array("attributes.npy")
    file = folder / "text.json"
    texts = json.loads(file.read_text())[part] if file.exists() else None

    def made(images: np.ndarray, rows: np.ndarray, fingerprint: str) -> Dataset:
        told = None if texts is None else [texts[row] for row in rows]
        captions = [text if isinstance(text, list) else [text] for text in told or []]
        several = any(len(each) > 1 for each in captions)
        return Dataset(
            name=name,
            split=split,
            fingerprint=fingerprint,
            images=images,
            label=None if label is None else label[rows],
            label_names=meta["label_names"],
            attributes=None if attributes is None else attributes[rows],
            attribute_names=meta["attribute_names"],
            text=None if told is None else [each[0] for each in captions],
            captions=captions if several else None,
            source=array("source.npy", _rows(meta["source_counts"], split)),
            skipped=meta["unusable"],
        )

    bucket = array("bucket.npy", slice(None))
    if bucket is None:
        images = array("images.npy")
        assert images is not None
        return [made(images, np.arange(len(images)), f"{folder.name}-{split}")]
    found = []
    for k, (height, width) in enumerate(meta["buckets"]):
        before, rows = np.sum(bucket[: part.start] == k), np.flatnonzero(bucket[part] == k)
        size = f"{height}x{width}"
        images = array(f"{size}.npy", slice(before, before + len(rows)))
        if images is not None and len(rows):
            found.append(made(images, rows, f"{folder.name}-{split}-{size}"))
    return found


def _rows(counts: dict[str, int], split: str) -> slice:
    """Return the rows of a split; they lie in the order train, valid, test."""
    train, valid, test = counts["train"], counts["valid"], counts["test"]
    if split == "all":
        return slice(0, train + valid + test)
    if split == "train":
        return slice(0, train)
    return slice(train + valid, train + valid + test) if test else slice(train, train + valid)
