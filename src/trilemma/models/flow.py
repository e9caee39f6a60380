"""Normalizing flows: an invertible network, and so the exact likelihood of a picture.

Dinh, Sohl-Dickstein, Bengio (2017), "Density Estimation Using Real NVP"; Kingma, Dhariwal (2018),
"Glow: Generative Flow with Invertible 1x1 Convolutions". A bijection f takes pictures x to latents
z = f(x) of the same number of dimensions D, and by the change of variables (RealNVP, equation 2)

    log p(x) = log N(z; 0, I) + log |det df/dx|.

f is a chain of layers whose log-determinants are easy and add up; after each level of the chain
half of the numbers are done and leave it, the rest go on at half the resolution (RealNVP, 3.6):
`networks.coupling`. Drawing is z ~ N(0, I), x = f^-1(z). At a temperature T the latents are drawn
from N(0, T^2 I), which gives more typical pictures of fewer kinds (Glow, section 6).

Pictures come in 256 levels v, and a density could grow without bound on them. So the flow learns
x = (v + u) / 128 - 1 with u uniform in [0, 1), which fills [-1, 1], and since

    E_u log p(x)  <=  log integral p((v + u) / 128 - 1) du  =  log P(v) + D log 128,

training lowers a bound on the bits per dimension of the pictures themselves: Theis, van den Oord,
Bethge (2016), "A Note on the Evaluation of Generative Models", section 3.1,

    -log p(x) / (D log 2) + log2 128  =  -log p(x) / (D log 2) + 7.

With classes y, the latents of the last level are N(mu_y, diag s_y^2), mu and s learned (Glow's
code): a class has its place in the space of latents, which f and its inverse need not be told.
Without a label, log p(x) is over equally frequent classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng, dequantise
from trilemma.model import Losses, Model, Phase
from trilemma.networks.coupling import MultiScale
from trilemma.networks.layers import check_shape, one_hot

LEVELS = 256


class Flow(Model):
    """A normalizing flow, with a prior for each class where there are any.

    Args:
        network: the bijection.
        classes: number of classes; 0 for none.
    """

    discrete, bound = False, False

    def __init__(self, network: MultiScale, classes: int = 0) -> None:
        super().__init__()
        self.network, self.classes = network, classes
        self.dims = math.prod(network.shape)
        self.prior = nn.Parameter(torch.zeros(classes, 2 * network.top)) if classes else None

    def phases(self) -> list[Phase]:
        """Everything learns together."""
        return [Phase("flow", self.loss, [self])]

    def loss(self, batch: Batch) -> Losses:
        """Bits per dimension of the dequantised pictures, of their class where there are any."""
        image = dequantise(batch.image, batch.rng.uniform(*batch.image.shape[1:]))
        if self.classes:  # says so if a label is missing
            one_hot(batch.condition.label, self.classes, len(batch), image.device)
        nats = self.log_prob(image, batch.condition.label if self.classes else None).mean()
        return {"loss": math.log2(LEVELS / 2) - nats / (self.dims * math.log(2))}

    def log_prob(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Log density (B,) in nats of dequantised pictures in [-1, 1], or of them under a label.

        Args:
            image: (B, C, H, W).
            label: (B,); None for a mixture of all classes in equal parts.

        Raises:
            ValueError: a label that is none of the classes, or pictures of another shape.
        """
        if label is not None and self.classes:  # says so if it is none of them
            one_hot(label, self.classes, len(image), image.device)
        latent, log_det = self._forward(image)
        quiet = -0.5 * math.log(2 * math.pi) * self.dims
        if self.prior is None:
            return quiet - 0.5 * latent.square().sum(1) + log_det
        top, rest = latent[:, : self.network.top], latent[:, self.network.top :]
        rows = self.prior[:, None] if label is None else self.prior[label][None]
        mean, log_scale = rows.chunk(2, dim=-1)  # (K, 1, top), or (1, B, top)
        white = (top - mean) * (-log_scale).exp()
        by_class = -0.5 * white.square().sum(-1) - log_scale.sum(-1)  # (K or 1, B)
        chosen = by_class.logsumexp(0) - math.log(len(by_class))
        return quiet + chosen - 0.5 * rest.square().sum(1) + log_det

    def _forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        check_shape("pictures", image, *self.network.shape)
        return self.network.encode(image)

    def encode(self, image: Tensor) -> Tensor:
        """Map pictures (B, C, H, W) to latents (B, C H W): each level at its cell's middle."""
        return self._forward(dequantise(image, torch.full_like(image, 0.5)))[0]

    def decode(self, latent: Tensor) -> Tensor:
        """Map latents (B, C H W) to pictures (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: the latents are of another shape.
        """
        check_shape("latents", latent, self.dims)
        # From [-1, 1] in 256 cells to 256 levels from -1 to 1: each cell's middle to its level.
        return (self.network(latent) * (LEVELS / (LEVELS - 1))).clamp(-1, 1)

    def sample(self, condition: Condition, rng: Rng, *, temperature: float = 1.0) -> Tensor:
        """Draw latents and map them to pictures.

        Args:
            condition: its label, where the model knows classes.
            rng: one stream per image.
            temperature: scale of the latents' spread; below 1, more typical images of fewer kinds;
                at 0 the most probable latent.
        """
        latent = temperature * rng.normal(self.dims)
        if self.prior is not None:
            one_hot(condition.label, self.classes, condition.count, rng.device)  # is it a class?
            mean, log_scale = self.prior[condition.label].chunk(2, dim=1)
            top, rest = latent[:, : self.network.top], latent[:, self.network.top :]
            latent = torch.cat([mean + log_scale.exp() * top, rest], dim=1)
        return self.decode(latent)
