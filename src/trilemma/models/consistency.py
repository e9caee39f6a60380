"""Consistency models: from any noise level to the picture in one call.

The probability flow takes x_t to one picture. A consistency function f(x_t, t) says which, so it is
the same all along a path, and at its end x_0 itself:

    f(x_t, t) = f(x_r, r),    f(x_0, 0) = x_0

(Song, Dhariwal, Chen, Sutskever 2023, "Consistency Models", definition 1). Here f is the x_0 of a
`Diffusion`: by its formula x_0 = (b x_t - sigma F) / (b alpha - a sigma), f(x_0, 0) = x_0 whatever
the network says, unless the target is the picture itself. What differs from denoising is the loss,

    |f(x_t, t) - f(x_r, r)|,    the second without gradient,

for x_r on the path of x_t, a little nearer to the picture. Of a teacher, the path is that of its
DDIM step: consistency distillation. Without one, both lie on the line from the picture to the
noise, x = alpha x_0 + sigma noise, which is right on average over the pictures behind x_t
(theorem 2 there): consistency training.

How near r is to t: Geng, Pokle, Luo, Lin, Kolter 2024, "Consistency Models Made Easy", section 3.
With shares of noise u = sigma / (alpha + sigma),

    u_r = (1 - gap) u_t,    gap falling as training goes on.

At gap 1, x_r is the picture and this is denoising, with which it begins. The size of an error e of
F is sqrt(e^2 + c^2) - c for each picture (the pseudo-Huber distance of Song & Dhariwal 2024,
"Improved Techniques for Training Consistency Models", section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trilemma.batch import Batch, Rng
from trilemma.diffusion.schedules import Schedule
from trilemma.diffusion.times import LogNormal
from trilemma.model import Frozen, Losses, Phase
from trilemma.models.diffusion import Diffusion
from trilemma.models.distillation import Objective, ddim_step, levels, per_output, within


class Consistency(Objective):
    """The same picture from everywhere on a path.

    Args:
        teacher: whose paths they are, with the student's schedule; None for training without.
        guidance: of the teacher.
        gap: between the two points at first, as a share of the noise; 1 is denoising.
        halving: images after which the gap is a half of that, then a third, a fourth ...
        smallest: below which it does not fall.
        times: at which to begin; LogNormal(0, 2) if None, which reaches all noise.
        huber: c, for the root of an error's mean square.
    """

    name = "consistency"

    def __init__(
        self,
        teacher: Frozen | None = None,
        guidance: float = 1.0,
        gap: float = 1.0,
        halving: int = 10_000,
        smallest: float = 0.01,
        times: Callable[[Rng, Schedule], Tensor] | None = None,
        huber: float = 0.001,
    ) -> None:
        super().__init__(teacher, guidance)
        if not 0 < smallest <= gap <= 1 or halving < 1:
            raise ValueError(
                f"gap is {gap}, smallest {smallest} and halving {halving}; expected "
                "0 < smallest <= gap <= 1 and at least 1 image"
            )
        self.first, self.halving, self.smallest = gap, halving, smallest
        self.times = times or LogNormal(0.0, 2.0)
        self.huber = huber

    def phase(self, model: Diffusion) -> Phase:
        """Return the one phase, as every objective does.

        Raises:
            ValueError: the target is the picture, so that f(x_0, 0) would be the network's word.
        """
        a, b = model.target(torch.ones(()), torch.zeros(()))
        if b == 0:
            raise ValueError(
                "target 'image' leaves x_0 without noise to the network, and a consistency model "
                "must give it back; use straight, velocity or preconditioned"
            )
        return super().phase(model)

    def gap(self, seen: int) -> float:
        """Return the share by which r has less noise than t after so many images."""
        return max(self.first / (1 + seen / self.halving), self.smallest)

    def loss(self, model: Diffusion, batch: Batch) -> Losses:
        """Return the distance between the pictures of two points of a path."""
        rng = batch.rng
        x0 = model.codec.encode(batch.image)
        t = self.times(rng, model.schedule)  # (B,)
        noise = rng.normal(*x0.shape[1:])
        alpha, sigma = levels(model, t, x0)
        x = alpha * x0 + sigma * noise
        r = nearer(model.schedule, t, self.gap(batch.seen))
        if self.teacher is None:
            embedded = model.conditioner(batch.condition, rng, batch.image)
            alpha_r, sigma_r = levels(model, r, x)
            y = alpha_r * x0 + sigma_r * noise
        else:
            condition = self.told(batch)
            embedded = model.conditioner(condition)
            with torch.no_grad():
                y = ddim_step(model, x, self.expected(x, t, condition), t, r)
        guess = model.denoise(x, t, embedded)
        with torch.no_grad():
            target = within(model, model.denoise(y, r, embedded))
        error = ((guess - target) * per_output(model, t, x)).flatten(1).square().mean(1)
        return {"loss": ((error + self.huber**2).sqrt() - self.huber).mean()}


def nearer(schedule: Schedule, t: Tensor, gap: float) -> Tensor:
    """Return the times (B,) at which the share sigma / (alpha + sigma) is 1 - gap of that at t."""
    alpha, sigma = schedule(t.double())
    share = (1 - gap) * sigma / (alpha + sigma)
    return schedule.time(2 * ((1 - share) / share).log()).to(t.dtype)
