"""Guidance by words, of a model that knows none: by CLIP, which tells how a text fits a picture.

For the picture x_0 that the model expects, crops T_k of it, and the unit vectors that CLIP makes of
pictures and of texts, the guide is

    g(x_0) = 100 / K  sum_k  cos(image(T_k x_0), text)

and `guidance.by_guide` goes along its gradient. 100 is the largest temperature of CLIP's training
(Radford et al. 2021), so that g is as a log probability among texts that it tells apart.
One view alone is easily cheated: pixels change, CLIP is pleased, and nobody sees why. Random crops,
other ones at every step, must all be pleased, and the adversarial part averages out: Crowson et al.
2022, "VQGAN-CLIP: Open Domain Image Generation and Editing with Natural Language Guidance", section
3.2, and Nichol et al. 2022, "GLIDE", section 2.3, for diffusion models.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from trilemma.batch import Condition
from trilemma.model import Matches

TEMPERATURE = 100.0
SMALLEST = 0.5  # side of a crop, as a share of the picture's


def resemblance(clip: Matches, condition: Condition, crops: int) -> Callable[[Tensor], Tensor]:
    """Return how well pictures (B, C, H, W) in [-1, 1] fit the texts of a condition: (B,).

    The crops are other ones at each call, and the same for all pictures of it.

    Raises:
        ValueError: there are no texts, or no crops.
    """
    if condition.text is None:
        raise ValueError("guidance by CLIP goes towards a text: say which")
    if crops < 1:
        raise ValueError(f"crops is {crops}; expected at least 1")
    with torch.no_grad():
        texts = clip.embed_texts(condition.text)  # (B, D)
    calls = count()

    def fit(images: Tensor) -> Tensor:
        views = cut(images, crops, next(calls))  # (K B, C, H, W)
        seen = clip.embed_images(views).unflatten(0, (crops, len(images)))  # (K, B, D)
        return TEMPERATURE * (seen * texts).sum(2).mean(0)

    return fit


def cut(images: Tensor, crops: int, seed: int) -> Tensor:
    """Cut square parts out of images (B, C, H, W), enlarged to their size: (crops B, C, H, W).

    The first is the whole picture; the sides of the others are `SMALLEST` of its or more.
    """
    draw = torch.rand(3, crops, generator=torch.Generator().manual_seed(seed))
    side = SMALLEST + (1 - SMALLEST) * draw[0]
    side[0] = 1.0
    centre = (1 - side) * (2 * draw[1:] - 1)  # (2, K), in [-1, 1] over the picture
    zero = torch.zeros(crops)
    rows = [torch.stack([side, zero, centre[0]], 1), torch.stack([zero, side, centre[1]], 1)]
    where = torch.stack(rows, 1).to(images)  # (K, 2, 3)
    size = [crops, *images.shape[1:]]
    grid = F.affine_grid(where, size, align_corners=False)  # (K, H, W, 2)
    grid = grid.repeat_interleave(len(images), 0)
    return F.grid_sample(images.repeat(crops, 1, 1, 1), grid, align_corners=False)
