"""Reading a set of drawn images: a folder, a zip, or an `.npz`."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trilemma.errors import UserError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_SHEET = "grid.png"  # `trilemma sample` lays it beside the images


def read_images(path: str | Path, limit: int | None = None) -> Tensor:
    """Read images as uint8 (N, C, H, W), in the order of their names, C being 1 or 3.

    Args:
        path: a folder, looked through to its depths, a zip, or an `.npz` with `arr_0` (N, H, W, C).
        limit: the first so many only.

    Raises:
        UserError: there are none, one cannot be read, or they are not all of one size.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        return _read_npz(path)[:limit]
    images: list[np.ndarray] = []
    with _files(path) as files:
        for name, read in files[:limit]:
            try:
                with Image.open(io.BytesIO(read())) as image:
                    array = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise UserError(f"{path}: {name} cannot be read as an image: {error}") from None
            if images and array.shape[:2] != images[0].shape[:2]:
                sizes = " and ".join("{1}x{0}".format(*a.shape) for a in (images[0], array))
                raise UserError(f"{path} holds images of {sizes}; drawn images have one size")
            images.append(array)
    if not images:
        raise UserError(f"{path} holds no images; expected {', '.join(sorted(_SUFFIXES))}")
    if any(array.ndim == 3 for array in images):
        images = [a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in images]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return torch.from_numpy(np.stack(images))[:, None]


def _read_npz(path: Path) -> Tensor:
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file["arr_0"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as images under arr_0: {error}") from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        seen = f"{array.dtype} {array.shape}"
        raise UserError(f"{path}: arr_0 is {seen}; expected uint8 (N, H, W, C) with C 1 or 3")
    return torch.from_numpy(array).permute(0, 3, 1, 2)


@contextmanager
def _files(path: Path) -> Iterator[list[tuple[str, Callable[[], bytes]]]]:
    """Give the names of the images under `path`, in order, and what reads each."""

    def wanted(name: str) -> bool:
        return Path(name).suffix.lower() in _SUFFIXES and Path(name).name != _SHEET

    if path.is_dir():
        names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
        yield [(name, (path / name).read_bytes) for name in names if wanted(name)]
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = sorted(filter(wanted, archive.namelist()))
            yield [(name, partial(archive.read, name)) for name in names]
    else:
        raise UserError(f"{path} is not a run, a folder or zip of images, or an .npz")
