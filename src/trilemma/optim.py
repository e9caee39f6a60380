"""The optimizers that a recipe can name, each with its fused implementation where there is one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
}
