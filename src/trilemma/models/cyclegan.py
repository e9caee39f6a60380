"""CycleGAN: translation between two domains of images, learned without pairs.

Zhu, Park, Isola, Efros (2017), "Unpaired Image-to-Image Translation using Cycle-Consistent
Adversarial Networks". Two generators, G: A -> B and F: B -> A, and a critic of patches for each
domain, D_B and D_A. With a from A, b from B, and means over batch, places and channels:

    critics     1/2 E[(D_B(b) - 1)^2 + D_B(G(a))^2]  +  1/2 E[(D_A(a) - 1)^2 + D_A(F(b))^2]
    generators  E[(D_B(G(a)) - 1)^2] + E[(D_A(F(b)) - 1)^2]
                + cycle    (E|F(G(a)) - a| + E|G(F(b)) - b|)
                + identity cycle (E|G(b) - b| + E|F(a) - a|)

Equations 1 to 3, the adversarial loss in the least-squares form of section 4 (Mao et al. 2017,
"Least Squares Generative Adversarial Networks", equation 9); the identity loss is section 5.2's: a
generator given an image that is already of its target domain should leave it alone, which keeps
colours where they are. The critics look at translations out of a history, below.

In the data, folders `trainA` and `trainB`: A arrives as `condition.source`, B as `image`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.model import Losses, Model, Phase

DIRECTIONS = ("a-to-b", "b-to-a")


class History(nn.Module):
    """Remembers drawn images, so that a critic does not forget what fooled it before.

    Shrivastava et al. (2017), "Learning from Simulated and Unsupervised Images through Adversarial
    Training", section 2.3, per image as Zhu et al. do it: while there is room an image is kept and
    returned; afterwards it is returned as it is with probability 1/2, or it takes a random place of
    the history and the image that was there is returned.

    Images are taken one after the other, so a batch in parts meets the history that it would meet
    as a whole. It is in buffers: it is saved with the weights, and a resumed run goes on with it.
    Each process of several has its own.

    Args:
        shape: (C, H, W) of the images.
        size: number of images remembered; 0 remembers none.
    """

    images: Tensor
    count: Tensor

    def __init__(self, shape: Sequence[int], size: int = 50) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, fresh: Tensor, rng: Rng) -> Tensor:
        """Take new images (B, C, H, W) in; return as many, new or remembered, in their order."""
        size = len(self.images)
        if not size or not fresh.isfinite().all():  # the loop skips this step: keep nothing of it
            return fresh
        shown = fresh.clone()
        swaps = (rng.uniform() < 0.5).tolist()
        places = rng.integers(size).tolist()
        count = int(self.count)
        for i, (swap, place) in enumerate(zip(swaps, places, strict=True)):
            if count < size:
                self.images[count] = fresh[i]
                count += 1
            elif swap:
                shown[i] = self.images[place]
                self.images[place] = fresh[i]
        self.count.fill_(count)
        return shown


class CycleGAN(Model):
    """Two generators in opposite directions, held together by going there and back.

    Args:
        shape: (C, H, W) of the images.
        a_to_b: maps images of A (B, C, H, W) to images of B: the paper's G.
        b_to_a: maps images of B to images of A: the paper's F.
        critic_a: maps images to scores of any shape (B, ...): does it look like A?
        critic_b: does it look like B?
        cycle: weight of the cycle losses, the paper's lambda.
        identity: weight of the identity losses, as a share of `cycle`.
        history: translations that each critic remembers.
    """

    def __init__(
        self,
        shape: Sequence[int],
        a_to_b: nn.Module,
        b_to_a: nn.Module,
        critic_a: nn.Module,
        critic_b: nn.Module,
        cycle: float = 10.0,
        identity: float = 0.5,
        history: int = 50,
    ) -> None:
        super().__init__()
        if history < 0:
            raise ValueError(f"history is {history}; expected a number of images, or 0 for none")
        self.a_to_b, self.b_to_a = a_to_b, b_to_a
        self.critic_a, self.critic_b = critic_a, critic_b
        self.cycle, self.identity = cycle, identity
        self.history_a, self.history_b = History(shape, history), History(shape, history)

    def phases(self) -> list[Phase]:
        """Return both generators' turn, then both critics'."""
        return [
            Phase("generators", self.generator_loss, [self.a_to_b, self.b_to_a]),
            Phase("critics", self.critic_loss, [self.critic_a, self.critic_b]),
        ]

    def generator_loss(self, batch: Batch) -> Losses:
        """Look like the other domain, and come back to where it began."""
        a, b = _source(batch.condition), batch.image
        fake_b, fake_a = self.a_to_b(a), self.b_to_a(b)
        game = _distance(self.critic_b(fake_b), 1) + _distance(self.critic_a(fake_a), 1)
        cycle = _error(self.b_to_a(fake_b), a) + _error(self.a_to_b(fake_a), b)
        losses = {"game": game.detach(), "cycle": cycle.detach()}
        loss = game + self.cycle * cycle
        if self.identity:
            same = _error(self.a_to_b(b), b) + _error(self.b_to_a(a), a)
            losses["identity"] = same.detach()
            loss = loss + self.cycle * self.identity * same
        return {"loss": loss, **losses}

    def critic_loss(self, batch: Batch) -> Losses:
        """Tell real images from translations, new and remembered."""
        a, b = _source(batch.condition), batch.image
        with torch.no_grad():
            fake_b = self.history_b(self.a_to_b(a).float(), batch.rng)
            fake_a = self.history_a(self.b_to_a(b).float(), batch.rng)
        loss_a = (_distance(self.critic_a(a), 1) + _distance(self.critic_a(fake_a), 0)) / 2
        loss_b = (_distance(self.critic_b(b), 1) + _distance(self.critic_b(fake_b), 0)) / 2
        return {"loss": loss_a + loss_b, "a": loss_a.detach(), "b": loss_b.detach()}

    def sample(self, condition: Condition, rng: Rng, *, direction: str = "a-to-b") -> Tensor:
        """Translate images: nothing is drawn, so the same image always comes out the same.

        Args:
            condition: its source, images of the domain that `direction` starts from.
            rng: not used.
            direction: "a-to-b" or "b-to-a".
        """
        if direction not in DIRECTIONS:
            raise ValueError(f"direction is {direction!r}: use {' or '.join(DIRECTIONS)}")
        network = self.a_to_b if direction == "a-to-b" else self.b_to_a
        return network(_source(condition)).float().clamp(-1, 1)


def _source(condition: Condition) -> Tensor:
    if condition.source is None:
        raise ValueError("CycleGAN translates images: it needs those of domain A as the source")
    return condition.source


def _distance(score: Tensor, target: int) -> Tensor:
    """Return the mean squared distance of scores to `target`."""
    return (score.float() - target).square().mean()


def _error(image: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference."""
    return (image.float() - target).abs().mean()
