"""Data sets known by name: where their files are looked for, and how they are read.

| name | where |
|---|---|
| fashion, emoji | carried in the package |
| fashion-mnist | `fashion-mnist:FOLDER`, else Debian's dataset-fashion-mnist, else a download |
| mnist, cifar10, celeba | `NAME:FOLDER` with their usual files, else the Hugging Face hub |
| hf:owner/name | the Hugging Face hub |
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import urllib.request
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from trilemma.data.cache import cache_root
from trilemma.data.hub import Hub
from trilemma.data.layouts import recognise, recognise_rows, recognise_shards
from trilemma.data.listing import Folder, Item, Listing, Source, Zip
from trilemma.data.shards import Shards, shards_in, shards_named
from trilemma.data.table import Parquet
from trilemma.errors import UserError

PACKAGED = Path(__file__).parent / "files"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FASHION_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
CIFAR10_CLASSES = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip
ON_HUB = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10", "celeba": "flwrlabs/celeba"}
NAMES = ["fashion", "emoji", "fashion-mnist", "mnist", "cifar10", "celeba"]

Part = tuple[np.ndarray, np.ndarray]
"""Images (N, H, W) or (N, H, W, 3) and labels (N,)."""


class Arrays:
    """Pictures that a file holds as plain arrays, with a class each.

    Args:
        name: shown to the user.
        files: the files that hold them.
        classes: the classes' names.
        load: returns the arrays of each split; called only when the cache has no answer.
    """

    container = "named"

    def __init__(
        self, name: str, files: list[Path], classes: list[str], load: Callable[[], dict[str, Part]]
    ) -> None:
        self.name, self._files, self._classes, self._load = name, files, classes, load
        self._images: dict[str, np.ndarray] = {}

    @property
    def signature(self) -> str:
        """The files' places, sizes and times."""
        stats = [(str(f.resolve()), f.stat()) for f in self._files]
        return "|".join(f"{place}:{s.st_size}:{s.st_mtime_ns}" for place, s in stats)

    def listing(self) -> Listing:
        """Load the arrays and list them."""
        items = []
        for split, (images, labels) in self._load().items():
            if len(images) != len(labels) or (len(labels) and labels.max() >= len(self._classes)):
                raise UserError(f"{self.name}: the {split} images and labels do not fit together")
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                path = f"{split}/{number:05d}"
                self._images[path] = image
                items.append(Item(path, split, self._classes[label]))
        return Listing("labels", items, list(self._classes))

    def read(self, path: str) -> np.ndarray:
        """Return one picture's pixels."""
        return np.ascontiguousarray(self._images[path])


def find(source: str | Path) -> Source:
    """Return the source that a name, a folder or a file means."""
    text = str(source)
    name, _, place = text.partition(":")
    if isinstance(source, str):
        if name == "hf" and place:
            return Hub(place)
        if name in NAMES and (place or text == name):
            return _named(name, Path(place).expanduser() if place else None)
    path = Path(source).expanduser()
    shards = shards_in(path) if path.is_dir() else shards_named(text)
    if shards:
        return Shards(text, shards, recognise_shards)
    if path.is_dir():
        return Folder(text, path, recognise)
    if path.is_file():
        if path.suffix.lower() == ".zip":
            return Zip(text, path, recognise)
        if path.suffix.lower() == ".parquet":
            return Parquet(text, path, recognise_rows)
        raise UserError(
            f"{path} is a file; expected a folder of pictures, or a .zip, .parquet or .tar of them"
        )
    names = ", ".join(NAMES)
    raise UserError(
        f"{text!r} is no data set known by name ({names}, hf:owner/name), "
        "and no folder or zip file of this path exists"
    )


def _named(name: str, place: Path | None) -> Source:
    if name in ("fashion", "emoji"):
        if place is not None:
            raise UserError(f"{name} is carried in the package: give its name alone")
        if name == "emoji":
            return Zip("emoji", PACKAGED / "emoji.zip", recognise)
        return _mnist_like(name, PACKAGED, FASHION_CLASSES, "fashion-")
    if name == "fashion-mnist":
        return _mnist_like(name, place or _fashion_folder(), FASHION_CLASSES)
    if place is None:
        return Hub(ON_HUB[name], f"{name}:FOLDER takes the usual files from a folder")
    if not place.is_dir():
        raise UserError(f"{name}: there is no folder {place}")
    if name == "mnist":
        return _mnist_like(name, place, [str(digit) for digit in range(10)])
    if name == "cifar10":
        return _cifar10(place)
    files = Folder(f"celeba:{place}", place, recognise)
    if not any(
        path.endswith(("list_attr_celeba.txt", "list_attr_celeba.csv")) for path in files.paths()
    ):
        raise UserError(f"celeba: {place} holds no list_attr_celeba.txt beside the pictures")
    return files


# MNIST's format


def read_idx(path: Path) -> np.ndarray:
    """Read a file of uint8 in the idx format of MNIST, gzipped or not."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content[:3] != b"\0\0\x08":
            raise UserError(f"{path} is not an idx file of bytes")
        dimensions = content[3]
        shape = np.frombuffer(content, ">u4", dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged: {error}") from None


def _mnist_like(name: str, folder: Path, classes: list[str], prefix: str = "") -> Arrays:
    files = {}
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            usual = f"{prefix}{part}-{kind}-ubyte"
            names = [f"{usual}.gz", usual, f"{part}-{kind.replace('-', '.')}-ubyte"]
            inside = [folder, folder / "raw", folder / "MNIST" / "raw", folder / "FashionMNIST/raw"]
            places = [where / file for where in inside for file in names]
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise UserError(f"{name}: {folder} holds no {usual}.gz (nor {usual})")
            files[part, kind] = found

    def load() -> dict[str, Part]:
        return {
            split: (read_idx(files[part, "images-idx3"]), read_idx(files[part, "labels-idx1"]))
            for split, part in (("train", "train"), ("test", "t10k"))
        }

    return Arrays(name, list(files.values()), classes, load)


def _fashion_folder() -> Path:
    """Return the folder of all of Fashion-MNIST, downloading it when it is nowhere."""
    if all((DEBIAN / file).is_file() for file in FASHION_MD5):
        return DEBIAN
    folder = cache_root() / "downloads" / "fashion-mnist"
    for file, md5 in FASHION_MD5.items():
        if not (folder / file).is_file():
            _download(f"{FASHION_URL}/{file}", folder / file, md5)
    return folder


def _download(url: str, target: Path, md5: str) -> None:
    advice = (
        "install Debian's package dataset-fashion-mnist, or put the four original files in a "
        "folder and give fashion-mnist:FOLDER"
    )
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        raise UserError(f"fashion-mnist: {url} cannot be fetched ({error}); {advice}") from None
    seen = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if seen != md5:
        raise UserError(f"fashion-mnist: {url} has MD5 {seen}, expected {md5}; {advice}")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(f".{uuid4().hex}")
    draft.write_bytes(content)
    draft.replace(target)


# CIFAR-10's two formats


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain values and numpy arrays, and refuses everything else."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"refuses to load {module}.{name}")
        return super().find_class(module, name)


def _cifar10(folder: Path) -> Arrays:
    batches = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
    for inside in (folder, folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"):
        for ending, read in ((".bin", _cifar_binary), ("", _cifar_pickle)):
            files = {s: [inside / (n + ending) for n in names] for s, names in batches.items()}
            every = [file for part in files.values() for file in part]
            if all(file.is_file() for file in every):
                load = partial(_cifar_load, files, read)
                return Arrays("cifar10", every, CIFAR10_CLASSES, load)
    raise UserError(
        f"cifar10: {folder} holds neither data_batch_1.bin ... test_batch.bin (the binary version) "
        "nor data_batch_1 ... test_batch (the Python version)"
    )


def _cifar_load(files: dict[str, list[Path]], read: Callable[[Path], Part]) -> dict[str, Part]:
    parts = {}
    for split, paths in files.items():
        pieces = []
        for path in paths:
            try:
                pieces.append(read(path))
            except (OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
                raise UserError(f"cifar10: {path} cannot be read: {error}") from None
        images = np.concatenate([piece[0] for piece in pieces]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([piece[1] for piece in pieces])
        parts[split] = (images.transpose(0, 2, 3, 1), labels)
    return parts


def _cifar_binary(path: Path) -> Part:
    rows = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 1 + 3072)
    return rows[:, 1:], rows[:, 0]


def _cifar_pickle(path: Path) -> Part:
    content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    return content[b"data"], np.array(content[b"labels"], np.uint8)
