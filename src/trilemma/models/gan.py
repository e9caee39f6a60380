"""Generative adversarial networks: a generator G and a critic D with opposed aims.

Goodfellow et al. (2014), "Generative Adversarial Nets". D scores images by how real they look, G
maps latents z ~ N(0, I) to images that score high. A GAN here is a game times a penalty times how
the turns alternate; with scores d_r = D(x), d_f = D(G(z)) and softplus s(u) = log(1 + e^u):

    game                D minimises the mean of                  G minimises the mean of
    non-saturating      s(-d_r) + s(d_f)                         s(-d_f)
    least-squares       1/2 (d_r - 1)^2 + 1/2 d_f^2              1/2 (d_f - 1)^2
    hinge               max(0, 1 - d_r) + max(0, 1 + d_f)        -d_f
    wasserstein         d_f - d_r                                -d_f
    relativistic        s(d_f - d_r)                             s(d_r - d_f)

Non-saturating: Goodfellow et al., equation 1 and the remark at the end of section 3; at its
equilibrium D knows nothing, and its loss is 2 log 2, G's log 2. Least squares: Mao et al. (2017),
"Least Squares Generative Adversarial Networks", equation 9. Hinge: Lim, Ye (2017), "Geometric
GAN", equations 14 and 15; Miyato et al. (2018), equations 16 and 17. Wasserstein: Arjovsky,
Chintala, Bottou (2017), "Wasserstein GAN", equation 2; it needs D to be 1-Lipschitz, which `clip`
sees to roughly, keeping every weight of D in [-clip, clip] (algorithm 1), and the gradient penalty
better. Relativistic, each drawn image against a real one: Jolicoeur-Martineau (2018), "The
relativistic discriminator", equations 13 and 14; Huang, Gokaslan, Kuleshov, Tompkin (2024), "The
GAN is dead; long live the GAN! A Modern GAN Baseline", equation 3. No real kind of picture can be
left out at no cost, for each has its own drawn image to keep up with. At equilibrium both lose
log 2.

    penalty             added to D's loss, weight w
    gradient            w E[(|grad D(x^)| - 1)^2], x^ = x + e (G(z) - x), e ~ U(0, 1)
    r1                  w E[|grad D(x)|^2]
    r1+r2               w E[|grad D(x)|^2] + w E[|grad D(G(z))|^2]

Gradient: Gulrajani et al. (2017), "Improved Training of Wasserstein GANs", equation 3. R1 and R2:
Mescheder, Geiger, Nowozin (2018), "Which Training Methods for GANs do actually Converge?",
equations 9 and 10 (their gamma / 2 is our w); Huang et al. prove local convergence of the
relativistic game with both. With `share` below 1 each image enters the penalty with that
probability, by its own stream, and counts 1 / share: an unbiased estimate for less work.

Three ways to keep D from being too sure. Label smoothing (one-sided; Salimans et al. 2016,
"Improved Techniques for Training GANs", section 3.4): D's target for real images is 1 - smooth.
Label noise: each image's real and fake swap roles in D's loss with probability `flip`. Instance
noise (Sonderby et al. 2017, "Amortised MAP Inference for Image Super-resolution", section 3.4;
Arjovsky, Bottou 2017, "Towards Principled Methods for Training Generative Adversarial Networks",
section 3): D sees all images with Gaussian noise, whose deviation falls from `noise` to 0 over
`noise_images` training images. And one for few pictures: `augment`, see networks/augment.py.

Conditional GANs: Mirza, Osindero (2014), "Conditional Generative Adversarial Nets". Both networks
read a label vector beside their input: one-hot classes or, where the data have none, attributes.

From a picture back to a latent the way is a search: models/inversion.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.model import Losses, Model, Phase
from trilemma.models.inversion import invert, split
from trilemma.networks.augment import DRAWN, augment
from trilemma.networks.layers import one_hot

FEW = 5000  # pictures below which augment = "auto" is on


@dataclass(frozen=True)
class Game:
    """What each player minimises: per image, from scores (B,) of real and drawn images.

    Attributes:
        critic: real, fake -> (B,).
        generator: real, fake -> (B,); reads `real` only when `paired`.
        paired: G's loss reads D's scores of real images too.
        boundary: the score between real and fake; None where scores mean something only relative
            to each other.
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    paired: bool = False
    boundary: float | None = 0.0


GAMES = {
    "non-saturating": Game(
        critic=lambda real, fake: F.softplus(-real) + F.softplus(fake),
        generator=lambda real, fake: F.softplus(-fake),
    ),
    "least-squares": Game(
        critic=lambda real, fake: 0.5 * (real - 1).square() + 0.5 * fake.square(),
        generator=lambda real, fake: 0.5 * (fake - 1).square(),
        boundary=0.5,
    ),
    "hinge": Game(
        critic=lambda real, fake: F.relu(1 - real) + F.relu(1 + fake),
        generator=lambda real, fake: -fake,
    ),
    "wasserstein": Game(
        critic=lambda real, fake: fake - real,
        generator=lambda real, fake: -fake,
        boundary=None,
    ),
    "relativistic": Game(
        critic=lambda real, fake: F.softplus(fake - real),
        generator=lambda real, fake: F.softplus(real - fake),
        paired=True,
        boundary=None,
    ),
}
PENALTIES = ("none", "gradient", "r1", "r1+r2")


def gradient_norms(critic: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Return the squared norm (B,) of the gradient of critic(image) (B,) at `image`, in float32.

    The critic runs in the format of the autocast around it: second derivatives are most of a
    penalty's cost, and the sum over pixels, here in float32, evens its rounding out.
    """
    with torch.enable_grad():
        image = image.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
    return gradient.float().flatten(1).square().sum(1)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor
) -> Tensor:
    """Gulrajani et al.'s penalty (B,) between real and fake images, at `share` (B,) of the way."""
    between = real + share[:, None, None, None] * (fake - real)
    # The root has no gradient at 0, which a critic without an opinion reaches.
    return ((gradient_norms(critic, between) + 1e-12).sqrt() - 1).square()


class GAN(Model):
    """Generator and critic in alternation.

    Args:
        generator: maps latents (B, D) and label vectors (B, K) to images; tells D as `latent`, and
            as `classes` and `attributes` what the label vectors are.
        critic: maps images and label vectors to scores (B,).
        game: "non-saturating", "least-squares", "hinge", "wasserstein" or "relativistic".
        penalty: "none", "gradient", "r1" or "r1+r2".
        weight: of the penalty.
        share: of the images, in (0, 1], on which the penalty is taken.
        clip: largest size of the critic's weights; 0 lets them grow.
        critic_steps: steps of the critic for one of the generator.
        smooth: label smoothing, in the non-saturating game only.
        flip: probability that an image's real and fake swap roles.
        noise: deviation of the instance noise at the start.
        noise_images: training images after which it is gone.
        augment: "on", "off", or "auto": on below 5,000 training pictures.
        count: of training pictures, for "auto".
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        game: str = "non-saturating",
        penalty: str = "none",
        weight: float = 10.0,
        share: float = 1.0,
        clip: float = 0.0,
        critic_steps: int = 1,
        smooth: float = 0.0,
        flip: float = 0.0,
        noise: float = 0.0,
        noise_images: int = 500_000,
        augment: str = "off",
        count: int = 0,
    ) -> None:
        super().__init__()
        if game not in GAMES:
            raise ValueError(f"game is {game!r}: use one of {', '.join(GAMES)}")
        if penalty not in PENALTIES:
            raise ValueError(f"penalty is {penalty!r}: use one of {', '.join(PENALTIES)}")
        if augment not in ("on", "off", "auto"):
            raise ValueError(f"augment is {augment!r}: use 'on', 'off' or 'auto'")
        if smooth and game != "non-saturating":
            raise ValueError("label smoothing belongs to the non-saturating game: set smooth = 0")
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}: give a share of the images, above 0 and up to 1")
        self.generator, self.critic = generator, critic
        self.game, self.penalty, self.weight, self.share = GAMES[game], penalty, weight, share
        self.clip, self.critic_steps, self.smooth, self.flip = clip, critic_steps, smooth, flip
        self.noise, self.noise_images = noise, noise_images
        self.augment = augment == "on" or (augment == "auto" and count < FEW)
        self.latent: int = generator.latent  # type: ignore[assignment]
        self.classes: int = generator.classes  # type: ignore[assignment]
        self.attributes: int = generator.attributes  # type: ignore[assignment]

    def phases(self) -> list[Phase]:
        """The critic's turn at every step, then the generator's at every `critic_steps`-th."""
        after = self.clip_weights if self.clip else None
        return [
            Phase("critic", self.critic_loss, [self.critic], after=after),
            Phase("generator", self.generator_loss, [self.generator], every=self.critic_steps),
        ]

    @torch.no_grad()
    def clip_weights(self) -> None:
        """Bring every weight of the critic back into [-clip, clip]."""
        for parameter in self.critic.parameters():
            parameter.clamp_(-self.clip, self.clip)

    def _label(self, condition: Condition, device: torch.device) -> Tensor:
        """Return the label vectors (B, K): classes or, where there are none, attributes."""
        if self.classes or not self.attributes:
            return one_hot(condition.label, self.classes, condition.count, device)
        given = condition.attributes
        if given is None or given.shape[1] != self.attributes:
            seen = "none" if given is None else f"{given.shape[1]}"
            raise ValueError(f"this model reads {self.attributes} attributes; {seen} were given")
        return given

    def _seen(self, image: Tensor, batch: Batch) -> Tensor:
        """Return images as the critic sees them: augmented, and under instance noise."""
        if self.augment:
            image = augment(image, batch.rng.uniform(DRAWN))
        deviation = self.noise * max(0.0, 1.0 - batch.seen / self.noise_images)
        if deviation:
            image = image + deviation * batch.rng.normal(*image.shape[1:])
        return image

    def critic_loss(self, batch: Batch) -> Losses:
        """Tell real from fake."""
        rng, label = batch.rng, self._label(batch.condition, batch.image.device)
        with torch.no_grad():
            fake = self.generator(rng.normal(self.latent), label).float()
        image, fake = self._seen(batch.image, batch), self._seen(fake, batch)
        real_score, fake_score = self.critic(image, label), self.critic(fake, label)
        losses = {"real": real_score.detach().mean(), "fake": fake_score.detach().mean()}
        if self.game.boundary is None:
            losses["ahead"] = (real_score > fake_score).float().mean()
        else:
            known = (real_score > self.game.boundary).float().mean()
            losses["correct"] = (known + (fake_score < self.game.boundary).float().mean()) / 2
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
            # All images, or each with probability `share`: whatever part of the batch it came in.
            chosen = slice(None) if self.share == 1 else rng.uniform() < self.share
            at, told = image[chosen], label[chosen]
            if self.penalty == "gradient":
                way = rng.uniform()[chosen]
                penalty = gradient_penalty(lambda x: self.critic(x, told), at, fake[chosen], way)
            else:
                if self.penalty == "r1+r2":  # both in one pass
                    at, told = torch.cat([at, fake[chosen]]), torch.cat([told, told])
                penalty = gradient_norms(lambda x: self.critic(x, told), at)
            penalty = penalty.sum() / (self.share * len(image))
            losses["penalty"] = penalty.detach()
            loss = loss + self.weight * penalty
        return {"loss": loss, **losses}

    def generator_loss(self, batch: Batch) -> Losses:
        """Look real."""
        rng, label = batch.rng, self._label(batch.condition, batch.image.device)
        fake = self._seen(self.generator(rng.normal(self.latent), label), batch)
        score = self.critic(fake, label)
        real = self.critic(self._seen(batch.image, batch), label) if self.game.paired else score
        return {"loss": self.game.generator(real, score).mean()}

    def sample(self, condition: Condition, rng: Rng, *, temperature: float = 1.0) -> Tensor:
        """Draw images; a temperature below 1 shrinks latents: safer pictures, fewer kinds.

        Args:
            condition: its label or attributes, where the model knows any.
            rng: one stream per image.
            temperature: scale of the latents.
        """
        label = self._label(condition, rng.device)
        latent = temperature * rng.normal(self.latent)
        return self.generator(latent, label).float().clamp(-1, 1)

    def encode(self, image: Tensor) -> Tensor:
        """Search for the latents, followed by label vectors, (B, D + K) of images (B, C, H, W)."""
        return invert(self.generator, image, self.latent, self.classes, self.attributes)

    def decode(self, latent: Tensor) -> Tensor:
        """Map latents followed by label vectors (B, D + K) to images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: latents of another shape.
        """
        parts = split(latent, self.latent, self.classes, self.attributes)
        return self.generator(*parts).float().clamp(-1, 1)
