"""unCLIP, the system of DALL-E 2: words -> CLIP's embedding of a picture -> the picture.

Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents":

    P(x | y) = P(x, z | y) = P(x | z, y) P(z | y)                                    (section 2)

y being the words, x the picture and z CLIP's embedding of the picture. The *prior* draws z of
words, the *decoder* draws pictures of z, and an upsampler enlarges them.

The decoder is a `Diffusion` whose conditioner is `conditioning.ClipImage`, the upsampler one that
draws from small pictures (`conditioning.Source`). Here are the two priors of section 2.2, and what
joins the three:

- `DiffusionPrior`: a `Diffusion` over `codecs.ClipEmbedding`. Of several z the one is kept whose
  product with the text's embedding is the highest.
- `AutoregressivePrior`: z turned onto its principal components, in the order of their variance, the
  first K of which are kept; each is rounded to one of `bins` values, and a causal transformer says
  them one by one after the words. Where it says one, it is told that component of the text's
  embedding, which lies in the same space: the paper leaves that to the transformer to find out,
  which takes long. (The paper also says the product of z with the text's embedding first, and
  asks for high ones; here several are drawn and the best one kept, as above.)

Neither is a generator of pictures: `draw` gives embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Batch, Condition, Rng
from trilemma.codecs import ClipEmbedding, encoded
from trilemma.conditioning import ClipImage, ClipText, source_of
from trilemma.model import DrawsEmbeddings, Frozen, Losses, Model, Phase, Reads, matching
from trilemma.models.diffusion import Diffusion
from trilemma.networks.transformer import Cache, CausalTransformer


class DiffusionPrior(Model):
    """Draws embeddings by diffusion.

    Args:
        diffusion: over `codecs.ClipEmbedding`, its conditioner `conditioning.ClipText`.
    """

    def __init__(self, diffusion: Diffusion) -> None:
        super().__init__()
        if not isinstance(diffusion.codec, ClipEmbedding):
            raise ValueError(
                f"the prior's codec is {type(diffusion.codec).__name__}; expected "
                "codecs.ClipEmbedding, for it draws embeddings"
            )
        self.diffusion: Diffusion = diffusion
        _share_clip(diffusion.codec, diffusion.conditioner)

    def phases(self) -> list[Phase]:
        """Return the one phase of diffusion."""
        return self.diffusion.phases()

    def draw(
        self, condition: Condition, rng: Rng, *, candidates: int = 2, **options: Any
    ) -> Tensor:
        """Draw unit embeddings (B, D) for the texts of a condition.

        Args:
            condition: of B texts.
            rng: one stream per text.
            candidates: drawn for each, of which the nearest to the text's embedding is kept.
            options: of the diffusion's `sample`.
        """
        drawn = [self.diffusion.sample(condition, rng, **options) for _ in range(candidates)]
        return _nearest(drawn, clip_of(self), condition)


class AutoregressivePrior(Model):
    """Draws an embedding's principal components one by one.

    Args:
        codec: CLIP's embeddings of pictures.
        conditioner: reads the words.
        network: over the sequence.
        components: K, how many are kept; at most the embeddings' dimensions.
        bins: values that a component is rounded to.
    """

    mean: Tensor
    axes: Tensor
    reach: Tensor

    def __init__(
        self,
        codec: ClipEmbedding,
        conditioner: ClipText,
        network: CausalTransformer,
        components: int = 32,
        bins: int = 256,
    ) -> None:
        super().__init__()
        (dim,) = codec.shape
        if not 1 <= components <= dim or bins < 2:
            raise ValueError(
                f"{components} components of {bins} values were asked for; expected 1 to {dim} "
                "components, and at least 2 values"
            )
        self.codec, self.conditioner, self.network = codec, conditioner, network
        _share_clip(codec, conditioner)
        self.components, self.bins = components, bins
        width = network.width
        self.word = nn.Linear(conditioner.words[1], width)
        self.text = nn.Linear(dim, width)
        self.value = nn.Embedding(bins, width)
        self.order = nn.Embedding(components, width)
        self.near = nn.Linear(1, width)
        self.out = nn.Linear(width, bins)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("axes", torch.eye(dim)[:, :components].contiguous())
        self.register_buffer("reach", torch.ones(components))

    def phases(self) -> list[Phase]:
        """Return the one phase: saying the components."""
        parts = [self.conditioner, self.network, self.word, self.text]
        parts += [self.value, self.order, self.near, self.out]
        return [Phase("prior", self.loss, parts)]

    @torch.no_grad()
    def measure(self, images: Iterable[Tensor]) -> None:
        """Take the principal components of the embeddings of images (B, C, H, W) in [-1, 1].

        Values of a component reach to four of its standard deviations.
        """
        z = torch.cat([self.codec.encode(image) for image in images]).double()
        mean = z.mean(0)
        variance, axes = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))
        axes = axes.flip(1)[:, : self.components]
        self.mean.copy_(mean)
        self.axes.copy_(axes)
        self.reach.copy_(4 * variance.flip(0)[: self.components].clamp(min=1e-12).sqrt())

    def codes(self, z: Tensor) -> Tensor:
        """Round embeddings z (B, D) to codes (B, K), int64 from 0 to bins - 1."""
        share = (self.turned(z) + 1) / 2
        return (share * self.bins).long().clamp(0, self.bins - 1)

    def turned(self, z: Tensor) -> Tensor:
        """Return the components (B, K) of embeddings z (B, D), most of them in [-1, 1]."""
        return (z - self.mean) @ self.axes / self.reach

    def from_codes(self, codes: Tensor) -> Tensor:
        """Return the embeddings (B, D) in the middle of what codes (B, K) stand for."""
        share = (codes + 0.5) / self.bins
        return ((2 * share - 1) * self.reach) @ self.axes.T + self.mean

    def loss(self, batch: Batch) -> Losses:
        """Return the mean negative log probability of a component, in nats."""
        codes = self.codes(encoded(self.codec, batch))
        told, near = self._told(batch.condition, batch.rng)
        before = self._said(codes[:, :-1], 0) + near[:, 1:]
        sequence = torch.cat([told, before], dim=1)
        logits = self.out(self._features(sequence, 0)[:, told.shape[1] - 1 :])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())
        return {"loss": loss}

    def draw(
        self,
        condition: Condition,
        rng: Rng,
        *,
        candidates: int = 2,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw unit embeddings (B, D) for the texts of a condition.

        Args:
            condition: of B texts.
            rng: one stream per text.
            candidates: drawn for each, of which the nearest to the text's embedding is kept.
            temperature: 1 draws as learned, towards 0 the likeliest.

        Raises:
            ValueError: a temperature of 0 or less.
        """
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; expected more than 0")
        drawn = []
        for _ in range(candidates):
            part, near = self._told(condition, None)
            count = part.shape[1]
            cache = Cache(count + self.components)
            codes: list[Tensor] = []
            at = 0
            for k in range(self.components):
                features = self._features(part, at, cache)[:, -1]
                at = cache.length
                codes.append(rng.categorical(self.out(features).float() / temperature))
                part = self._said(codes[-1][:, None], k) + near[:, k + 1 : k + 2]
            drawn.append(self.codec.decode(self.from_codes(torch.stack(codes, dim=1))))
        return _nearest(drawn, clip_of(self), condition)

    def _told(self, condition: Condition, rng: Rng | None) -> tuple[Tensor, Tensor]:
        """Return how the sequence begins (B, T + 1, W), and what is added where one is said.

        It begins with the words and the text's embedding. To the positions that say components,
        those of the text's embedding are added (B, K, W), to its last one the first of them.
        """
        embedded = self.conditioner(condition, rng)
        assert embedded.tokens is not None and embedded.vector is not None
        near = self.near(self.turned(embedded.vector)[..., None])
        text = self.text(embedded.vector) + near[:, 0]
        return torch.cat([self.word(embedded.tokens), text[:, None]], dim=1), near

    def _said(self, codes: Tensor, first: int) -> Tensor:
        """Return codes (B, t) of the components from `first` on as positions (B, t, W)."""
        order = torch.arange(first, first + codes.shape[1], device=codes.device)
        return self.value(codes) + self.order(order)

    def _features(self, sequence: Tensor, at: int, cache: Cache | None = None) -> Tensor:
        place = torch.zeros(sequence.shape[1], 2, device=sequence.device)
        place[:, 0] = torch.arange(at, at + sequence.shape[1], device=sequence.device)
        return self.network(sequence, place, cache)


class UnCLIP(Model):
    """Prior, decoder and upsampler, joined: draws pictures of words.

    Args:
        prior: draws embeddings.
        decoder: draws pictures of them; its CLIP equals the prior's, and the two become one.
        upsampler: enlarges those; None leaves them as they are.
    """

    def __init__(self, prior: Frozen, decoder: Frozen, upsampler: Frozen | None = None) -> None:
        super().__init__()
        if not isinstance(prior.module, DrawsEmbeddings):
            raise ValueError(
                f"the prior is a {type(prior.module).__name__}, which draws no embeddings; give "
                "the run of a DiffusionPrior or an AutoregressivePrior"
            )
        if not isinstance(decoder.module, Diffusion) or not any(
            isinstance(part, ClipImage) for part in decoder.module.conditioner.modules()
        ):
            raise ValueError(
                f"the decoder is a {type(decoder.module).__name__} that draws no embeddings' "
                "pictures; give the run of a Diffusion whose conditioner is ClipImage"
            )
        if upsampler is not None and not (
            isinstance(upsampler.module, Diffusion) and source_of(upsampler.module.conditioner)
        ):
            raise ValueError(
                f"the upsampler is a {type(upsampler.module).__name__} that enlarges nothing; "
                "give the run of super-resolution"
            )
        self.prior, self.decoder, self.upsampler = prior, decoder, upsampler
        _reader(decoder).clip = _reader(prior).clip

    def phases(self) -> list[Phase]:
        """Return none: its parts have been trained."""
        return []

    def sample(
        self,
        condition: Condition,
        rng: Rng,
        *,
        guidance: float = 2.0,
        steps: int = 20,
        prior_guidance: float = 2.0,
        prior_steps: int = 20,
        candidates: int = 2,
        upsampler_steps: int = 10,
        direct: bool = False,
    ) -> Tensor:
        """Draw images (B, C, H, W) in [-1, 1] of the texts, or embeddings, of a condition.

        Args:
            condition: of B texts; where it has embeddings, the prior is not asked.
            rng: one stream per image.
            guidance: of the decoder.
            steps: of the decoder.
            prior_guidance: of a diffusion prior.
            prior_steps: of a diffusion prior.
            candidates: of the prior.
            upsampler_steps: of the upsampler.
            direct: decode the text's own embedding, without a prior (the paper's comparison,
                section 5.1).
        """
        z = condition.embedding
        if z is None and direct:
            assert condition.text is not None
            z = clip_of(self.prior).embed_texts(condition.text)
        if z is None:
            options: dict[str, Any] = {"candidates": candidates}
            if isinstance(self.prior.module, DiffusionPrior):
                options |= {"guidance": prior_guidance, "steps": prior_steps}
            z = cast(DrawsEmbeddings, self.prior.module).draw(condition, rng, **options)
        told = replace(condition, embedding=z)
        decoder = cast(Diffusion, self.decoder.module)
        image = decoder.sample(told, rng, guidance=guidance, steps=steps)
        if self.upsampler is None:
            return image
        told = Condition(len(image), source=image)
        upsampler = cast(Diffusion, self.upsampler.module)
        return upsampler.sample(told, rng, steps=upsampler_steps)


def clip_of(module: nn.Module) -> Reads:
    """Return the CLIP that a prior's conditioner or a decoder's reads.

    Raises:
        ValueError: there is none.
    """
    return matching(_reader(module).clip)


def _reader(module: nn.Module) -> ClipText | ClipImage:
    for part in module.modules():
        if isinstance(part, ClipText | ClipImage):
            return part
    raise ValueError(f"{type(module).__name__} reads nothing of a CLIP")


def _share_clip(codec: ClipEmbedding, conditioner: nn.Module) -> None:
    """Let words be read by the CLIP whose embeddings are drawn, so that it is held once.

    Raises:
        ValueError: it is another run's.
    """
    part = _reader(conditioner)
    if part.clip.path != codec.clip.path:
        raise ValueError(
            f"the embeddings are those of {codec.clip.path} and words are read by {part.clip.path};"
            " give the codec and the conditioner the same run of a CLIP"
        )
    part.clip = codec.clip


def _nearest(drawn: list[Tensor], clip: Reads, condition: Condition) -> Tensor:
    """Return of several embeddings (B, D) for each text the one nearest to the text's own."""
    assert condition.text is not None  # its conditioner has read it
    several = torch.stack(drawn)  # (candidates, B, D)
    best = (several * clip.embed_texts(condition.text)).sum(-1).argmax(0)
    return several[best, torch.arange(several.shape[1], device=best.device)]
