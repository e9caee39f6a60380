"""The generator and critic of DCGAN, for pictures of any size from 8 pixels.

Radford, Metz, Chintala (2015), "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks", section 3: strided convolutions in place of pooling, batch
normalisation in both networks but at the generator's output and the critic's input, ReLU in the
generator with tanh at its end, LeakyReLU(0.2) in the critic, weights drawn from N(0, 0.02).

`channels` is the width beside the image; it doubles with each halving of the side. The side next
to the latent is 4 to 7 pixels; a size that does not halve evenly is rounded up and cropped.

Label vectors (B, K) are one-hot classes or, where there are no classes, attributes; K may be 0. The
generator has them concatenated to the latent, so the first layer's columns for them are their
embedding. The critic reads them in one of two ways. "channels": Mirza, Osindero (2014),
"Conditional Generative Adversarial Nets", section 3.2, as its input's further channels, constant
over the image (as Radford et al.'s convolutions need it). "projection": Miyato, Koyama (2018),
"cGANs with Projection Discriminator", equation 6, f(x, y) = y' V phi(x) + psi(phi(x)).

Critic normalisations: "batch"; "none"; "layer", Ba et al. (2016), which WGAN-GP needs as its
penalty is per image; "spectral", Miyato et al. (2018), "Spectral Normalization for Generative
Adversarial Networks", equation 8, every layer divided by its largest singular value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from trilemma.networks.layers import halvings


def _initialise(network: nn.Module) -> None:
    """Draw weights as DCGAN does."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)


class Generator(nn.Module):
    """Maps latents to images.

    Args:
        shape: (C, H, W) of the image.
        latent: length of the latent vector.
        channels: width of the layer before the image.
        classes: number of classes, 0 for none.
        attributes: number of attributes, read where there are no classes.
    """

    def __init__(
        self,
        shape: Sequence[int],
        latent: int = 100,
        channels: int = 64,
        classes: int = 0,
        attributes: int = 0,
    ) -> None:
        super().__init__()
        image_channels, *self.size = shape
        self.latent, self.classes, self.attributes = latent, classes, attributes
        times, _ = halvings(max(self.size))
        base = [-(-side // 2**times) for side in self.size]
        widths = [channels * 2**i for i in reversed(range(times))]
        layers: list[nn.Module] = [
            nn.Linear(latent + (classes or attributes), widths[0] * base[0] * base[1], bias=False),
            nn.Unflatten(1, (widths[0], *base)),
        ]
        for width, wider in zip(widths, [*widths[1:], image_channels], strict=True):
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.ConvTranspose2d(width, wider, 4, 2, 1, bias=wider == image_channels)]
        self.layers = nn.Sequential(*layers, nn.Tanh())
        _initialise(self)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        """Map latents (B, D) and labels (B, K) to images (B, C, H, W) in [-1, 1]."""
        image = self.layers(torch.cat([latent, label], dim=1))
        return image[:, :, : self.size[0], : self.size[1]]


class Critic(nn.Module):
    """Maps images to one number each: how real they look.

    Args:
        shape: (C, H, W) of the image.
        channels: width of the layer after the image.
        classes: number of classes, 0 for none.
        attributes: number of attributes, read where there are no classes.
        labels: "projection" or "channels": how label vectors are read.
        norm: "batch", "layer", "spectral" or "none".
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 64,
        classes: int = 0,
        attributes: int = 0,
        labels: str = "projection",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if labels not in ("projection", "channels"):
            raise ValueError(f"labels is {labels!r}: use 'projection' or 'channels'")
        if norm not in ("batch", "layer", "spectral", "none"):
            raise ValueError(f"norm is {norm!r}: use 'batch', 'layer', 'spectral' or 'none'")
        image_channels, *size = shape
        known = classes or attributes
        self.as_channels = labels == "channels"
        times, _ = halvings(max(size))
        layers: list[nn.Module] = []
        before = image_channels + (known if self.as_channels else 0)
        for i in range(times):
            width = channels * 2**i
            size = [side // 2 for side in size]
            layers.append(nn.Conv2d(before, width, 4, 2, 1, bias=i == 0 or norm != "batch"))
            if i > 0 and norm == "batch":
                layers.append(nn.BatchNorm2d(width))
            if i > 0 and norm == "layer":
                layers.append(nn.GroupNorm(1, width))
            layers.append(nn.LeakyReLU(0.2))
            before = width
        self.layers = nn.Sequential(*layers, nn.Flatten())
        features = before * size[0] * size[1]
        self.score = nn.Linear(features, 1)
        projects = known > 0 and not self.as_channels
        self.project = nn.Linear(known, features, bias=False) if projects else None
        _initialise(self)
        if norm == "spectral":
            for module in list(self.modules()):
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    spectral_norm(module)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        """Map images (B, C, H, W) and labels (B, K) to scores (B,)."""
        if self.as_channels:
            planes = label[:, :, None, None].expand(-1, -1, *image.shape[2:])
            image = torch.cat([image, planes.to(image.dtype)], dim=1)  # (B, C + K, H, W)
        feature = self.layers(image)  # (B, F)
        score = self.score(feature)[:, 0]
        if self.project is not None:
            score = score + (feature * self.project(label)).sum(1)
        return score.float()
