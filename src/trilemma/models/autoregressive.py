"""Autoregressive models: a picture's probability as a product, one value given those before it.

    log p(x | y) = sum_i log p(x_i | x_1, ..., x_{i-1}, y),      i in raster order, y the class,

is exact, and sampling draws one value after the other.

PixelCNN: van den Oord et al. (2016), "Conditional Image Generation with PixelCNN Decoders", with
the likelihood of PixelCNN++, a mixture of discretized logistic distributions: `models.mixture`.

Transformer: logits for every token, as Chen et al. (2020), "Generative Pretraining from Pixels", do
with pixels, and Esser, Rombach, Ommer (2021), "Taming Transformers for High-Resolution Image
Synthesis", with the codes of a VQ-VAE. The class stands in front of the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng, to_float, to_uint8
from trilemma.codecs import PixelTokens, Tokens, encoded
from trilemma.model import Losses, Model, Phase
from trilemma.models.mixture import LogisticMixture, draw
from trilemma.networks.layers import check_shape, one_hot
from trilemma.networks.pixelcnn import Memory
from trilemma.networks.pixelcnn import PixelCNN as PixelNetwork
from trilemma.networks.transformer import Cache, CausalTransformer


class PixelCNN(Model):
    """A PixelCNN with a discretized logistic mixture, by class where there are any.

    Args:
        shape: (C, H, W) of the pictures.
        network: features of each pixel from those before it.
        classes: K, 0 for none.
        mixtures: components of each pixel's distribution.
    """

    discrete, bound = True, False

    def __init__(
        self, shape: list[int], network: PixelNetwork, classes: int = 0, mixtures: int = 10
    ) -> None:
        super().__init__()
        self.shape, self.network, self.classes = tuple(shape), network, classes
        outputs = mixtures * sum(LogisticMixture.parameters(shape[0]))
        self.head = nn.Conv2d(network.width, outputs, 1)

    def phases(self) -> list[Phase]:
        """Everything learns together."""
        return [Phase("likelihood", self.loss, [self.network, self.head])]

    def loss(self, batch: Batch) -> Losses:
        """The negative log likelihood in nats per pixel and channel."""
        label = one_hot(batch.condition.label, self.classes, len(batch), batch.image.device)
        nats = -self._log_prob(batch.image, label).mean() / math.prod(self.shape)
        return {"loss": nats, "bits_per_dim": nats.detach() / math.log(2)}

    def mixture(
        self, image: Tensor, label: Tensor, memory: Memory | None = None
    ) -> LogisticMixture:
        """Return the distribution of each pixel, or with `memory` of the next one."""
        features = F.silu(self.network(image, label, memory))
        with _float32(image.device):  # a level of 256 is finer than bfloat16
            return LogisticMixture.of(self.head(features.float()), self.shape[0])

    def _log_prob(self, image: Tensor, label: Tensor) -> Tensor:
        check_shape("pictures", image, *self.shape)
        image = to_float(to_uint8(image))
        return self.mixture(image, label).log_prob(image).flatten(1).sum(1)

    @torch.no_grad()
    def log_prob(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Log p(image) of the 8-bit picture, or log p(image | label), exact, in nats (B,).

        Without a label, over equally frequent classes.
        """
        with _float32(image.device):
            return _over_classes(self._log_prob, image, label, self.classes)

    def sample(self, condition: Condition, rng: Rng, *, temperature: float = 1.0) -> Tensor:
        """Draw images (B, C, H, W), pixel by pixel.

        Args:
            condition: its label, where the model knows classes.
            rng: one stream per image.
            temperature: below 1, likelier pixels; at 0 the middle of the likeliest component.
        """
        one_hot(condition.label, self.classes, condition.count, rng.device)  # is it a class?
        blank = torch.zeros(condition.count, *self.shape, device=rng.device)
        return self.complete(blank, 0, condition, rng, temperature=temperature)

    @torch.no_grad()
    def complete(
        self,
        image: Tensor,
        known_rows: int,
        condition: Condition,
        rng: Rng,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """Keep the first rows of images (B, C, H, W) as they are and draw the rest.

        Without a label, where the model knows classes, each image's is drawn by p(y | known rows).

        Raises:
            ValueError: the images' shape, the rows or the temperature cannot be.
        """
        check_shape("pictures", image, *self.shape)
        _check_options(known_rows, self.shape, temperature)
        channels, height, width = self.shape
        uniform = rng.uniform(height, width, 1 + channels)
        image, memory = image.clone(), Memory(row=known_rows)
        with _float32(image.device):
            drawn = condition.label
            if drawn is None and self.classes:
                levels = to_float(to_uint8(image))

                def known(label: Tensor) -> Tensor:
                    nats = self.mixture(levels, label).log_prob(levels)
                    return nats[:, :known_rows].flatten(1).sum(1)

                drawn = draw(_by_class(known, self.classes, image), rng.uniform(), temperature)
            label = one_hot(drawn, self.classes, len(image), image.device)
            for row in range(known_rows, height):
                for column in range(width):
                    at = slice(row, row + 1), slice(column, column + 1)
                    mixture = self.mixture(image, label, memory)
                    image[:, :, *at] = mixture.sample(uniform[:, *at], temperature)
        return image


class Autoregressive(Model):
    """A causal transformer over the tokens of a codec, by class where there are any.

    Args:
        codec: between pictures and tokens.
        network: from embedded tokens to features, each of the positions up to its own.
        classes: K, 0 for none.
    """

    def __init__(self, codec: Tokens, network: CausalTransformer, classes: int = 0) -> None:
        super().__init__()
        self.codec, self.network, self.classes = codec, network, classes
        self.token = nn.Embedding(codec.vocabulary, network.width)
        self.start = nn.Linear(max(classes, 1), network.width, bias=False)
        self.position = nn.Embedding(codec.length, network.width)
        self.positions = {"position.weight": codec.grid}
        self.head = nn.Linear(network.width, codec.vocabulary)
        for table in (self.token, self.start, self.position):
            nn.init.normal_(table.weight, std=0.02)
        rows, columns, depth = codec.grid
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        place = torch.stack([row, column], dim=-1).flatten(0, 1).repeat_interleave(depth, dim=0)
        self.place: Tensor
        self.register_buffer("place", place, persistent=False)  # (length, 2)

    def phases(self) -> list[Phase]:
        """All but the codec learns."""
        learn = [self.network, self.token, self.start, self.position, self.head]
        return [Phase("likelihood", self.loss, learn)]

    def loss(self, batch: Batch) -> Losses:
        """The negative log likelihood in nats per token."""
        label = one_hot(batch.condition.label, self.classes, len(batch), batch.image.device)
        return {"loss": self.surprise(encoded(self.codec, batch), label).mean()}

    def logits(self, tokens: Tensor, label: Tensor, cache: Cache | None = None) -> Tensor:
        """Return logits (B, t + 1, V) of the tokens (B, t) and of the next.

        With a `cache` of t > 0 positions, only those of the next: (B, 1, V).
        """
        first = cache.length if cache is not None else 0
        if first:
            x = self.token(tokens[:, first - 1 :])
        else:
            start = self.start(label if self.classes else label.new_ones(len(label), 1))
            x = torch.cat([start[:, None], self.token(tokens)], dim=1)
        here = slice(first, tokens.shape[1] + 1)
        return self.head(self.network(x + self.position.weight[here], self.place[here], cache))

    def surprise(self, tokens: Tensor, label: Tensor) -> Tensor:
        """Return -log p(token | tokens before it, label) of tokens (B, T), in nats (B, T)."""
        logits = self.logits(tokens[:, :-1], label).float()
        return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")

    def sample(
        self,
        condition: Condition,
        rng: Rng,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Tensor:
        """Draw images (B, C, H, W), token by token.

        Args:
            condition: its label, where the model knows classes.
            rng: one stream per image.
            temperature: below 1, likelier tokens; at 0 the likeliest.
            top_k: draw among so many likeliest tokens; None for all.
        """
        one_hot(condition.label, self.classes, condition.count, rng.device)  # is it a class?
        blank = torch.zeros(condition.count, *self.codec.shape, device=rng.device)
        return self.complete(blank, 0, condition, rng, temperature=temperature, top_k=top_k)

    @torch.no_grad()
    def complete(
        self,
        image: Tensor,
        known_rows: int,
        condition: Condition,
        rng: Rng,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Tensor:
        """Keep the first rows of images (B, C, H, W) as they are and draw the rest.

        Rows of tokens that lie wholly within the known rows are kept too; what is below them in
        `image` is not read. Without a label, where the model knows classes, each image's is drawn
        by p(y | known tokens).

        Raises:
            ValueError: the images' shape, the rows, temperature or top_k cannot be.
        """
        codec, length = self.codec, self.codec.length
        codec.check(image)
        _check_options(known_rows, codec.shape, temperature, top_k)
        uniform = rng.uniform(length)
        cache = Cache(length)
        with _float32(image.device):
            tokens = torch.zeros(len(image), length, dtype=torch.int64, device=image.device)
            known = 0
            if known_rows:
                last = image[:, :, known_rows - 1 : known_rows]
                below = last.expand(-1, -1, codec.shape[1] - known_rows, -1)
                given = codec.encode(torch.cat([image[:, :, :known_rows], below], dim=2))
                known = known_rows * codec.grid[0] // codec.shape[1] * (length // codec.grid[0])
                tokens[:, :known] = given[:, :known]
            drawn = condition.label
            if drawn is None and self.classes:
                by_class = _by_class(
                    lambda label: -self.surprise(tokens, label)[:, :known].sum(1),
                    self.classes,
                    image,
                )
                drawn = draw(by_class, rng.uniform(), temperature)
            label = one_hot(drawn, self.classes, len(image), image.device)
            for i in range(known, length):
                logits = self.logits(tokens[:, :i], label, cache)[:, -1]
                tokens[:, i] = draw(logits, uniform[:, i], temperature, top_k)
            whole = codec.decode(tokens)
        whole[:, :, :known_rows] = image[:, :, :known_rows]
        return whole


class PixelAutoregressive(Autoregressive):
    """The same over pixels, where the probability of tokens is that of the picture.

    Args:
        codec: pixels, of 256 levels or fewer. Of fewer, the likelihood is that of a model which
            draws a level and then evenly one of the 8-bit levels behind it.
        network: from embedded tokens to features, each of the positions up to its own.
        classes: K, 0 for none.
    """

    discrete, bound = True, False

    def __init__(self, codec: PixelTokens, network: CausalTransformer, classes: int = 0) -> None:
        super().__init__(codec, network, classes)
        self.hidden = codec.hidden

    @torch.no_grad()
    def log_prob(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Log p(image) of the 8-bit picture, or log p(image | label), exact, in nats (B,).

        Without a label, over equally frequent classes.
        """

        def conditional(image: Tensor, label: Tensor) -> Tensor:
            return -self.surprise(self.codec.encode(image), label).sum(1) - self.hidden

        with _float32(image.device):
            return _over_classes(conditional, image, label, self.classes)


def _over_classes(
    conditional: Callable[[Tensor, Tensor], Tensor],
    image: Tensor,
    label: Tensor | None,
    classes: int,
) -> Tensor:
    """Return log p(image | label), or without a label log of its mean over all classes."""
    if label is not None or not classes:
        return conditional(image, one_hot(label, classes, len(image), image.device))
    each = _by_class(lambda row: conditional(image, row), classes, image)
    return each.logsumexp(1) - math.log(classes)


def _by_class(conditional: Callable[[Tensor], Tensor], classes: int, image: Tensor) -> Tensor:
    """Return conditional(label) (B,) under each class in turn, for all images: (B, K)."""
    rows = torch.eye(classes, device=image.device)
    return torch.stack([conditional(row.expand(len(image), -1)) for row in rows], dim=1)


def _float32(where: torch.device) -> torch.autocast:
    """Return a context without autocast.

    A draw near the border of two values falls to either side by rounding, and all that follows
    with it: in bfloat16, rounded otherwise in other batches, a picture would depend on its batch.
    """
    return torch.autocast(where.type, enabled=False)


def _check_options(
    known_rows: int, shape: tuple[int, ...], temperature: float, top_k: int | None = None
) -> None:
    if not 0 <= known_rows <= shape[1]:
        raise ValueError(f"known_rows is {known_rows}; pictures have 0 to {shape[1]} rows")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; expected 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1")
