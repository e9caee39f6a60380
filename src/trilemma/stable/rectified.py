"""Stable Diffusion 3 and FLUX.1: from texts, and pictures, to pictures.

Both predict noise - x_0 on the straight schedule x_t = (1 - t) x_0 + t noise, so that
x_0 = x_t - t F, and every solver of `diffusion.solvers` samples them. What differs: how texts are
read (`t5`), what guidance is, and where the times lie (`flow`).

Guidance of Stable Diffusion 3 is classifier-free. FLUX.1 dev is told it as a number, schnell has
none; both can be guided classifier-free besides, away from a negative text, at twice the calls.

From a picture, and into a masked part of one, as in `pipeline`.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from trilemma import device
from trilemma.batch import Rng
from trilemma.diffusion import solvers
from trilemma.diffusion.guidance import Denoiser
from trilemma.diffusion.schedules import Straight
from trilemma.errors import UserError
from trilemma.networks.flux import Flux
from trilemma.networks.kl_autoencoder import KLAutoencoder
from trilemma.networks.layers import Embedded, Reuse
from trilemma.networks.mmdit import MMDiT
from trilemma.networks.spatial_unet import for_each_text
from trilemma.stable import flow, flux, sd3, t5
from trilemma.stable.pipeline import NOT_AWAY, WHOLE, Autoencoder, asked, guided, reused
from trilemma.stable.places import Place, find
from trilemma.stable.t5 import Encoder

log = logging.getLogger(__name__)

SCHEDULE = Straight()


class Rectified(ABC):
    """A checkpoint, ready to draw.

    Args:
        network: predicts noise - x_0.
        autoencoder: between pictures and latents.
        shift: of the times.
        size: height and width by default, in pixels.
        kind: number format of matrix products.

    Attributes:
        steps: by default.
        guidance: by default.
        solver: by default.
        whole: see `flow.times`.
        lora_prefix: of the network's layers in a LoRA file of diffusers.
    """

    steps: int
    guidance: float
    whole: bool
    solver = "euler"
    lora_prefix = "transformer"
    network: MMDiT | Flux

    def __init__(
        self,
        network: MMDiT | Flux,
        autoencoder: Autoencoder,
        shift: flow.Shift,
        size: int = 1024,
        kind: torch.dtype = torch.float32,
    ) -> None:
        self.network, self.autoencoder, self.shift = network, autoencoder, shift
        self.size, self.kind = size, kind

    @property
    def where(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    @property
    def multiple(self) -> int:
        """Of which the sides of pictures are multiples."""
        return self.autoencoder.factor * self.network.patch

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return texts as the network reads them; what is cut off them is logged."""

    @abstractmethod
    def denoiser(
        self,
        texts: Sequence[str],
        negative: str | None,
        guidance: float | None = None,
        true_guidance: float = 1.0,
        rescale: float = 0.0,
        interval: Sequence[float] | None = None,
        reuse: Reuse | None = None,
    ) -> Denoiser:
        """Return a denoiser of latents (B, C, h, w) under B texts.

        Args:
            texts: B of them.
            negative: what classifier-free guidance goes away from; "" if None.
            guidance: the model's own; its default if None.
            true_guidance: classifier-free guidance of a model whose own is another.
            rescale: of classifier-free guidance.
            interval: where classifier-free guidance acts: `pipeline.StableDiffusion.draw`.
            reuse: of all blocks but the first and the last.

        Raises:
            UserError: guidance that this model does not have.
        """

    @abstractmethod
    def diffusers_places(self) -> dict[str, Place]:
        """Return where each weight of the network stands in diffusers' `transformer`."""

    @torch.inference_mode()
    def draw(
        self,
        texts: Sequence[str],
        rng: Rng,
        *,
        negative: str | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        steps: int | None = None,
        solver: str | None = None,
        guidance: float | None = None,
        true_guidance: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        reuse_blocks: int = 1,
        height: int | None = None,
        width: int | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Draw B pictures (B, 3, H, W) in [-1, 1].

        Args:
            texts: B of them.
            rng: B streams.
            negative: what not to draw.
            image: (1 or B, 3, H, W) in [-1, 1], to begin from.
            mask: (1 or B, 1, H, W), 1 where to draw, 0 where to keep the image.
            strength: above 0, up to 1: how far the image is given up; 0.6, or 1 with a mask.
            steps: of the solver from all noise; the model's own if None.
            solver: by name; euler if None.
            guidance: the model's own, by default at its own strength.
            true_guidance: classifier-free, of a model whose own is another.
            guidance_interval: where that acts, or the model's own if it is classifier-free: the
                sigma / alpha, above the first and up to the second.
            guidance_rescale: of classifier-free guidance.
            reuse_blocks: all blocks but the first and the last are computed in one step of so many.
            height: of the pictures; the image's, or the checkpoint's own, if None.
            width: the same.
            watch: called after each step with the steps done and the x_0 expected.
            own: options of the solver.

        Raises:
            UserError: options that do not fit together or this checkpoint.
        """
        try:
            chosen = solvers.check(solver or self.solver, own or {})
        except ValueError as error:
            raise UserError(str(error)) from error
        if mask is not None and image is None:
            raise UserError("a mask was given without an image; expected both")
        if image is not None:
            height, width = image.shape[2:]
        height, width = height or self.size, width or self.size
        factor, multiple = self.autoencoder.factor, self.multiple
        if height % multiple or width % multiple:
            raise UserError(f"pictures of {width}x{height}: both must be multiples of {multiple}")
        shape = (self.network.channels, height // factor, width // factor)
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise UserError(f"steps is {steps}; expected 1 or more")
        times = self.times(steps, *shape[1:])
        if image is not None:
            strength = (0.6 if mask is None else 1.0) if strength is None else strength
            if not 0 < strength <= 1:
                raise UserError(f"strength is {strength}; expected more than 0 and at most 1")
            times = times[int(steps - steps * strength) :]
        how = guidance_rescale, guidance_interval, reused(reuse_blocks)
        with device.autocast(self.kind, self.where):
            denoise = self.denoiser(texts, negative, guidance, true_guidance, *how)
            kept = small = None
            if image is not None:
                image = image.to(self.where).expand(len(texts), -1, -1, -1)
                kept = self.autoencoder.encode(image, rng.normal(*shape))
            noise = rng.normal(*shape)
            first = float(times[0])
            x = noise if kept is None else first * noise + (1 - first) * kept
            if mask is not None:
                mask = (mask.to(self.where) >= 0.5).float().expand(len(texts), -1, -1, -1)
                small = F.interpolate(mask, size=shape[1:])
            expected = x

            def watched(x: Tensor, t: float) -> Tensor:
                nonlocal expected
                expected = denoise(x, t)
                return expected

            path = chosen.steps(watched, x, times, SCHEDULE, rng, **(own or {}))
            for i, x in enumerate(path):  # noqa: B020
                if small is not None and kept is not None:
                    t = float(times[i + 1])  # in place: the solver goes on from this x
                    x.copy_(small * x + (1 - small) * (t * noise + (1 - t) * kept))
                if watch is not None:
                    watch(i + 1, expected)
        return self.decode(x)

    def decode(self, latent: Tensor) -> Tensor:
        """Map latents (B, D, h, w) to pictures (B, 3, H, W) in [-1, 1], one after another."""
        bands = latent.shape[2] * latent.shape[3] > WHOLE**2
        with torch.inference_mode(), device.autocast(self.kind, self.where):
            parts = [self.autoencoder.decode(one[None], bands) for one in latent]
        return torch.cat(parts).clamp(-1, 1)

    def with_autoencoder(self, autoencoder: Autoencoder) -> Self:
        """Return the same with another autoencoder."""
        other = copy.copy(self)
        other.autoencoder = autoencoder
        return other

    def times(self, steps: int, height: int, width: int) -> Tensor:
        """Return the times for latents of this size."""
        patch = self.network.patch
        tokens = (height // patch) * (width // patch)
        return flow.times(self.shift, steps, tokens, self.whole)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation (B, C, h, w) of the latents of images in [-1, 1]."""
        return moments(self.autoencoder, images)

    def loss(self, x0: Tensor, text: Embedded, rng: Rng) -> Tensor:
        """Return the mean square (B,) of what the network says less noise - x_0.

        Times are a sigmoid of normal numbers, so that most are in the middle (Esser et al. 2024,
        section 3.1), and moved as in sampling. A network that is told a guidance is told 1.

        Args:
            x0: latents (B, C, h, w).
            text: B texts.
            rng: of noise and times.
        """
        patch = self.network.patch
        tokens = (x0.shape[2] // patch) * (x0.shape[3] // patch)
        t = flow.shifted(rng.normal(1).sigmoid(), self.shift.at(tokens))[:, 0]
        noise, share = rng.normal(*x0.shape[1:]), t[:, None, None, None]
        told = (torch.ones_like(t),) if getattr(self.network, "guided", False) else ()
        said = self.network((1 - share) * x0 + share * noise, t, text, *told)
        return (said.float() - (noise - x0)).square().flatten(1).mean(1)

    def _guided(
        self,
        texts: Sequence[str],
        negative: str | None,
        scale: float,
        rescale: float,
        interval: Sequence[float] | None,
        reuse: Reuse | None,
        told: float | None = None,
    ) -> Denoiser:
        """Return a denoiser with classifier-free guidance; 1 is none.

        It computes in the network's format and returns that of x; the network is told a number if
        there is one.
        """
        guidance = asked(scale, rescale, interval)
        if negative and scale == 1:
            raise UserError(NOT_AWAY)
        read = self.embed([*texts, *[negative or ""] * (len(texts) if scale != 1 else 0)])

        def predict(x: Tensor, t: float, text: Embedded) -> Tensor:
            assert text.tokens is not None
            x = for_each_text(x, text.tokens)
            time = x.new_full((len(x),), t, dtype=torch.float32)
            number = () if told is None else (torch.full_like(time, told),)
            given = x.to(self.network.text.weight.dtype)
            return x - t * self.network(given, time, text, *number, reuse=reuse).to(x.dtype)

        return guided(predict, read, guidance, SCHEDULE)


class StableDiffusion3(Rectified):
    """Stable Diffusion 3 or 3.5.

    Args:
        network: predicts noise - x_0.
        autoencoder: between pictures and latents.
        shift: of the times.
        clips: its two CLIP towers.
        t5: its T5 encoder; zeros take the place of what it would say if None.
        **rest: as of `Rectified`.
    """

    steps, guidance, whole = 28, 7.0, False
    network: MMDiT

    def __init__(
        self,
        network: MMDiT,
        autoencoder: Autoencoder,
        shift: flow.Shift,
        clips: tuple[Encoder, Encoder],
        t5: Encoder | None,
        **rest: Any,
    ) -> None:
        super().__init__(network, autoencoder, shift, **rest)
        self.clips, self.t5 = clips, t5

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return texts as the network reads them; what is cut off them is logged."""
        if self.t5 is None:
            _tell_cut(texts, self.clips[0], "CLIP", None)
        else:
            _tell_cut(texts, self.t5, "T5", t5.SD3_WORDS)
        return t5.for_sd3(texts, self.clips, self.t5, self.network.text_dim)

    def diffusers_places(self) -> dict[str, Place]:
        """Return where each weight of the network stands in diffusers' `transformer`."""
        rules = sd3.diffusers_rules({"depth": len(self.network.blocks)})
        return find(self.network.state_dict(), rules)

    def denoiser(
        self,
        texts: Sequence[str],
        negative: str | None,
        guidance: float | None = None,
        true_guidance: float = 1.0,
        rescale: float = 0.0,
        interval: Sequence[float] | None = None,
        reuse: Reuse | None = None,
    ) -> Denoiser:
        """Return a denoiser: classifier-free guidance where guidance is not 1."""
        if true_guidance != 1:
            raise UserError(
                "this model's guidance is classifier-free already; give it as guidance, and no "
                "true_guidance"
            )
        scale = self.guidance if guidance is None else guidance
        return self._guided(texts, negative, scale, rescale, interval, reuse)


class Flux1(Rectified):
    """FLUX.1 dev or schnell.

    Args:
        network: predicts noise - x_0.
        autoencoder: between pictures and latents.
        shift: of the times.
        clip: its CLIP tower.
        t5: its T5 encoder.
        **rest: as of `Rectified`.
    """

    whole = True
    network: Flux

    def __init__(
        self,
        network: Flux,
        autoencoder: Autoencoder,
        shift: flow.Shift,
        clip: Encoder,
        t5: Encoder,
        **rest: Any,
    ) -> None:
        super().__init__(network, autoencoder, shift, **rest)
        self.clip, self.t5 = clip, t5
        self.steps, self.guidance = (28, 3.5) if network.guided else (4, 1.0)

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return texts as the network reads them; what is cut off them is logged."""
        _tell_cut(texts, self.t5, "T5", t5.FLUX_WORDS)
        return t5.for_flux(texts, self.clip, self.t5)

    def diffusers_places(self) -> dict[str, Place]:
        """Return where each weight of the network stands in diffusers' `transformer`."""
        return find(self.network.state_dict(), flux.diffusers_rules())

    def denoiser(
        self,
        texts: Sequence[str],
        negative: str | None,
        guidance: float | None = None,
        true_guidance: float = 1.0,
        rescale: float = 0.0,
        interval: Sequence[float] | None = None,
        reuse: Reuse | None = None,
    ) -> Denoiser:
        """Return a denoiser that is told the guidance; classifier-free besides if asked for."""
        scale, is_told = self.guidance if guidance is None else guidance, self.network.guided
        if scale != 1 and not is_told:
            raise UserError(
                f"guidance is {scale}, and this model is told none; give guidance 1, and "
                "true_guidance above 1 to guide it classifier-free"
            )
        if negative is not None and true_guidance == 1:
            raise UserError(
                "a negative text acts by classifier-free guidance, which this model has not of its "
                "own; give true_guidance above 1 besides"
            )
        asked(scale, 0.0, None)  # is it finite?
        told = scale if is_told else None
        return self._guided(texts, negative, true_guidance, rescale, interval, reuse, told)


def moments(autoencoder: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (B, C, h, w) of the latents of images (B, 3, H, W) in [-1, 1]."""
    if not isinstance(autoencoder, KLAutoencoder):
        raise UserError(
            "a tiny autoencoder tells no deviation of latents; take the checkpoint's own"
        )
    mean, deviation = autoencoder.posterior(images)
    scale = autoencoder.scale
    return (mean - autoencoder.shift) * scale, deviation * scale


def _tell_cut(texts: Sequence[str], encoder: Encoder, name: str, length: int | None) -> None:
    """Log what an encoder cannot read of texts for their length."""
    for text in dict.fromkeys(texts):
        if cut := encoder.cut(text, length):
            log.warning("%s reads %d tokens; this is cut off: %s", name, encoder.room(length), cut)
