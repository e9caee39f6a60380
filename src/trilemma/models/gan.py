"""Generative adversarial networks: a generator G and a critic D with opposed aims.

Goodfellow et al. (2014), "Generative Adversarial Nets". D scores images by how real they look, G
maps latents z ~ N(0, I) to images that score high. A GAN here is a game times a penalty times how
the turns alternate; with logits d_r = D(x), d_f = D(G(z)) and softplus s(u) = log(1 + e^u):

    game                D minimises the mean of                  G minimises the mean of
    non-saturating      s(-d_r) + s(d_f)                         s(-d_f)
    hinge               max(0, 1 - d_r) + max(0, 1 + d_f)        -d_f
    wasserstein         d_f - d_r                                -d_f

Non-saturating: Goodfellow et al., equation 1 and the remark at the end of section 3; at its
equilibrium D knows nothing, and its loss is 2 log 2, G's log 2. Hinge: Lim, Ye (2017), "Geometric
GAN", equations 14 and 15; Miyato et al. (2018), equations 16 and 17. Wasserstein: Arjovsky,
Chintala, Bottou (2017), "Wasserstein GAN", equation 2; it needs D to be 1-Lipschitz.

    penalty             added to D's loss, weight w
    gradient            w E[(|grad D(x^)| - 1)^2], x^ = x + e (G(z) - x), e ~ U(0, 1)
    r1                  w E[|grad D(x)|^2]

Gradient: Gulrajani et al. (2017), "Improved Training of Wasserstein GANs", equation 3. R1:
Mescheder, Geiger, Nowozin (2018), "Which Training Methods for GANs do actually Converge?",
equation 9 (their gamma / 2 is our w). `share` takes the penalty on that share of the batch only:
an unbiased estimate for less work.

Label smoothing (one-sided; Salimans et al. 2016, "Improved Techniques for Training GANs", section
3.4): D's target for real images is 1 - smooth. Label noise: each image's real and fake swap roles
in D's loss with probability `flip`. `shift` moves real and fake images alike by up to that share
of their side before D sees them, so that D cannot learn few images by heart (translation of Zhao et
al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training", with the border repeated).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.model import Losses, Model, Phase
from trilemma.networks.layers import one_hot


@dataclass(frozen=True)
class Game:
    """What each player minimises: per image, from scores (B,)."""

    critic: Callable[[Tensor, Tensor], Tensor]  # real, fake -> (B,)
    generator: Callable[[Tensor], Tensor]  # fake -> (B,)


GAMES = {
    "non-saturating": Game(
        critic=lambda real, fake: F.softplus(-real) + F.softplus(fake),
        generator=lambda fake: F.softplus(-fake),
    ),
    "hinge": Game(
        critic=lambda real, fake: F.relu(1 - real) + F.relu(1 + fake),
        generator=lambda fake: -fake,
    ),
    "wasserstein": Game(
        critic=lambda real, fake: fake - real,
        generator=lambda fake: -fake,
    ),
}


def gradient_norms(critic: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Return the squared norm (B,) of the gradient of critic(image) (B,) at `image`, in float32."""
    with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
        image = image.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
    return gradient.flatten(1).square().sum(1)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor
) -> Tensor:
    """Gulrajani et al.'s penalty (B,) between real and fake images, at `share` (B,) of the way."""
    between = real + share[:, None, None, None] * (fake - real)
    # The root has no gradient at 0, which a critic without an opinion reaches.
    return ((gradient_norms(critic, between) + 1e-12).sqrt() - 1).square()


def translate(image: Tensor, rng: Rng, reach: float) -> Tensor:
    """Move each image (B, C, H, W) by up to `reach` of its sides, repeating the border."""
    for axis in (2, 3):
        size = image.shape[axis]
        limit = round(reach * size)
        offset = rng.integers(2 * limit + 1) - limit  # (B,)
        source = (torch.arange(size, device=image.device) + offset[:, None]).clamp(0, size - 1)
        index = source.view(len(image), 1, *((size, 1) if axis == 2 else (1, size)))
        image = image.gather(axis, index.expand_as(image))
    return image


class GAN(Model):
    """Generator and critic in alternation.

    Args:
        generator: maps latents (B, D) and labels (B, K) to images; tells D as `latent` and K as
            `classes`.
        critic: maps images and labels to scores (B,).
        game: "non-saturating", "hinge" or "wasserstein".
        penalty: "none", "gradient" or "r1".
        weight: of the penalty.
        share: of each batch on which the penalty is taken.
        critic_steps: steps of the critic for one of the generator.
        smooth: label smoothing, in the non-saturating game only.
        flip: probability that an image's real and fake swap roles.
        shift: greatest translation seen by the critic, as a share of the side.
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        game: str = "non-saturating",
        penalty: str = "none",
        weight: float = 10.0,
        share: float = 1.0,
        critic_steps: int = 1,
        smooth: float = 0.0,
        flip: float = 0.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        if game not in GAMES:
            raise ValueError(f"game is {game!r}: use one of {', '.join(GAMES)}")
        if penalty not in ("none", "gradient", "r1"):
            raise ValueError(f"penalty is {penalty!r}: use 'none', 'gradient' or 'r1'")
        if smooth and game != "non-saturating":
            raise ValueError("label smoothing belongs to the non-saturating game: set smooth = 0")
        self.generator, self.critic = generator, critic
        self.game, self.penalty, self.weight, self.share = GAMES[game], penalty, weight, share
        self.critic_steps, self.smooth, self.flip, self.shift = critic_steps, smooth, flip, shift
        self.latent: int = generator.latent  # type: ignore[assignment]
        self.classes: int = generator.classes  # type: ignore[assignment]

    def phases(self) -> list[Phase]:
        """The critic's turn at every step, then the generator's at every `critic_steps`-th."""
        return [
            Phase("critic", self.critic_loss, [self.critic]),
            Phase("generator", self.generator_loss, [self.generator], every=self.critic_steps),
        ]

    def _label(self, condition: Condition, device: torch.device) -> Tensor:
        return one_hot(condition.label, self.classes, condition.count, device)

    def _seen(self, image: Tensor, rng: Rng) -> Tensor:
        return translate(image, rng, self.shift) if self.shift else image

    def critic_loss(self, batch: Batch) -> Losses:
        """Tell real from fake."""
        rng, label = batch.rng, self._label(batch.condition, batch.image.device)
        with torch.no_grad():
            fake = self.generator(rng.normal(self.latent), label).float()
        image, fake = self._seen(batch.image, rng), self._seen(fake, rng)
        real_score, fake_score = self.critic(image, label), self.critic(fake, label)
        losses = {"real": real_score.detach().mean(), "fake": fake_score.detach().mean()}
        losses["correct"] = ((real_score > 0).float().mean() + (fake_score < 0).float().mean()) / 2
        if self.flip:
            swap = rng.uniform() < self.flip
            real_score, fake_score = (
                torch.where(swap, fake_score, real_score),
                torch.where(swap, real_score, fake_score),
            )
        loss = self.game.critic(real_score, fake_score).mean()
        if self.smooth:
            # Cross-entropy with target 1 - smooth: s(-u) + smooth * u.
            loss = loss + self.smooth * real_score.mean()
        if self.penalty != "none":
            count = max(1, round(self.share * len(image)))

            def critic(x: Tensor) -> Tensor:
                return self.critic(x, label[:count])

            if self.penalty == "r1":
                penalty = gradient_norms(critic, image[:count]).mean()
            else:
                way = rng.uniform()[:count]
                penalty = gradient_penalty(critic, image[:count], fake[:count], way).mean()
            losses["penalty"] = penalty.detach()
            loss = loss + self.weight * penalty
        return {"loss": loss, **losses}

    def generator_loss(self, batch: Batch) -> Losses:
        """Look real."""
        rng, label = batch.rng, self._label(batch.condition, batch.image.device)
        fake = self.generator(rng.normal(self.latent), label)
        score = self.critic(self._seen(fake, rng), label)
        return {"loss": self.game.generator(score).mean()}

    def sample(self, condition: Condition, rng: Rng, *, temperature: float = 1.0) -> Tensor:
        """Draw images; a temperature below 1 shrinks latents: safer pictures, fewer kinds.

        Args:
            condition: its label, where the model knows classes.
            rng: one stream per image.
            temperature: scale of the latents.
        """
        label = self._label(condition, rng.device)
        latent = temperature * rng.normal(self.latent)
        return self.generator(latent, label).float().clamp(-1, 1)
