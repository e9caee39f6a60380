"""Data sets known by name: where their files are looked for, and how they are read."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from trilemma.errors import UserError

PACKAGED = Path(__file__).parent / "files"

FASHION_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


def read_idx(path: Path) -> np.ndarray:
    """Read a file of uint8 in the idx format of MNIST, gzipped or not."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] != b"\0\0\x08":
        raise UserError(f"{path} is not an idx file of bytes")
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
