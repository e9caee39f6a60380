"""Sheets of pictures for the report: enlarged without smoothing, on a transparent ground."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TILE = 72
"""Pixels a picture is enlarged to at least, by a whole factor."""


def save(images: Tensor, columns: int, path: Path, *, lead: bool = False) -> None:
    """Save uint8 (N, C, H, W) pictures in rows of `columns` as a PNG.

    `lead` sets the first column apart from the others.
    """
    n, channels, height, width = images.shape
    factor = max(1, -(-TILE // height))
    height, width = factor * height, factor * width
    gap = max(2, height // 24)
    apart = 5 * gap if lead else 0
    rows = -(-n // columns)
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    large = large.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # (N, H, W, 3)
    opaque = torch.full((*large.shape[:3], 1), 255, dtype=torch.uint8)
    tiles = torch.cat([large, opaque], dim=3).numpy()
    size = (rows * (height + gap) - gap, columns * (width + gap) - gap + apart, 4)
    sheet = np.zeros(size, dtype=np.uint8)
    for i, image in enumerate(tiles):
        row, column = divmod(i, columns)
        top, left = row * (height + gap), column * (width + gap) + (apart if column else 0)
        sheet[top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, optimize=True)
