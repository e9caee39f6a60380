"""Progressive growing: a GAN that learns small pictures first and grows, layer by layer, to size.

Karras, Aila, Laine, Lehtinen (2018), "Progressive Growing of GANs for Improved Quality, Stability,
and Variation". Generator G and critic D begin at 4 to 7 pixels; stage k has twice the side of
stage k - 1, and its layers are faded in by alpha. Where training stands is a function of the images
seen and of two lengths, S images at a stage and F images of fading before it:

    t = seen + F,      k = t div (S + F),      alpha = min(1, (t mod (S + F)) / F)

so stage 0 is trained for S images, stage 1 faded in for F and trained for S, and so on; the full
size is reached after (stages - 1)(S + F) images and kept from then on. With S = F = 0 the networks
have their full size from the start.

Real images x are average-pooled to the size of stage k, and in a fade blended as G's are (figure 2
and its caption); nothing is computed at a size not yet reached:

    x_k = down(x),     x_(k,alpha) = (1 - alpha) up(down(x_k)) + alpha x_k

The game is Gulrajani et al.'s (2017) with one turn of D for one of G and a small term against
drift (appendix A.1):

    D minimises  D(G(z)) - D(x) + w (|grad D(x^)| - 1)^2 + d D(x)^2,     w = 10, d = 0.001
    G minimises  -D(G(z))

All layers that there are at a stage learn. The layers of later stages, and the toRGB and fromRGB of
stages that are over, have no part in the loss and get no gradient (None, not 0), so the optimizer
leaves them and its own record of them as they are; the moments of the others go on through a change
of stage. D compares images within groups of 4: batches, and the parts they are cut into, should be
multiples of 4, and then a loss does not depend on the cutting.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.model import Losses, Model, Phase
from trilemma.models.gan import gradient_penalty
from trilemma.models.inversion import invert, split
from trilemma.networks.layers import one_hot
from trilemma.networks.progan import enlarge


def growth(seen: int, stages: int, stage_images: int, fade_images: int) -> tuple[int, float]:
    """Return the stage, from 0, and its alpha after `seen` images.

    Args:
        seen: training images.
        stages: how many there are.
        stage_images: training at each stage once it is faded in.
        fade_images: fading in of each stage but the first.
    """
    period = stage_images + fade_images
    stage, since = divmod(seen + fade_images, period) if period else (stages, 0)
    if stage >= stages:
        return stages - 1, 1.0
    return stage, since / fade_images if since < fade_images else 1.0


class ProGAN(Model):
    """Generator and critic in alternation, growing.

    The images seen are kept with the weights, so that a model taken in the middle of its growth
    draws at the size it has, each pixel repeated up to the full size.

    Args:
        generator: maps latents (B, D), labels (B, K), stage and alpha to images of that stage;
            tells D as `latent`, K as `classes`, the image's (C, H, W) as `shape` and each stage's
            (height, width) as `sizes`.
        critic: maps such images, labels, stage and alpha to scores (B,).
        stage_images: images of training at each stage.
        fade_images: images over which each stage but the first is faded in.
        weight: of the gradient penalty.
        drift: weight of the squared score of real images.
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        stage_images: int = 10_000,
        fade_images: int = 10_000,
        weight: float = 10.0,
        drift: float = 1e-3,
    ) -> None:
        super().__init__()
        for name, images in (("stage_images", stage_images), ("fade_images", fade_images)):
            if images < 0:
                raise ValueError(f"{name} is {images}: give a number of images, 0 for none")
        self.generator, self.critic = generator, critic
        self.stage_images, self.fade_images = stage_images, fade_images
        self.weight, self.drift = weight, drift
        self.latent: int = generator.latent  # type: ignore[assignment]
        self.classes: int = generator.classes  # type: ignore[assignment]
        self.shape: tuple[int, int, int] = generator.shape  # type: ignore[assignment]
        self.sizes: list[tuple[int, int]] = generator.sizes  # type: ignore[assignment]
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def phases(self) -> list[Phase]:
        """The critic's turn, then the generator's."""
        return [
            Phase("critic", self.critic_loss, [self.critic]),
            Phase("generator", self.generator_loss, [self.generator]),
        ]

    def growth(self, seen: int) -> tuple[int, float]:
        """Return the stage, from 0, and its alpha after `seen` training images."""
        return growth(seen, len(self.sizes), self.stage_images, self.fade_images)

    def shrink(self, image: Tensor, stage: int, alpha: float) -> Tensor:
        """Bring full images (B, C, H, W) to what the critic is shown of them at a stage."""
        (height, width), full = image.shape[2:], self.sizes[-1]
        image = F.pad(image, (0, full[1] - width, 0, full[0] - height), mode="replicate")
        image = F.avg_pool2d(image, 2 ** (len(self.sizes) - 1 - stage))
        if alpha < 1:
            image = torch.lerp(enlarge(F.avg_pool2d(image, 2)), image, alpha)
        return image

    def critic_loss(self, batch: Batch) -> Losses:
        """Score real images high and fake ones low, with a slope of 1 between them."""
        self.seen.fill_(batch.seen)
        stage, alpha = self.growth(batch.seen)
        rng, label = batch.rng, self._label(batch.condition, batch.image.device)
        real = self.shrink(batch.image, stage, alpha)
        with torch.no_grad():
            fake = self.generator(rng.normal(self.latent), label, stage, alpha)

        def critic(image: Tensor) -> Tensor:
            return self.critic(image, label, stage, alpha)

        real_score, fake_score = critic(real), critic(fake)
        with torch.autocast(real.device.type, enabled=False):  # bf16 is too coarse here
            penalty = gradient_penalty(critic, real, fake, rng.uniform()).mean()
        loss = (fake_score - real_score).mean() + self.weight * penalty
        return {
            "loss": loss + self.drift * real_score.square().mean(),
            "side": torch.full((), float(max(self.sizes[stage])), device=loss.device),
            "alpha": torch.full((), alpha, device=loss.device),
            "penalty": penalty.detach(),
            "real": real_score.detach().mean(),
            "fake": fake_score.detach().mean(),
            "ahead": (real_score > fake_score).float().mean(),
        }

    def generator_loss(self, batch: Batch) -> Losses:
        """Score high."""
        stage, alpha = self.growth(batch.seen)
        label = self._label(batch.condition, batch.image.device)
        fake = self.generator(batch.rng.normal(self.latent), label, stage, alpha)
        return {"loss": -self.critic(fake, label, stage, alpha).mean()}

    def sample(self, condition: Condition, rng: Rng) -> Tensor:
        """Draw images, at the stage that training has come to.

        Args:
            condition: its label, where the model knows classes.
            rng: one stream per image.
        """
        label = self._label(condition, rng.device)
        return self._draw(rng.normal(self.latent), label).clamp(-1, 1)

    def _draw(self, latent: Tensor, label: Tensor) -> Tensor:
        """Map latents (B, D) and labels (B, K) to images (B, C, H, W), not clipped."""
        stage, alpha = self.growth(int(self.seen))
        image = self.generator(latent, label, stage, alpha)
        image = enlarge(image, 2 ** (len(self.sizes) - 1 - stage))
        _, height, width = self.shape
        return image[:, :, :height, :width]

    def encode(self, image: Tensor) -> Tensor:
        """Search for the latents, followed by labels, (B, D + K) of images (B, C, H, W)."""
        return invert(self._draw, image, self.latent, self.classes)

    def decode(self, latent: Tensor) -> Tensor:
        """Map latents followed by labels (B, D + K) to images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: latents of another shape.
        """
        return self._draw(*split(latent, self.latent, self.classes)).clamp(-1, 1)

    def _label(self, condition: Condition, device: torch.device) -> Tensor:
        return one_hot(condition.label, self.classes, condition.count, device)
