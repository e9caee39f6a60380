"""Stable Diffusion 3 and FLUX.1: texts to latents.

Both predict noise - x_0 on the straight schedule x_t = (1 - t) x_0 + t noise, so that
x_0 = x_t - t F, and every solver of `diffusion.solvers` samples them. What differs: how texts are
read (`t5`), what guidance is, and where the times lie (`flow`).

Guidance of Stable Diffusion 3 is classifier-free. FLUX.1 dev is told it as a number, schnell has
none; both can be guided classifier-free besides, away from a negative text, at twice the calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trilemma.diffusion.guidance import Denoiser, classifier_free
from trilemma.diffusion.schedules import Straight
from trilemma.networks.flux import Flux
from trilemma.networks.layers import Embedded
from trilemma.networks.mmdit import MMDiT
from trilemma.stable import flow, t5
from trilemma.stable.t5 import Reader

SCHEDULE = Straight()


class Rectified(nn.Module, ABC):
    """A network with the texts that it reads and the times that it is sampled at.

    Attributes:
        steps: network calls by default.
        guidance: by default.
        whole: see `flow.times`.
    """

    steps: int
    guidance: float
    whole: bool
    network: MMDiT | Flux
    shift: flow.Shift

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return texts as the network reads them."""

    @abstractmethod
    def denoiser(
        self,
        given: Embedded,
        against: Embedded | None,
        guidance: float | None = None,
        true_guidance: float = 1.0,
    ) -> Denoiser:
        """Return a denoiser of latents (B, C, h, w) under B texts.

        Args:
            given: the texts.
            against: the negative texts, where classifier-free guidance is asked for.
            guidance: the model's own; its default if None.
            true_guidance: classifier-free guidance of a model whose own is another.
        """

    def times(self, steps: int, height: int, width: int) -> Tensor:
        """Return the times for latents of this size."""
        patch = self.network.patch
        tokens = (height // patch) * (width // patch)
        return flow.times(self.shift, steps, tokens, self.whole)

    def _predict(self, x: Tensor, t: float, text: Embedded, *told: Tensor) -> Tensor:
        """Return x_0 of x (B, C, h, w), computed in the network's format and returned in x's."""
        kind = self.network.text.weight.dtype
        time = x.new_full((len(x),), t, dtype=torch.float32)
        return x - t * self.network(x.to(kind), time, text, *told).to(x.dtype)


def both(given: Embedded, against: Embedded) -> Embedded:
    """Return two batches of texts as one."""
    assert given.vector is not None and against.vector is not None
    assert given.tokens is not None and against.tokens is not None
    return Embedded(
        vector=torch.cat([given.vector, against.vector]),
        tokens=torch.cat([given.tokens, against.tokens]),
    )


class StableDiffusion3(Rectified):
    """Stable Diffusion 3 or 3.5.

    Args:
        network: predicts noise - x_0.
        shift: of the times.
        clips: its two CLIP towers.
        t5: its T5 encoder; zeros take the place of what it would say if None.
    """

    steps, guidance, whole = 28, 7.0, False

    def __init__(
        self,
        network: MMDiT,
        shift: flow.Shift,
        clips: tuple[Reader, Reader],
        t5: Reader | None,
    ) -> None:
        super().__init__()
        self.network, self.shift, self.clips, self.t5 = network, shift, clips, t5

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return texts as the network reads them."""
        return t5.for_sd3(texts, self.clips, self.t5, self.network.text_dim)

    def denoiser(
        self,
        given: Embedded,
        against: Embedded | None,
        guidance: float | None = None,
        true_guidance: float = 1.0,
    ) -> Denoiser:
        """Return a denoiser: classifier-free guidance where guidance is not 1."""
        scale = self.guidance if guidance is None else guidance
        if true_guidance != 1:
            raise ValueError(
                "this model's guidance is classifier-free already; give it as guidance, and no "
                "true_guidance"
            )
        if scale == 1 or against is None:
            return lambda x, t: self._predict(x, t, given)
        texts = both(given, against)

        def pair(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            with_it, without = self._predict(torch.cat([x, x]), t, texts).chunk(2)
            return with_it, without

        return classifier_free(pair, scale)


class Flux1(Rectified):
    """FLUX.1 dev or schnell.

    Args:
        network: predicts noise - x_0.
        shift: of the times.
        clip: its CLIP tower.
        t5: its T5 encoder.
    """

    guidance, whole = 3.5, True

    def __init__(self, network: Flux, shift: flow.Shift, clip: Reader, t5: Reader) -> None:
        super().__init__()
        self.network, self.shift, self.clip, self.t5 = network, shift, clip, t5
        self.steps = 28 if network.guided else 4

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return texts as the network reads them."""
        return t5.for_flux(texts, self.clip, self.t5)

    def denoiser(
        self,
        given: Embedded,
        against: Embedded | None,
        guidance: float | None = None,
        true_guidance: float = 1.0,
    ) -> Denoiser:
        """Return a denoiser that is told the guidance; classifier-free besides if asked for."""
        scale = self.guidance if guidance is None else guidance
        if guidance not in (None, 1) and not self.guided:
            raise ValueError(
                f"guidance is {guidance}, and this model is told none; give true_guidance and a "
                "negative text to guide it classifier-free"
            )

        def told(x: Tensor) -> tuple[Tensor, ...]:
            return (x.new_full((len(x),), scale, dtype=torch.float32),) if self.guided else ()

        if true_guidance == 1 or against is None:
            return lambda x, t: self._predict(x, t, given, *told(x))
        texts = both(given, against)

        def pair(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            x = torch.cat([x, x])
            with_it, without = self._predict(x, t, texts, *told(x)).chunk(2)
            return with_it, without

        return classifier_free(pair, true_guidance)

    @property
    def guided(self) -> bool:
        """Whether the network is told a guidance."""
        assert isinstance(self.network, Flux)
        return self.network.guided
