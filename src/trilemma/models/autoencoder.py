"""Autoencoders: AE, and the variational autoencoder with its bound on the likelihood.

AE: Hinton, Salakhutdinov (2006), "Reducing the Dimensionality of Data with Neural Networks". An
encoder and a decoder that minimise the squared error of decode(encode(x)). It is no generator by
itself; a Gaussian fitted to its latents makes it one (Ghosh et al. 2020, "From Variational to
Deterministic Autoencoders", section 4). Shown pictures under noise that it must leave out, it
learns to take noise from pictures: Vincent, Larochelle, Bengio, Manzagol (2008), "Extracting and
Composing Robust Features with Denoising Autoencoders", section 2.3, here with Gaussian noise.

VAE: Kingma, Welling (2013), "Auto-Encoding Variational Bayes". z ~ N(0, I), x ~ p(x | z), and the
encoder is a Gaussian q(z | x) = N(mu, diag s^2), trained to maximise the bound (equation 3)

    log p(x)  >=  E_q[log p(x | z)]  -  KL(q(z | x) || N(0, I)),

    KL = 1/2 sum_j (mu_j^2 + s_j^2 - 1 - log s_j^2)                               (appendix B)

with z = mu + s e, e ~ N(0, I). `beta` weights the KL: Higgins et al. (2017), "beta-VAE: Learning
Basic Visual Concepts with a Constrained Variational Framework", equation 4. It may rise from 0 over
the first `warmup` images, lest the latents be given up early: Bowman et al. (2016), "Generating
Sentences from a Continuous Space", section 3.1; Sonderby et al. (2016). To the same end, each
latent may hold `free_bits` of information without being pressed: its KL_j counts as

    max(free_bits, KL_j),    KL_j of one latent of one image, in nats.

Kingma et al. (2016), "Improved Variational Inference with Inverse Autoregressive Flow", appendix
C.8, take the maximum after averaging KL_j over the minibatch; here it is taken image by image, so
that the loss does not depend on how the batch is split. log p(x | z) is one of three likelihoods:
`models.likelihoods`.

With classes, both halves are told the label y, and each class has its own prior p(z | y), a
diagonal Gaussian that learns with the rest: Sohn, Lee, Yan (2015), "Learning Structured Output
Representation using Deep Conditional Generative Models", equation 4. (Under one prior for all, the
latents tell the class, the decoder ignores its label, and samples mix the classes.) The bound is
then on log p(x | y). Without a label, log p(x) is over equally frequent classes, and a latent is
followed by the class that explains the image best, as a one-hot row: `decode(encode(x))` needs
nothing else.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.model import Losses, Model, Phase
from trilemma.models.likelihoods import LIKELIHOODS
from trilemma.networks.layers import check_shape, one_hot


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor
) -> Tensor:
    """KL of one diagonal Gaussian from another, the prior: (B, D) nats, one for each latent."""
    spread = (log_variance - prior_log_variance).exp()
    distance = (mean - prior_mean).square() * (-prior_log_variance).exp()
    return 0.5 * (spread + distance - 1 + prior_log_variance - log_variance)


class AE(Model):
    """A deterministic autoencoder; samples come from a Gaussian fitted to its latents.

    The Gaussian is the running mean and covariance of the latents of training images, kept as
    buffers and forgotten by half every `halflife` images: nothing in it is random.

    Args:
        encoder: maps images and (empty) labels to latents (B, D).
        decoder: maps latents and labels to images.
        latent: D.
        halflife: of the running moments, in images.
        corruption: deviation of the noise on the pictures it is shown in training, on the scale of
            [-1, 1], where noisy pictures are kept as in a file of 8 bits.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent: int,
        halflife: float = 10_000,
        corruption: float = 0.0,
    ) -> None:
        super().__init__()
        if corruption < 0:
            raise ValueError(f"corruption is {corruption}: expected a deviation, 0 for none")
        self.encoder, self.decoder, self.halflife = encoder, decoder, halflife
        self.latent, self.corruption = latent, corruption
        self.first_moment: Tensor
        self.second_moment: Tensor
        self.weight: Tensor
        self.register_buffer("first_moment", torch.zeros(latent))
        self.register_buffer("second_moment", torch.zeros(latent, latent))
        self.register_buffer("weight", torch.zeros(()))

    def phases(self) -> list[Phase]:
        """Encoder and decoder learn together."""
        return [Phase("autoencoder", self.loss, [self.encoder, self.decoder])]

    def loss(self, batch: Batch) -> Losses:
        """Squared error of the restored picture, a mean over pixels."""
        image = batch.image
        if self.corruption:
            image = (image + self.corruption * batch.rng.normal(*image.shape[1:])).clamp(-1, 1)
        latent = self.encode(image)
        self._remember(latent.detach())
        return {"loss": F.mse_loss(self.decoder(latent, latent[:, :0]), batch.image)}

    @torch.no_grad()
    def _remember(self, latent: Tensor) -> None:
        keep = 0.5 ** (len(latent) / self.halflife)
        self.first_moment.lerp_(latent.mean(0), 1 - keep)
        # Not a matrix product: autocast would round it.
        self.second_moment.lerp_((latent[:, :, None] * latent[:, None, :]).mean(0), 1 - keep)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - keep)

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to latents (B, D)."""
        return self.encoder(image, image.new_zeros(len(image), 0))

    def decode(self, latent: Tensor) -> Tensor:
        """Map latents (B, D) to images (B, C, H, W); raises ValueError for others."""
        check_shape("latents", latent, self.latent)
        return self.decoder(latent, latent[:, :0]).clamp(-1, 1)

    def sample(self, condition: Condition, rng: Rng, *, temperature: float = 1.0) -> Tensor:
        """Draw images from the Gaussian of the latents seen in training.

        Args:
            condition: only its count is used.
            rng: one stream per image.
            temperature: scale of the deviation from the mean latent.
        """
        weight = self.weight.clamp(min=1e-12)
        mean = self.first_moment / weight
        covariance = self.second_moment / weight - mean[:, None] * mean
        values, vectors = torch.linalg.eigh(covariance.float())
        root = vectors * values.clamp(min=0).sqrt()  # root root^T = covariance
        noise = rng.normal(len(mean))  # (B, D)
        return self.decode(mean + temperature * (root * noise[:, None, :]).sum(2))


class VAE(Model):
    """A variational autoencoder, conditional on classes where there are any.

    Args:
        encoder: maps images (B, C, H, W) and labels (B, K) to (B, 2 D): mean and log-variance.
        decoder: maps latents (B, D) and labels to (B, C, H, W).
        latent: D.
        classes: K, 0 for none.
        likelihood: "gaussian", "bernoulli" or "discretized-logistic".
        beta: weight of the KL.
        warmup: images over which the weight rises from 0 to beta.
        free_bits: nats of each latent that the KL does not press.

    Attributes:
        discrete: whether `log_prob` is of the 8-bit picture rather than a density on [-1, 1].
    """

    discrete, bound = False, True

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent: int,
        classes: int = 0,
        likelihood: str = "gaussian",
        beta: float = 1.0,
        warmup: int = 0,
        free_bits: float = 0.0,
    ) -> None:
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood is {likelihood!r}: use one of {', '.join(LIKELIHOODS)}")
        if free_bits < 0:
            raise ValueError(f"free_bits is {free_bits}: expected nats per latent, 0 or more")
        self.encoder, self.decoder = encoder, decoder
        self.latent, self.classes, self.likelihood = latent, classes, LIKELIHOODS[likelihood]
        self.beta, self.warmup, self.free_bits = beta, warmup, free_bits
        self.discrete = self.likelihood.discrete
        self.prior = nn.Linear(classes, 2 * latent, bias=False) if classes else None
        if self.prior is not None:
            nn.init.zeros_(self.prior.weight)
        self.log_scale = torch.zeros(())  # read by no likelihood without a scale
        if self.likelihood.start is not None:
            self.log_scale = nn.Parameter(torch.tensor(self.likelihood.start))

    def phases(self) -> list[Phase]:
        """Everything learns together."""
        return [Phase("vae", self.loss, [self])]

    def loss(self, batch: Batch) -> Losses:
        """The negative bound in nats per pixel and channel, its KL weighted."""
        label = one_hot(batch.condition.label, self.classes, len(batch), batch.image.device)
        mean, log_variance = self._posterior(batch.image, label)
        latent = mean + (0.5 * log_variance).exp() * batch.rng.normal(self.latent)
        output = self.decoder(latent, label).float()
        fit = self.likelihood.fit(batch.image, output, self.log_scale).mean()
        kl = gaussian_kl(mean, log_variance, *self._prior(label))  # (B, D)
        pressed = kl.clamp(min=self.free_bits).sum(1).mean()
        beta = self.beta * min(1.0, batch.seen / self.warmup) if self.warmup else self.beta
        dims = batch.image[0].numel()
        losses = {"loss": (beta * pressed - fit) / dims, "fit": fit.detach()}
        losses["kl"] = kl.detach().sum(1).mean()
        if self.likelihood.start is not None:
            losses["scale"] = self.log_scale.detach().exp()
        return losses

    def _posterior(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(image, label).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 8)

    def _prior(self, label: Tensor) -> tuple[Tensor, Tensor]:
        if self.prior is None:
            zero = label.new_zeros(len(label), self.latent)
            return zero, zero
        mean, log_variance = self.prior(label).float().chunk(2, dim=1)
        return mean, log_variance

    def _bound(self, image: Tensor, label: Tensor, noise: Tensor) -> Tensor:
        """Log p(x | z) + log p(z | y) - log q(z | x) at the z that `noise` (B, D) makes."""
        prior_mean, prior_log_variance = self._prior(label)
        mean, log_variance = self._posterior(image, label)
        latent = mean + (0.5 * log_variance).exp() * noise
        from_prior = (latent - prior_mean).square() * (-prior_log_variance).exp()
        ratio = 0.5 * (noise.square() + log_variance - from_prior - prior_log_variance).sum(1)
        output = self.decoder(latent, label).float()
        return self.likelihood.log_prob(image, output, self.log_scale) + ratio

    @torch.no_grad()
    def log_prob(self, image: Tensor, label: Tensor | None = None, draws: int = 16) -> Tensor:
        """Bound log p(image), or log p(image | label), from below, in nats (B,).

        The importance-weighted bound of Burda et al. (2016), "Importance Weighted Autoencoders",
        equation 8; it tightens with `draws`. The noise is fixed: the same image, the same number.
        Bits per dimension, for C H W = D, are -log_prob / (D log 2) of 8-bit images if `discrete`,
        else -log_prob / (D log 2) - log2(w) of dequantised ones whose levels are w wide on [-1, 1].
        """
        rng = Rng(torch.zeros(len(image), dtype=torch.int64), image.device)
        if label is not None or not self.classes:
            rows = [one_hot(label, self.classes, len(image), image.device)]
        else:
            rows = [self._row(k, image) for k in range(self.classes)]
        noises = [rng.normal(self.latent) for _ in range(draws)]
        bounds = [self._bound(image, row, noise) for row in rows for noise in noises]
        return torch.stack(bounds).logsumexp(0) - math.log(len(bounds))

    def _row(self, label: int, image: Tensor) -> Tensor:
        labels = torch.full((len(image),), label, device=image.device)
        return one_hot(labels, self.classes, len(image), image.device)

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) to (B, D + K): the mean latent, then the likeliest class."""
        rows = [self._row(k, image) for k in range(self.classes)] or [
            image.new_zeros(len(image), 0)
        ]
        quiet = image.new_zeros(len(image), self.latent)
        bounds = torch.stack([self._bound(image, row, quiet) for row in rows])  # (K or 1, B)
        best = bounds.argmax(0)
        label = torch.stack(rows)[best, torch.arange(len(image), device=image.device)]
        return torch.cat([self._posterior(image, label)[0], label], dim=1)

    def decode(self, latent: Tensor) -> Tensor:
        """Map (B, D + K), latents and class shares, to the mean images (B, C, H, W).

        Shares are brought to a sum of 1, those below 0 to 0: walks and sums of latents are latents.

        Raises:
            ValueError: latents of another shape.
        """
        check_shape("latents", latent, self.latent + self.classes)
        shares = latent[:, self.latent :].clamp(min=0)
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1e-6)
        output = self.decoder(latent[:, : self.latent], shares).float()
        return self.likelihood.mean(output)

    def sample(self, condition: Condition, rng: Rng, *, temperature: float = 1.0) -> Tensor:
        """Draw latents and return the mean image of each.

        Args:
            condition: its label, where the model knows classes.
            rng: one stream per image.
            temperature: scale of the latents' spread; below 1, more typical images of fewer kinds.
        """
        label = one_hot(condition.label, self.classes, condition.count, rng.device)
        mean, log_variance = self._prior(label)
        latent = mean + temperature * (0.5 * log_variance).exp() * rng.normal(self.latent)
        return self.decode(torch.cat([latent, label], dim=1))
