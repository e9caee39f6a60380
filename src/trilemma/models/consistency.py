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

`Adversarial` adds what no distance between single pictures says, that they look real. Pictures
f(x_t, t) from the times t at which sampling asks for them play the relativistic game of
`models.gan` with R1 and R2 against the real ones that x_t was made of; with the softplus s,

    consistency of the first half + weight s(D(x_0) - D(f(x_t, t))),
    D lowers s(D(f(x_t, t)) - D(x_0)) + w (|grad D(x_0)|^2 + |grad D(f(x_t, t))|^2)

(Kim et al. 2024, "Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of
Diffusion", section 3.3, and Sauer, Lorenz, Blattmann, Rombach 2023, "Adversarial Diffusion
Distillation", add such a term to distillation; theirs are other games). Trials without either part:
docs/families/fewstep.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from trilemma.batch import Batch, Rng
from trilemma.codecs import encoded
from trilemma.diffusion.grids import even_share
from trilemma.diffusion.schedules import Schedule
from trilemma.diffusion.times import LogNormal
from trilemma.model import Frozen, Losses, Phase
from trilemma.models.diffusion import Diffusion
from trilemma.models.distillation import Objective, ddim_step, levels, per_output, within
from trilemma.models.gan import GAMES, gradient_norms
from trilemma.networks.layers import one_hot

GAME = GAMES["relativistic"]
PENALTY, PENALISED = 0.1, 0.25  # weight of R1 and R2, and share of the pictures they are taken on
FIRST = 0.5  # share of the critic's pictures that begin with noise alone, which is hardest
HELD = 2  # of so many pictures, one is held to consistency too


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

    def phases(self, model: Diffusion) -> list[Phase]:
        """Return the one phase.

        Raises:
            ValueError: the target is the picture, so that f(x_0, 0) would be the network's word.
        """
        a, b = model.target(torch.ones(()), torch.zeros(()))
        if b == 0:
            raise ValueError(
                "target 'image' leaves x_0 without noise to the network, and a consistency model "
                "must give it back; use straight, velocity or preconditioned"
            )
        return super().phases(model)

    def gap(self, seen: int) -> float:
        """Return the share by which r has less noise than t after so many images."""
        return max(self.first / (1 + seen / self.halving), self.smallest)

    def loss(self, model: Diffusion, batch: Batch) -> Losses:
        """Return the distance between the pictures of two points of a path."""
        rng = batch.rng
        x0 = encoded(model.codec, batch)
        t = self.times(rng, model.schedule)  # (B,)
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
        return {"loss": ((error + self.huber**2).sqrt() - self.huber).mean()}


class Adversarial(Consistency):
    """Consistency, and pictures that a critic cannot tell from real ones.

    Args:
        teacher: whose paths they are, with the student's schedule.
        critic: maps x (B, C, H, W) and label vectors (B, K) to scores (B,).
        steps: of sampling, on the grid even_share, at whose times the critic looks.
        guidance: of the teacher.
        gap: as `Consistency` takes it; here it begins at half the noise.
        halving: as `Consistency` takes it.
        smallest: as `Consistency` takes it.
        weight: of the critic's word.

    Raises:
        ValueError: no step.
    """

    name = "student"

    def __init__(
        self,
        teacher: Frozen,
        critic: nn.Module,
        steps: int = 1,
        guidance: float = 1.0,
        gap: float = 0.5,
        halving: int = 10_000,
        smallest: float = 0.01,
        weight: float = 0.3,
    ) -> None:
        super().__init__(teacher, guidance, gap, halving, smallest)
        if steps < 1:
            raise ValueError(f"steps is {steps}; expected at least 1")
        self.critic, self.weight, self.steps = critic, weight, steps

    def phases(self, model: Diffusion) -> list[Phase]:
        """Return the critic's turn and the student's; raises as `Consistency.phases`."""
        critic = Phase("critic", partial(self.critic_loss, model), [self.critic])
        return [critic, *super().phases(model)]

    def loss(self, model: Diffusion, batch: Batch) -> Losses:
        """Return how unreal the pictures look, and the distance from consistency."""
        real, fake, label = self.pair(model, batch)
        unreal = GAME.generator(self.critic(real, label), self.critic(fake, label)).mean()
        part = slice(0, -(-len(batch) // HELD))
        kept = None if batch.kept is None else batch.kept[part]
        held = Batch(batch.image[part], batch.condition[part], batch.seen, batch.rng[part], kept)
        distance = super().loss(model, held)["loss"]
        return {"loss": distance + self.weight * unreal, "distance": distance, "unreal": unreal}

    def critic_loss(self, model: Diffusion, batch: Batch) -> Losses:
        """Tell the student's pictures from real ones."""
        with torch.no_grad():
            real, fake, label = self.pair(model, batch)
        score, drawn = self.critic(real, label), self.critic(fake, label)
        chosen = batch.rng.uniform() < PENALISED
        at, told = torch.cat([real[chosen], fake[chosen]]), torch.cat([label[chosen]] * 2)
        steep = gradient_norms(lambda x: self.critic(x, told), at).sum() / (PENALISED * len(real))
        return {
            "loss": GAME.critic(score, drawn).mean() + PENALTY * steep,
            "real": score.detach().mean(),
            "fake": drawn.detach().mean(),
            "ahead": (score > drawn).float().mean(),
            "penalty": steep.detach(),
        }

    def pair(self, model: Diffusion, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_0, what the student draws of it as sampling would, and label vectors (B, K)."""
        rng, x0 = batch.rng, encoded(model.codec, batch)
        times = even_share(model.schedule, self.steps)[:-1].to(x0.device, torch.float32)
        t = times[torch.where(rng.uniform() < FIRST, 0, rng.integers(self.steps))]
        alpha, sigma = levels(model, t, x0)
        x = alpha * x0 + sigma * rng.normal(*x0.shape[1:])
        drawn = model.denoise(x, t, model.conditioner(self.told(model, batch)))
        classes = model.conditioner.classes
        label = one_hot(batch.condition.label, classes, len(batch), x0.device)
        return x0, within(model, drawn.float()), label


def nearer(schedule: Schedule, t: Tensor, gap: float) -> Tensor:
    """Return the times (B,) at which the share sigma / (alpha + sigma) is 1 - gap of that at t."""
    alpha, sigma = schedule(t.double())
    share = (1 - gap) * sigma / (alpha + sigma)
    return schedule.time(2 * ((1 - share) / share).log()).to(t.dtype)
