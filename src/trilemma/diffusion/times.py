"""Which times the training visits.

Uniform over steps: Ho, Jain, Abbeel 2020, algorithm 1. Logit-normal: Esser et al. 2024, "Scaling
Rectified Flow Transformers for High-Resolution Image Synthesis", eq. 19; on the straight schedule
it makes log(sigma / alpha) normal. Log-normal: the same on every schedule, Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models", section 5. By importance:
Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma import distributed
from trilemma.batch import Rng
from trilemma.diffusion.schedules import Schedule


class Uniform:
    """Times even in (0, 1), or over 1/T, 2/T, ..., 1.

    Args:
        steps: T; None for continuous times.
    """

    def __init__(self, steps: int | None = None) -> None:
        self.steps = steps

    def __call__(self, rng: Rng, schedule: Schedule) -> Tensor:
        """Draw (B,) times."""
        u = rng.uniform()
        return u if self.steps is None else (u * self.steps).ceil() / self.steps


class LogitNormal:
    """Times whose logit is normal: the middle of the way is visited most.

    Args:
        mean: of the logit; above 0 favours noisy times.
        std: of the logit.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean, self.std = mean, std

    def __call__(self, rng: Rng, schedule: Schedule) -> Tensor:
        """Draw (B,) times."""
        return torch.sigmoid(self.mean + self.std * rng.normal())


class LogNormal:
    """Times at which log(sigma / alpha) is normal, whatever the schedule.

    Args:
        mean: of log(sigma / alpha); the default is that of Karras et al.
        std: of log(sigma / alpha).
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        self.mean, self.std = mean, std

    def __call__(self, rng: Rng, schedule: Schedule) -> Tensor:
        """Draw (B,) times."""
        return schedule.time(-2 * (self.mean + self.std * rng.normal()))


class Importance(nn.Module):
    """Steps 1/T, 2/T, ..., 1 drawn by how large their losses are, for losses that differ much.

    For a mean of losses L_t over the steps, L_t / (T p_t) at a step drawn with probability p_t is
    an unbiased estimate, of least variance where p_t is in proportion to E[L_t^2]^(1/2). That is
    taken of the last losses of each step; until all steps have so many, p is even. It is made for
    the bound on the likelihood, whose terms differ by orders of magnitude.

    What was told is part of the model's state, and the same in all processes.

    Args:
        steps: T.
        history: how many of the last losses of each step are kept.
        even: this share of the draws goes to all steps alike, so that none is forgotten.
    """

    losses: Tensor  # (T, history), each row a ring
    told: Tensor  # (T,) losses ever told of each step

    def __init__(self, steps: int, history: int = 10, even: float = 0.001) -> None:
        super().__init__()
        if steps < 1 or history < 1 or not 0 <= even <= 1:
            raise ValueError(
                f"steps is {steps}, history {history} and even {even}; expected at least 1, at "
                "least 1, and 0 to 1"
            )
        self.steps, self.history, self.even = steps, history, even
        self.register_buffer("losses", torch.zeros(steps, history))
        self.register_buffer("told", torch.zeros(steps, dtype=torch.int64))
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @property
    def known(self) -> Tensor:
        """The share of the steps whose history is whole."""
        return (self.told >= self.history).float().mean()

    def probabilities(self) -> Tensor:
        """Return p (T,) float64."""
        even = torch.full_like(self.told, 1 / self.steps, dtype=torch.float64)
        if self.known < 1:
            return even
        root = self.losses.double().square().mean(1).sqrt() + 1e-12
        return torch.lerp(root / root.sum(), even, self.even)

    @property
    def visited(self) -> Tensor:
        """The share of the steps that is visited in effect: 1 / (T sum p^2)."""
        return 1 / (self.steps * self.probabilities().square().sum())

    def forward(self, rng: Rng, schedule: Schedule) -> Tensor:
        """Draw (B,) times."""
        reached = self.probabilities().cumsum(0)
        step = torch.searchsorted(reached, rng.uniform().double() * reached[-1])
        return (step + 1).float() / self.steps

    def weight(self, t: Tensor) -> Tensor:
        """Return 1 / (T p) (B,) of times (B,) drawn."""
        return (1 / (self.steps * self.probabilities()[self._step(t)])).float()

    def tell(self, t: Tensor, loss: Tensor) -> None:
        """Keep the losses (B,) at times (B,), not yet weighted, for the next `update`."""
        self._waiting.append((self._step(t), loss.detach().float()))

    def update(self) -> None:
        """Take in what all processes were told since the last time, in the order of the batch.

        After a whole step, so that its parts, however a batch is split, are drawn alike.
        """
        told = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        step, loss = (distributed.gather(own).flatten() for own in told)
        self._waiting = []
        finite = loss.isfinite()
        step, order = step[finite].sort(stable=True)
        loss = loss[finite][order]
        many = torch.bincount(step, minlength=self.steps)
        nth = torch.arange(len(step), device=step.device) - (many.cumsum(0) - many)[step]
        last = nth >= many[step] - self.history  # what the same step would overwrite is left out
        place = (self.told[step] + nth) % self.history
        self.losses[step[last], place[last]] = loss[last]
        self.told += many

    def _step(self, t: Tensor) -> Tensor:
        """Return the rows of times (B,)."""
        return (t.double() * self.steps).round().long() - 1
