"""The space a model works in: `encode(image) -> x`, `decode(x) -> image`.

A codec around a trained model never changes, so what it makes of the training pictures can be
computed once: it has `keep` and `recall` too, and models ask `encoded` for x.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from trilemma.batch import Batch, to_uint8
from trilemma.model import Frozen, Keeps, matching
from trilemma.networks.layers import check_channels, check_shape


class Codec(Protocol):
    """What every codec can do."""

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to x (B, ...)."""
        ...


def encoded(codec: Codec, batch: Batch) -> Tensor:
    """Return x (B, ...) of a training batch: of what was kept of its images, if anything was."""
    if batch.kept is not None and isinstance(codec, Keeps):
        return codec.recall(batch.kept)
    return codec.encode(batch.image)


class Pixels(nn.Module):
    """Pictures as they are.

    Args:
        shape: (C, H, W) of the pictures.
    """

    bounds = (-1.0, 1.0)
    """Between which all of x lies; None where there is no such limit."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def space(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape (C, height, width) of x for pictures of other sides."""
        return self.shape[0], height, width

    def encode(self, image: Tensor) -> Tensor:
        """Return the image (B, C, H, W)."""
        return image

    def decode(self, x: Tensor) -> Tensor:
        """Return x (B, C, H, W) as an image in [-1, 1]."""
        return x.clamp(-1, 1)


class Tokens(nn.Module, ABC):
    """Pictures as sequences of tokens: numbers from 0 up to a vocabulary's size.

    Args:
        shape: (C, H, W) of the pictures.
        vocabulary: how many different tokens there are.
        grid: rows, columns and tokens at each place, which is the order of the sequence too.
    """

    def __init__(self, shape: Sequence[int], vocabulary: int, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape, self.vocabulary, self.grid = tuple(shape), vocabulary, grid
        self.length = math.prod(grid)

    def check(self, image: Tensor) -> None:
        """Raise ValueError when pictures are not of this codec's shape."""
        check_shape("pictures", image, *self.shape)

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to tokens (B, length), int64."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, length) to images (B, C, H, W) in [-1, 1]."""


class PixelTokens(Tokens):
    """A token is the level of one channel of one pixel, channels innermost.

    Args:
        shape: (C, H, W) of the pictures.
        levels: how finely the 256 levels of 8 bits are told apart: a divisor of 256.
    """

    def __init__(self, shape: Sequence[int], levels: int = 256) -> None:
        if not 2 <= levels <= 256 or 256 % levels:
            raise ValueError(f"levels is {levels}; expected 2, 4, 8, ... or 256")
        channels, height, width = shape
        super().__init__(shape, levels, (height, width, channels))
        self.hidden = self.length * math.log(256 / levels)
        """Log of the number of 8-bit pictures behind the same tokens, in nats."""

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to tokens (B, H W C), int64."""
        self.check(image)
        level = to_uint8(image).permute(0, 2, 3, 1).flatten(1).long()
        return level // (256 // self.vocabulary)

    def decode(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, H W C) to images (B, C, H, W): black is 0, white the last."""
        image = tokens / ((self.vocabulary - 1) / 2) - 1
        return image.view(len(tokens), *self.grid).permute(0, 3, 1, 2)


@runtime_checkable
class Tokenizer(Protocol):
    """A model that maps pictures to codes of a codebook and back: a VQ-VAE."""

    codebook_size: int
    code_shape: tuple[int, int]

    def codes(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to codes (B, h, w), int64."""
        ...

    def from_codes(self, codes: Tensor) -> Tensor:
        """Map codes (B, h, w) to images (B, C, H, W) in [-1, 1]."""
        ...


def _small(codes: Tensor, vocabulary: int) -> Tensor:
    """Return codes in as few bytes as they need."""
    return codes.to(torch.int16 if vocabulary <= 2**15 else torch.int32)


class CodeTokens(Tokens):
    """A token is a code of a trained VQ-VAE.

    Args:
        tokenizer: the VQ-VAE; in a recipe `{ type = "trained", path = "runs/vqvae" }`.
        shape: (C, H, W) of the pictures.
    """

    def __init__(self, tokenizer: Frozen, shape: Sequence[int]) -> None:
        model = tokenizer.module
        if not isinstance(model, Tokenizer):
            raise ValueError(
                f"the tokenizer is a trained {type(model).__name__}, which has no codes; "
                "give the run of a VQ-VAE"
            )
        super().__init__(shape, model.codebook_size, (*model.code_shape, 1))
        self.tokenizer = tokenizer

    @property
    def _vqvae(self) -> Tokenizer:
        return cast(Tokenizer, self.tokenizer.module)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to codes (B, h w), int64."""
        self.check(image)
        return self._vqvae.codes(image).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Map codes (B, h w) to images (B, C, H, W) in [-1, 1]."""
        return self._vqvae.from_codes(tokens.view(len(tokens), *self.grid[:2])).clamp(-1, 1)

    def keep(self, image: Tensor) -> Tensor:
        """Return the codes (B, h w) of images (B, C, H, W), in two bytes where that is enough."""
        return _small(self.encode(image), self.vocabulary)

    def recall(self, kept: Tensor) -> Tensor:
        """Return the codes (B, h w), int64."""
        return kept.long()


@runtime_checkable
class FirstStage(Protocol):
    """A model that maps pictures to a grid of vectors and back: an autoencoder with a grid."""

    latent_shape: tuple[int, int, int]

    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to latents (B, D, h, w)."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Map latents (B, D, h, w) to images (B, C, H, W) in [-1, 1]."""
        ...


@runtime_checkable
class Codebook(FirstStage, Protocol):
    """A first stage whose vectors are those of a codebook."""

    codebook_size: int

    def codes(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to codes (B, h, w), int64."""
        ...

    def vectors(self, codes: Tensor) -> Tensor:
        """Look up the vectors (B, D, h, w) of codes (B, h, w)."""
        ...


class Latents(nn.Module):
    """Pictures as the latents of a trained first stage, brought to mean 0 and deviation 1.

        x = (z - mean) / deviation

    Rombach et al. (2022), "High-Resolution Image Synthesis with Latent Diffusion Models", appendix
    G: what draws x starts from noise of deviation 1, and says as much of each step as `diffusion`
    expects only if x is as wide. Mean of each component over pictures and places, one deviation for
    all, so that components keep their proportions; `measure` takes both from the data, once, before
    training. Where latents are Gaussians, z is their mean. Pictures of other sides than those of
    `shape` pass too, where the first stage divides them.

    Args:
        stage: the first stage; in a recipe `{ type = "trained", path = "runs/kl-f4" }`.
        shape: (C, H, W) of the pictures.

    Attributes:
        shape: (D, h, w) of x.
    """

    bounds = None
    mean: Tensor
    deviation: Tensor

    def __init__(self, stage: Frozen, shape: Sequence[int]) -> None:
        super().__init__()
        model = stage.module
        if not isinstance(model, FirstStage):
            raise ValueError(
                f"the first stage is a trained {type(model).__name__}, whose latents are no grid "
                "of vectors; give the run of an AutoencoderKL, a VQGAN or a VQ-VAE"
            )
        self.stage, self.picture = stage, tuple(shape)
        self.shape = tuple(model.latent_shape)
        self.register_buffer("mean", torch.zeros(self.shape[0], 1, 1))
        self.register_buffer("deviation", torch.ones(()))

    def space(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape (D, h, w) of x for pictures of other sides.

        Raises:
            ValueError: the first stage does not divide them.
        """
        factor = self.picture[1] // self.shape[1]
        if height % factor or width % factor:
            raise ValueError(
                f"pictures of {height} x {width} have no latents of a {factor}th of their sides; "
                f"both must be multiples of {factor}"
            )
        return self.shape[0], height // factor, width // factor

    @property
    def _model(self) -> FirstStage:
        return cast(FirstStage, self.stage.module)

    @torch.no_grad()
    def measure(self, images: Iterable[Tensor]) -> None:
        """Take mean and deviation from batches of images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: all latents are alike.
        """
        latent = torch.cat([self._model.encode(image) for image in images]).double()
        mean = latent.mean((0, 2, 3))[:, None, None]
        deviation = (latent - mean).square().mean().sqrt()
        if deviation == 0:
            raise ValueError("the first stage maps all pictures to the same latents; train it")
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to x (B, D, h, w)."""
        check_channels("pictures", image, self.picture[0])
        return self._normal(self._model.encode(image))

    def _normal(self, latent: Tensor) -> Tensor:
        return (latent.float() - self.mean) / self.deviation

    @torch.no_grad()
    def keep(self, image: Tensor) -> Tensor:
        """Return the codes (B, h, w) of images (B, C, H, W), or x (B, D, h, w) in float16."""
        model = self.stage.module
        if isinstance(model, Codebook):
            check_channels("pictures", image, self.picture[0])
            return _small(model.codes(image), model.codebook_size)
        return self.encode(image).half()

    @torch.no_grad()
    def recall(self, kept: Tensor) -> Tensor:
        """Return x (B, D, h, w) of what was kept."""
        model = self.stage.module
        if isinstance(model, Codebook):
            return self._normal(model.vectors(kept.long()))
        return kept.float()

    def decode(self, x: Tensor) -> Tensor:
        """Map x (B, D, h, w) to images (B, C, H, W) in [-1, 1]."""
        return self._model.decode(x * self.deviation + self.mean)


class ClipEmbedding(nn.Module):
    """Pictures as a trained CLIP's embedding of them, which leads back to no picture.

    x is the unit vector times sqrt(D), so that its numbers are about as wide as the noise of
    `diffusion`: Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP
    Latents", section 2.2, draws it.

    Args:
        clip: the CLIP; in a recipe `{ type = "trained", path = "runs/clip" }`.

    Attributes:
        shape: (D,) of x.
    """

    bounds = None

    def __init__(self, clip: Frozen) -> None:
        super().__init__()
        self.clip = clip
        self.shape = (matching(clip).dim,)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to x (B, D)."""
        return matching(self.clip).embed_images(image) * self.shape[0] ** 0.5

    def keep(self, image: Tensor) -> Tensor:
        """Return x (B, D) of images (B, C, H, W), in float16."""
        return self.encode(image).half()

    def recall(self, kept: Tensor) -> Tensor:
        """Return x (B, D) of what was kept."""
        return kept.float()

    def decode(self, x: Tensor) -> Tensor:
        """Map x (B, D) to unit vectors (B, D)."""
        return nn.functional.normalize(x, dim=1)
