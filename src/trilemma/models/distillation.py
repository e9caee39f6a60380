"""Fewer steps from a trained diffusion model: what a student learns of a frozen teacher.

A student is a `Diffusion` like any other; only its loss is another, an `Objective`. Its error is
always that of the network's output F: an error e of x_0 is one of (b alpha - a sigma) / sigma e of
F, by the target's formula; of straight and velocity, that counts all noise levels alike.

Progressive distillation (Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of
Diffusion Models", algorithm 2): one DDIM step of the student from t to s is to end where two of the
teacher do, by way of m. With x_s what they reach, the student's x_0 is to be

    x_0 = (x_s - sigma_s / sigma_t x_t) / (alpha_s - sigma_s / sigma_t alpha_t)

(their appendix G, eq. 43), which is x_s itself in the last step. With velocity the error of F has
their weight SNR + 1. Each halving is a run, and the teacher of the next.

Reflow (Liu, Gong, Liu 2023, "Flow Straight and Fast", algorithm 1): pairs of noise and the picture
that the teacher's flow makes of it, and between the two a straight line to be learned. Paths that
do not cross are followed in few steps of Euler's. Where the number of steps is known, only the
times from which these go are trained: with one, that is their distillation (section 2.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.codecs import encoded
from trilemma.conditioning import SOURCES, source_of
from trilemma.diffusion.grids import even_share
from trilemma.diffusion.solvers import check, last
from trilemma.model import Frozen, Losses, Phase
from trilemma.models.diffusion import Diffusion


class Objective(nn.Module, ABC):
    """What a diffusion model learns instead of denoising.

    Args:
        teacher: a trained diffusion model; in a recipe `{ type = "trained", path = "runs/x" }`.
        guidance: the scale at which it is asked: the student then draws so without guidance.

    Raises:
        ValueError: the teacher is no diffusion model.
    """

    name: str
    shares_schedule = True
    """Whether teacher and student are asked of the same x_t."""

    def __init__(self, teacher: Frozen | None, guidance: float = 1.0) -> None:
        super().__init__()
        if teacher is not None and not isinstance(teacher.module, Diffusion):
            raise ValueError(
                f"the teacher is a trained {type(teacher.module).__name__}; a student learns from "
                "a diffusion model"
            )
        self.teacher, self.guidance = teacher, guidance

    @property
    def taught(self) -> Diffusion:
        """The teacher, where there is one."""
        return cast(Diffusion, cast(Frozen, self.teacher).module)

    def phases(self, model: Diffusion) -> list[Phase]:
        """Return the student's phase, and those of what learns beside it.

        Raises:
            ValueError: the student's schedule is not the teacher's and must be.
        """
        if self.teacher is not None and self.shares_schedule:
            t = torch.linspace(0, 1, 11, dtype=torch.float64)
            theirs, own = (torch.stack(each.schedule(t)) for each in (self.taught, model))
            if not torch.allclose(theirs, own):
                raise ValueError(
                    f"the teacher's schedule is another {type(self.taught.schedule).__name__} than "
                    "the student's; give the student the same [model.schedule]"
                )
        return [Phase(self.name, partial(self.loss, model), [model.network, model.conditioner])]

    def begin(self, model: Diffusion) -> bool:
        """Give a student what fits of the teacher's weights; return whether the codec's do."""
        if self.teacher is None:
            return False
        fitting = set()
        for part in ("network", "conditioner", "codec"):
            own, theirs = getattr(model, part), getattr(self.taught, part).state_dict()
            shapes = {name: tensor.shape for name, tensor in own.state_dict().items()}
            if shapes == {name: tensor.shape for name, tensor in theirs.items()}:
                own.load_state_dict(theirs)
                fitting.add(part)
        return "codec" in fitting

    @abstractmethod
    def loss(self, model: Diffusion, batch: Batch) -> Losses:
        """Return the student's error on a batch."""

    def told(self, model: Diffusion, batch: Batch) -> Condition:
        """Return what teacher and student are both told: the condition, and a source made once."""
        source = source_of(model.conditioner)
        if source is None:
            return batch.condition
        made = SOURCES[source.kind](batch.image, batch.rng, source.factor)
        return replace(batch.condition, source=made)

    def expected(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the teacher's x_0 (B, ...) behind x_t at times t (B,), guided, within bounds."""
        model = self.taught
        x0 = model.denoise(x, t, model.conditioner(condition))
        if self.guidance != 1:
            without = model.denoise(x, t, model.conditioner.nothing(condition))
            x0 = without + self.guidance * (x0 - without)
        return within(model, x0)


class Progressive(Objective):
    """One step of the student for two of the teacher.

    Args:
        teacher: a diffusion model with the student's schedule.
        steps: of the student, on the grid even_share; the teacher takes twice as many.
        guidance: of the teacher.
    """

    name = "progressive"

    def __init__(self, teacher: Frozen, steps: int, guidance: float = 1.0) -> None:
        super().__init__(teacher, guidance)
        if steps < 1:
            raise ValueError(f"steps is {steps}; expected at least 1")
        self.steps = steps

    def loss(self, model: Diffusion, batch: Batch) -> Losses:
        """Return the squared error of the student's output at the beginnings of its steps."""
        condition = self.told(model, batch)
        x0 = encoded(model.codec, batch)
        step = batch.rng.integers(self.steps)
        times = even_share(model.schedule, 2 * self.steps).to(x0.device, torch.float32)
        t, middle, s = (times[2 * step + i] for i in range(3))
        alpha, sigma = levels(model, t, x0)
        x = alpha * x0 + sigma * batch.rng.normal(*x0.shape[1:])
        with torch.no_grad():
            target = self.two_steps(model, x, (t, middle, s), condition)
        guess = model.denoise(x, t, model.conditioner(condition))
        error = (guess - target) * per_output(model, t, x)
        return {"loss": error.square().mean()}

    def two_steps(
        self, model: Diffusion, x: Tensor, times: tuple[Tensor, Tensor, Tensor], told: Condition
    ) -> Tensor:
        """Return the x_0 with which one DDIM step ends where two of the teacher's do.

        Args:
            model: the student.
            x: (B, ...) at times[0].
            times: t, m and s, each (B,), falling.
            told: to the teacher.
        """
        reached = x
        for now, after in zip(times, times[1:], strict=False):
            x0 = self.expected(reached, now, told)
            reached = ddim_step(model, reached, x0, now, after)
        (alpha, sigma), (alpha_s, sigma_s) = (levels(model, t, x) for t in (times[0], times[2]))
        ratio = sigma_s / sigma
        return (reached - ratio * x) / (alpha_s - ratio * alpha)


class Reflow(Objective):
    """The straight line from noise to the picture that the teacher makes of it.

    Args:
        teacher: a diffusion model, of any schedule.
        steps: of Euler's method, on the grid even_share, that the student is for; None trains all
            times.
        guidance: of the teacher.
        solver: by which the teacher draws.
        solver_steps: of it; for a picture of a batch as many calls of the teacher.

    Raises:
        ValueError: a solver that draws fresh noise, which makes no pairs.
    """

    name = "reflow"
    shares_schedule = False

    def __init__(
        self,
        teacher: Frozen,
        steps: int | None = None,
        guidance: float = 1.0,
        solver: str = "dpmpp_2m",
        solver_steps: int = 8,
    ) -> None:
        super().__init__(teacher, guidance)
        self.solver, self.solver_steps = check(solver, {}), solver_steps
        if self.solver.stochastic:
            raise ValueError(
                f"solver {solver} draws fresh noise on its way, so that no noise belongs to a "
                "picture; give one that follows the flow, such as dpmpp_2m or heun"
            )
        if solver_steps < 1 or (steps is not None and steps < 1):
            raise ValueError(
                f"steps is {steps} and solver_steps {solver_steps}; expected at least 1"
            )
        self.steps = steps

    def loss(self, model: Diffusion, batch: Batch) -> Losses:
        """Return the squared error of the student's output on the lines of new pairs."""
        condition = self.told(model, batch)
        noise, x0 = self.pairs(condition, batch.rng)
        if self.steps is None:
            t = batch.rng.uniform()
        else:
            times = even_share(model.schedule, self.steps).to(x0.device, torch.float32)
            t = times[batch.rng.integers(self.steps)]
        alpha, sigma = levels(model, t, x0)
        guess = model.denoise(alpha * x0 + sigma * noise, t, model.conditioner(condition))
        error = (guess - x0) * per_output(model, t, x0)
        return {"loss": error.square().mean()}

    @torch.no_grad()
    def pairs(self, condition: Condition, rng: Rng) -> tuple[Tensor, Tensor]:
        """Draw noise (B, ...) of unit variance and what the teacher's flow makes of it (B, ...)."""
        teacher = self.taught
        noise = rng.normal(*teacher.codec.shape)
        times = self.solver.grid(teacher.schedule, self.solver_steps)
        denoise = teacher.denoiser(condition, self.guidance)
        _, sigma = teacher.schedule(times[:1])
        path = self.solver.steps(denoise, float(sigma) * noise, times, teacher.schedule, rng)
        return noise, within(teacher, last(path))


def levels(model: Diffusion, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma at times t (B,), with the dimensions of x."""
    alpha, sigma = model.schedule(t)
    shape = (-1, *[1] * (x.ndim - 1))
    return alpha.reshape(shape), sigma.reshape(shape)


def per_output(model: Diffusion, t: Tensor, x: Tensor) -> Tensor:
    """Return (b alpha - a sigma) / sigma at times t (B,): the error of F for one of x_0."""
    alpha, sigma = levels(model, t, x)
    a, b = model.target(alpha, sigma)
    return (b * alpha - a * sigma) / sigma


def ddim_step(model: Diffusion, x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return x_s (B, ...) of x_t, if the picture is x0: the noise that x_t then holds stays."""
    (alpha, sigma), (alpha_s, sigma_s) = levels(model, t, x), levels(model, s, x)
    return alpha_s * x0 + sigma_s * (x - alpha * x0) / sigma


def within(model: Diffusion, x0: Tensor) -> Tensor:
    """Return x_0 kept within the bounds of the model's codec, if there are any."""
    return x0.clamp(*model.codec.bounds) if model.codec.bounds else x0
