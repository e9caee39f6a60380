"""Pictures in any layout to training batches."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from trilemma.data.dataset import Dataset, batches
from trilemma.data.named import FASHION_CLASSES, PACKAGED, read_idx
from trilemma.errors import UserError

__all__ = ["Dataset", "batches", "load"]


def load(
    source: str | Path,
    *,
    split: str = "train",
    size: int | None = None,
    multiple: int = 1,
    channels: int | None = None,
    background: str = "white",
) -> Dataset:
    """Load a data set (first version: fashion and fashion-mnist only)."""
    prefixes = {
        "fashion": f"{PACKAGED}/fashion-",
        "fashion-mnist": "/usr/share/datasets/fashion-mnist/",
    }
    if str(source) not in prefixes:
        raise UserError(f"{source}: not known yet")
    prefix = prefixes[str(source)]
    parts = {"train": ["train"], "test": ["t10k"], "all": ["train", "t10k"]}[split]
    images = np.concatenate([read_idx(Path(f"{prefix}{p}-images-idx3-ubyte.gz")) for p in parts])
    label = np.concatenate([read_idx(Path(f"{prefix}{p}-labels-idx1-ubyte.gz")) for p in parts])
    side = -(-(size or images.shape[1]) // multiple) * multiple
    if side != images.shape[1]:
        lanczos = Image.Resampling.LANCZOS
        images = np.stack(
            [np.asarray(Image.fromarray(i).resize((side, side), lanczos)) for i in images]
        )
    images = np.repeat(images[:, None], channels or 1, axis=1)
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    return Dataset(
        str(source), split, digest, images, label.astype(np.int64), list(FASHION_CLASSES)
    )
