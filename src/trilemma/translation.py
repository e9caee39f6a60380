"""Pictures of one domain into another, by a model that was trained on both."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trilemma import device
from trilemma.batch import Condition, Rng, to_float, to_uint8
from trilemma.data import Dataset
from trilemma.drawing import grid
from trilemma.errors import UserError
from trilemma.sampling import Trained

SHOWN = 16  # pictures of each domain on a sheet


def translate(
    trained: Trained, images: Tensor, direction: str = "a-to-b", batch: int = 64
) -> Tensor:
    """Translate pictures.

    Args:
        trained: a model that translates.
        images: uint8 (N, C, H, W) of the shape it was trained on; domain A is the folder `trainA`.
        direction: "a-to-b" or "b-to-a".
        batch: pictures at once.

    Returns:
        uint8 (N, C, H, W) on the CPU.

    Raises:
        UserError: the model does not translate, or the images are not of its shape.
        ValueError: there is no such direction.
    """
    if not trained.translates:
        raise UserError(
            f"{trained.name} draws pictures and translates none; train cyclegan on a folder with "
            "the folders trainA and trainB"
        )
    expected = tuple(trained.data["shape"])
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise UserError(
            f"the pictures are {images.dtype} of {tuple(images.shape)}; {trained.name} was trained "
            f"on uint8 pictures of {expected}"
        )
    options = trained.options({"direction": direction})
    where = trained.where
    made = [torch.empty(0, *expected, dtype=torch.uint8)]
    for part in images.split(batch):
        condition = Condition(len(part), source=to_float(part).to(where))
        with torch.inference_mode(), device.autocast(trained.dtype, where):
            drawn = trained.generator.sample(condition, Rng(range(len(part)), where), **options)
        made.append(to_uint8(drawn).cpu())
    return torch.cat(made)


def sheet(trained: Trained, data: Dataset) -> Image.Image:
    """Lay out pictures from all over both domains, each with its translation to its right.

    Above A to B, below B to A; `data` has both domains.
    """
    assert data.source is not None
    rows = []
    for domain, direction in ((data.source, "a-to-b"), (data.images, "b-to-a")):
        some = np.linspace(0, len(domain) - 1, min(SHOWN, len(domain))).astype(int)
        images = torch.from_numpy(domain[some])
        pairs = torch.stack([images, translate(trained, images, direction)], 1).flatten(0, 1)
        blank = pairs.new_full((-len(pairs) % 8, *pairs.shape[1:]), 255)  # a row of its own
        rows += [pairs, blank]
    return grid(torch.cat(rows), 8)
