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

With a critic D, pictures from the times at which sampling asks for them must also look real:

    + weight s(-D(f(x_t, t))),      D lowers s(-D(x_0)) + s(D(f(x_t, t))) + w |grad D(x_0)|^2

with the softplus s and R1 (`models.gan`): Kim et al. 2024, "Consistency Trajectory Models: Learning
Probability Flow ODE Trajectory of Diffusion", and Sauer et al. 2023, "Adversarial Diffusion
Distillation", add such a term to distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Batch, Rng
from trilemma.codecs import encoded
from trilemma.diffusion.grids import even_share
from trilemma.diffusion.schedules import Schedule
from trilemma.diffusion.times import LogNormal
from trilemma.model import Frozen, Losses, Phase
from trilemma.models.diffusion import Diffusion
from trilemma.models.distillation import Objective, ddim_step, levels, per_output, within
from trilemma.models.gan import gradient_norms
from trilemma.networks.layers import one_hot

R1_WEIGHT, R1_SHARE = 0.5, 0.25  # of the penalty, and of the pictures on which it is taken


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
        critic: maps x (B, C, H, W) and one-hot classes to scores (B,): networks.dcgan.Critic, say.
        weight: of the critic's word.
        steps: at whose times, on the grid even_share, it looks; a half of all times are these.
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
        critic: nn.Module | None = None,
        weight: float = 0.2,
        steps: int = 1,
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
        if steps < 1:
            raise ValueError(f"steps is {steps}; expected at least 1")
        self.critic, self.weight, self.steps = critic, weight, steps

    def phases(self, model: Diffusion) -> list[Phase]:
        """Return the critic's turn, where there is one, and the student's.

        Raises:
            ValueError: the target is the picture, so that f(x_0, 0) would be the network's word.
        """
        a, b = model.target(torch.ones(()), torch.zeros(()))
        if b == 0:
            raise ValueError(
                "target 'image' leaves x_0 without noise to the network, and a consistency model "
                "must give it back; use straight, velocity or preconditioned"
            )
        critic = partial(self.critic_loss, model)
        first = [] if self.critic is None else [Phase("critic", critic, [self.critic])]
        return first + super().phases(model)

    def gap(self, seen: int) -> float:
        """Return the share by which r has less noise than t after so many images."""
        return max(self.first / (1 + seen / self.halving), self.smallest)

    def loss(self, model: Diffusion, batch: Batch) -> Losses:
        """Return the distance between the pictures of two points of a path."""
        rng = batch.rng
        x0 = encoded(model.codec, batch)
        t = self.times(rng, model.schedule)  # (B,)
        looked_at = torch.zeros_like(t)
        if self.critic is not None:
            looked_at = (rng.uniform() < 0.5).to(t.dtype)
            t = torch.where(looked_at > 0, self._starts(model, rng), t)
        noise = rng.normal(*x0.shape[1:])
        alpha, sigma = levels(model, t, x0)
        x = alpha * x0 + sigma * noise
        r = nearer(model.schedule, t, self.gap(batch.seen))
        condition = self.told(model, batch)
        embedded = model.conditioner(condition, rng if self.teacher is None else None)
        if self.teacher is None:
            alpha_r, sigma_r = levels(model, r, x)
            y = alpha_r * x0 + sigma_r * noise
        else:
            with torch.no_grad():
                y = ddim_step(model, x, self.expected(x, t, condition), t, r)
        guess = model.denoise(x, t, embedded)  # first: autocast keeps weights as first cast
        with torch.no_grad():
            target = within(model, model.denoise(y, r, embedded))
        error = ((guess - target) * per_output(model, t, x)).flatten(1).square().mean(1)
        loss = ((error + self.huber**2).sqrt() - self.huber).mean()
        if self.critic is None:
            return {"loss": loss}
        score = self.critic(guess, self._label(model, batch))
        real = 2 * (looked_at * F.softplus(-score)).mean()
        return {"loss": loss + self.weight * real, "distance": loss, "unreal": real}

    def critic_loss(self, model: Diffusion, batch: Batch) -> Losses:
        """Tell the student's pictures from real ones."""
        critic, rng, label = cast(nn.Module, self.critic), batch.rng, self._label(model, batch)
        x0 = encoded(model.codec, batch)
        condition = self.told(model, batch)
        with torch.no_grad():
            t = self._starts(model, rng)
            alpha, sigma = levels(model, t, x0)
            x = alpha * x0 + sigma * rng.normal(*x0.shape[1:])
            embedded = model.conditioner(condition, rng if self.teacher is None else None)
            fake = model.denoise(x, t, embedded)
        real, drawn = critic(x0, label), critic(fake, label)
        chosen = rng.uniform() < R1_SHARE
        told = label[chosen]
        steep = gradient_norms(lambda x: critic(x, told), x0[chosen]).sum() / (R1_SHARE * len(x0))
        loss = (F.softplus(-real) + F.softplus(drawn)).mean()
        correct = ((real > 0).float().mean() + (drawn < 0).float().mean()) / 2
        return {"loss": loss + R1_WEIGHT * steep, "correct": correct, "penalty": steep.detach()}

    def _starts(self, model: Diffusion, rng: Rng) -> Tensor:
        """Draw (B,) of the times at which sampling asks for pictures."""
        times = even_share(model.schedule, self.steps).to(rng.device, torch.float32)
        return times[rng.integers(self.steps)]

    def _label(self, model: Diffusion, batch: Batch) -> Tensor:
        classes = model.conditioner.classes
        return one_hot(batch.condition.label, classes, len(batch), batch.image.device)


def nearer(schedule: Schedule, t: Tensor, gap: float) -> Tensor:
    """Return the times (B,) at which the share sigma / (alpha + sigma) is 1 - gap of that at t."""
    alpha, sigma = schedule(t.double())
    share = (1 - gap) * sigma / (alpha + sigma)
    return schedule.time(2 * ((1 - share) / share).log()).to(t.dtype)
