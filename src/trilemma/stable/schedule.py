"""The noise schedule and the times of a scheduler_config.json.

Step k of 0 to T - 1 there is time (k + 1) / T here. Where the steps lie (Lin et al. 2024, "Common
Diffusion Noise Schedules and Sample Steps are Flawed", table 2) is said by `timestep_spacing`; the
solvers of several steps take the spacing of one step more, of which the cleanest falls away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilemma.diffusion.schedules import Betas, Cosine, Linear, Quadratic, Schedule, ZeroTerminal
from trilemma.errors import UserError

SOLVERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "ipndm",
    "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}
"""The solver that stands for a scheduler of diffusers."""

MULTISTEP = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "unipc")


@dataclass(frozen=True)
class Spacing:
    """A schedule and where its steps lie.

    Attributes:
        schedule: of the noise.
        prediction: what the network predicts: epsilon, v_prediction or sample.
        solver: by default.
        steps: T.
        spacing: leading, trailing or linspace.
        offset: added to the steps in leading.
        whole: the last step goes to the clean picture; else to the first step's noise. Of ddim.
    """

    schedule: Schedule
    prediction: str = "epsilon"
    solver: str = "ddim"
    steps: int = 1000
    spacing: str = "leading"
    offset: int = 1
    whole: bool = False

    def times(self, solver: str, count: int) -> Tensor:
        """Return the (count + 1,) falling float64 times of `count` steps of a solver.

        Raises:
            UserError: more steps than the schedule has.
        """
        several = solver in MULTISTEP
        total = self.steps
        if not 1 <= count <= total - several:
            raise UserError(f"steps is {count}; this schedule has 1 to {total - several}")
        if self.spacing == "trailing":
            k = np.arange(total, 0, -total / count).round() - 1
        elif self.spacing == "linspace":
            k = np.linspace(0, total - 1, count + several)[::-1]
            k = k.round() if solver != "euler" else k
        else:
            k = np.arange(count + several)[::-1] * (total // (count + several)) + self.offset
        k = np.minimum(k[:count], total - 1)
        last = 0.0 if self.whole or solver not in ("ddim", "ddpm", "ipndm") else 1 / total
        if (k[-1] + 1) / total <= last:  # the first step itself is the last that is left
            last = 0.0
        return torch.tensor([*((k + 1) / total).tolist(), last], dtype=torch.float64)

    def unscaled(self, solver: str) -> bool:
        """Say whether the first x is sigma times noise, and not noise of deviation 1.

        Euler's steps in diffusers begin so, except in the spacing leading.
        """
        return solver.startswith("euler") and self.spacing != "leading"


def from_config(config: Mapping[str, Any], where: str) -> Spacing:
    """Return what a scheduler_config.json says; `where` is told in errors.

    Raises:
        UserError: a schedule that is not known.
    """
    kind = config.get("_class_name", "DDIMScheduler")
    steps = int(config.get("num_train_timesteps", 1000))
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    form = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas: Betas = Betas(torch.tensor(config["trained_betas"], dtype=torch.float64))
    elif form == "scaled_linear":
        betas = Quadratic(steps, first, last)
    elif form == "linear":
        betas = Linear(steps, first, last)
    elif form == "squaredcos_cap_v2":
        betas = Cosine(steps)
    else:
        raise UserError(
            f"{where} has the beta_schedule '{form}'; expected scaled_linear, linear or "
            "squaredcos_cap_v2"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"{where} has the prediction_type '{prediction}'; expected epsilon, v_prediction or "
            "sample"
        )
    own = "leading" if kind in ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler") else "linspace"
    spacing = config.get("timestep_spacing", own)
    if spacing not in ("leading", "trailing", "linspace"):
        raise UserError(
            f"{where} has the timestep_spacing '{spacing}'; expected leading, trailing or linspace"
        )
    zero = config.get("rescale_betas_zero_snr", False)
    whole = config.get("set_alpha_to_one", kind != "PNDMScheduler")
    return Spacing(
        ZeroTerminal(betas) if zero else betas,
        prediction,
        SOLVERS.get(kind, "ddim"),
        steps,
        spacing,
        int(config.get("steps_offset", 0)),
        bool(whole),
    )
