"""Times at which rectified-flow checkpoints are sampled.

The more pixels a picture has, the more noise it takes to hide it: Esser et al. 2024, "Scaling
Rectified Flow Transformers for High-Resolution Image Synthesis", eq. 23, moves times t in [0, 1] of
the straight schedule to

    t' = s t / (1 + (s - 1) t),

whose sigma / alpha is s times that of t. Stable Diffusion 3 has s = 3 at every size. FLUX.1 dev
has s = exp(mu), with mu linear in the number of a picture's patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilemma.errors import UserError

LEAST = 1 / 1000
"""The least noise that these models are trained under."""


@dataclass(frozen=True)
class Shift:
    """How far times are moved toward the noise.

    Attributes:
        factor: s, of models that move times alike at every size.
        dynamic: whether s depends on the size instead, by what follows.
        tokens: two numbers of patches.
        mu: mu at these.
        exponential: s is exp(mu); else mu itself.
    """

    factor: float = 1.0
    dynamic: bool = False
    tokens: tuple[int, int] = (256, 4096)
    mu: tuple[float, float] = (0.5, 1.15)
    exponential: bool = True

    def at(self, tokens: int) -> float:
        """Return s for a picture of so many patches."""
        if not self.dynamic:
            return self.factor
        share = (tokens - self.tokens[0]) / (self.tokens[1] - self.tokens[0])
        mu = self.mu[0] + share * (self.mu[1] - self.mu[0])
        return math.exp(mu) if self.exponential else mu


def shifted(times: Tensor, factor: float) -> Tensor:
    """Return times in [0, 1], moved: the formula above."""
    return factor * times / (1 + (factor - 1) * times)


def times(shift: Shift, steps: int, tokens: int, whole: bool) -> Tensor:
    """Return times (steps + 1,), float64, that fall from 1 to 0.

    Args:
        shift: of the model.
        steps: how many.
        tokens: the picture's patches.
        whole: whether the times before moving are even all the way, 1 to 0 (FLUX.1), or to the
            least noise trained on, which the last step goes from (Stable Diffusion 3).
    """
    factor = shift.at(tokens)
    least = torch.tensor(LEAST, dtype=torch.float64)
    last = 1 / steps if whole else float(least if shift.dynamic else shifted(least, factor))
    even = torch.linspace(1, last, steps, dtype=torch.float64)
    return torch.cat([shifted(even, factor), even.new_zeros(1)])


ABSENT = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)


def from_config(config: Mapping[str, Any], where: str) -> Shift:
    """Return what a folder's `scheduler/scheduler_config.json` says.

    Raises:
        UserError: it is of no rectified flow, or asks for what is not here.
    """
    name = str(config.get("_class_name"))
    if not name.startswith("FlowMatch"):
        raise UserError(
            f"{where} is of {name}; a model of this kind has a FlowMatchEulerDiscreteScheduler"
        )
    for option in ABSENT:
        if config.get(option):
            raise UserError(
                f"{where} has {option} {config[option]!r}, which is not supported; sample with the "
                "model's usual times by setting it to false"
            )
    return Shift(
        factor=config.get("shift", 1.0),
        dynamic=bool(config.get("use_dynamic_shifting")),
        tokens=(config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)),
        mu=(config.get("base_shift", 0.5), config.get("max_shift", 1.15)),
        exponential=config.get("time_shift_type", "exponential") == "exponential",
    )
