"""Bits per dimension: how many bits a model needs for each number of a picture.

An 8-bit picture with D numbers costs -log2 P(v) bits. A model of densities gives log p(x) at x in
[-1, 1]^D; a level is a cell of width 2 / 256 = 1 / 128 there, so log P(v) is about
log p(x) - D log 128, and

    bits per dimension = -log p(x) / (D log 2) + log2 128,                    log2 128 = 7

at x drawn evenly in the cell, which on average can only make it larger: Theis, van den Oord, Bethge
(2016), "A Note on the Evaluation of Generative Models", section 3.1. Every picture under an even
density costs 8 bits. Lower is better; it says nothing of how drawn pictures look (section 3.2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trilemma.batch import Rng, dequantise, to_float
from trilemma.model import HasLikelihood


def bits_per_dimension(
    model: HasLikelihood,
    images: Tensor,
    label: Tensor | None = None,
    *,
    seed: int = 0,
    batch: int = 128,
    where: torch.device | str = "cpu",
) -> Tensor:
    """Return the bits per dimension (N,) of each picture, on the CPU.

    Args:
        model: on the device `where`.
        images: uint8 (N, C, H, W).
        label: (N,) what the bits are given, of a model with classes; None for the picture alone.
        seed: picture i is dequantised by the stream of seed + i; not used by discrete models.
        batch: pictures at a time.
        where: the model's device.
    """
    dims = images[0].numel()
    found = []
    for start in range(0, len(images), batch):
        image = to_float(images[start : start + batch]).to(where)
        if not model.discrete:
            rng = Rng(range(seed + start, seed + start + len(image)), where)
            image = dequantise(image, rng.uniform(*image.shape[1:]))
        if label is None:
            found.append(model.log_prob(image).double().cpu())
        else:
            here = label[start : start + batch].to(where)
            found.append(model.log_prob(image, here).double().cpu())
    bits = -torch.cat(found) / (dims * math.log(2))
    return bits if model.discrete else bits + 7
