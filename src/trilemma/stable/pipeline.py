"""Stable Diffusion 1, 2 and XL: from texts, and pictures, to pictures.

From a picture (Meng et al. 2022, "SDEdit: Guided Image Synthesis and Editing with Stochastic
Differential Equations"): its latents get the noise of a time `strength` of the way, and only the
steps from there are taken. Where a mask is given, a U-Net of nine channels is told the mask and the
latents of the picture without its masked part; with one of four channels, what is not masked is
set back to the picture, at its level of noise, after every step.

All noise of a picture is drawn from its own stream, in this order: for the latents of the picture,
the noise it begins with, the latents of the masked picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trilemma import device
from trilemma.batch import Rng
from trilemma.diffusion import solvers
from trilemma.diffusion.guidance import Denoiser, Guidance, classifier_free, level, within
from trilemma.diffusion.schedules import Schedule
from trilemma.errors import UserError
from trilemma.networks.kl_autoencoder import KLAutoencoder
from trilemma.networks.layers import Embedded, Reuse
from trilemma.networks.spatial_unet import SpatialUNet, for_each_text
from trilemma.networks.tiny_autoencoder import TinyAutoencoder
from trilemma.networks.token_merging import MOST
from trilemma.stable.schedule import Spacing
from trilemma.stable.text import Reader

STEPS, GUIDANCE = 30, 7.5  # of `draw`, if nothing is said
UNFIT = ("sde", "pc", "langevin", "pndm")  # they go by other times, or between them
NOT_AWAY = "a negative text acts by classifier-free guidance; give a guidance above 1 besides"
WHOLE = 96
"""Side of the largest latents that are not decoded in bands."""

Autoencoder = KLAutoencoder | TinyAutoencoder
Watch = Callable[[int, Tensor], None]
"""(steps done, the x_0 expected (B, D, h, w)) -> None, after each step."""


Predict = Callable[[Tensor, float, Embedded], Tensor]
"""(x_t (B, ...), t, n texts for each) -> x_0 (n B, ...)."""


class Start(NamedTuple):
    """What pictures begin from.

    Attributes:
        x: (B, D, h, w) at the first time.
        noise: in it.
        kept: latents of the image, where what is not masked is set back to them.
        mask: (B, 1, h, w) of latents, then.
        told: (B, D + 1, h, w) mask and masked latents, for a U-Net that is told them.
    """

    x: Tensor
    noise: Tensor
    kept: Tensor | None = None
    mask: Tensor | None = None
    told: Tensor | None = None


def _solver(name: str, own: Mapping[str, Any]) -> solvers.Solver:
    """Return a solver by name; raises UserError when there is none, or it does not fit."""
    if name in UNFIT:
        raise UserError(
            f"solver {name} does not go by the steps of a checkpoint; use ddim or dpmpp_2m"
        )
    try:
        return solvers.check(name, own)
    except ValueError as error:
        raise UserError(str(error)) from error


def asked(scale: float, rescale: float, interval: Sequence[float] | None) -> Guidance:
    """Return classifier-free guidance as it is asked for; raises UserError when it cannot be."""
    if (interval is not None or rescale) and scale == 1:
        name = "guidance_rescale" if interval is None else "guidance_interval"
        raise UserError(
            f"{name} says where or how classifier-free guidance acts, and there is none; give "
            "a guidance above 1 (of FLUX.1: true_guidance)"
        )
    between = None if interval is None else tuple(interval)
    try:
        return Guidance(scale=scale, rescale=rescale, interval=between)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(str(error)) from error


def reused(every: int) -> Reuse | None:
    """Return what keeps what blocks made, for so many calls; None for 1."""
    if every < 1:
        raise UserError(f"reuse_blocks is {every}; expected 1, for never, or more")
    return None if every == 1 else Reuse(every)


def guided(predict: Predict, read: Embedded, guidance: Guidance, schedule: Schedule) -> Denoiser:
    """Return the denoiser under texts, with classifier-free guidance.

    Args:
        predict: of the network.
        read: B texts, and B more to go away from if there is guidance: one call for both.
        guidance: its scale, rescale and interval.
        schedule: by which the interval goes.
    """
    if guidance.scale == 1:
        return lambda x, t: predict(x, t, read)

    def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        with_it, without = predict(x, t, read).chunk(2)
        return with_it, without

    denoise = classifier_free(both, guidance.scale, guidance.rescale)
    if guidance.interval is None:
        return denoise
    halves = {name: part if part is None else part.chunk(2)[0] for name, part in vars(read).items()}
    alone = Embedded(**halves)
    return within(guidance.interval, denoise, lambda x, t: predict(x, t, alone), schedule)


@dataclass(frozen=True)
class StableDiffusion:
    """A checkpoint, ready to draw.

    Attributes:
        unet: predicts noise or velocity.
        autoencoder: between pictures and latents.
        reader: of texts.
        spacing: the schedule and its steps.
        size: height and width by default, in pixels.
        zeros: without a negative text, XL is guided away from zeros, not from "".
        kind: number format of matrix products.
        where: the device.
    """

    unet: SpatialUNet
    autoencoder: Autoencoder
    reader: Reader
    spacing: Spacing
    size: int
    zeros: bool
    kind: torch.dtype
    where: torch.device

    steps, guidance = STEPS, GUIDANCE

    @property
    def solver(self) -> str:
        """By default."""
        return self.spacing.solver

    @property
    def multiple(self) -> int:
        """Of which the sides of pictures are multiples."""
        return self.autoencoder.factor

    @property
    def paints(self) -> bool:
        """Whether the U-Net is told a mask."""
        return self.unet.in_channels == 2 * self.autoencoder.latent + 1

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
        steps: int = STEPS,
        solver: str | None = None,
        guidance: float = GUIDANCE,
        guidance_interval: Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        reuse_blocks: int = 1,
        merge_tokens: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        watch: Watch | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Draw B pictures (B, 3, H, W) in [-1, 1].

        Args:
            texts: B of them.
            rng: B streams.
            negative: what not to draw.
            image: (1 or B, 3, H, W) in [-1, 1], to begin from.
            mask: (1 or B, 1, H, W), 1 where to draw, 0 where to keep the image.
            strength: above 0, up to 1: how far the image is given up; 0.8, or 1 with a mask.
            steps: of the solver from all noise.
            solver: by name; the checkpoint's own if None.
            guidance: classifier-free; 1 is none.
            guidance_interval: the sigma / alpha, above the first and up to the second, where
                guidance acts; elsewhere a step takes half the time.
            guidance_rescale: `guidance.classifier_free`.
            reuse_blocks: deep blocks are computed in one step of so many (`SpatialUNet`).
            merge_tokens: share of the tokens of the largest self-attentions that are merged into
                others, up to 0.75 (`token_merging`).
            height: of the pictures; the image's, or the checkpoint's own, if None.
            width: the same.
            watch: called after each step.
            own: options of the solver.

        Raises:
            UserError: options that do not fit together or this checkpoint.
        """
        name = solver or self.spacing.solver
        chosen = _solver(name, own or {})
        if image is not None:
            height, width = image.shape[2:]
        height, width = height or self.size, width or self.size
        strength = (0.8 if mask is None else 1.0) if strength is None else strength
        self._check(image, mask, strength, steps, height, width)
        if not 0 <= merge_tokens <= MOST:
            raise UserError(f"merge_tokens is {merge_tokens}; expected 0, for none, to {MOST}")
        guide = asked(guidance, guidance_rescale, guidance_interval)
        reuse = reused(reuse_blocks)
        schedule, times = self.spacing.schedule, self.spacing.times(name, steps)
        if image is not None:
            times = times[steps - int(steps * strength) :]
        unscaled = self.spacing.unscaled(name)
        with device.autocast(self.kind, self.where):
            start = self._start(
                rng, image, mask, strength, float(times[0]), unscaled, height, width
            )
            size = height, width
            denoise = self._denoiser(texts, negative, guide, start.told, size, reuse, merge_tokens)
            expected = x = start.x

            def watched(x: Tensor, t: float) -> Tensor:
                nonlocal expected
                expected = denoise(x, t)
                return expected

            path = chosen.steps(watched, x, times, schedule, rng, **(own or {}))
            for i, x in enumerate(path, 1):
                if start.mask is not None and start.kept is not None:
                    alpha, sigma = level(schedule, float(times[i]))
                    if i == len(times) - 1:
                        alpha, sigma = 1.0, 0.0
                    known = alpha * start.kept + sigma * start.noise
                    # In place: the solver goes on from this x.
                    x.copy_(start.mask * x + (1 - start.mask) * known)
                if watch is not None:
                    watch(i, expected)
            return self.decode(x)

    def _check(
        self,
        image: Tensor | None,
        mask: Tensor | None,
        strength: float,
        steps: int,
        height: int,
        width: int,
    ) -> None:
        """Raise UserError for what does not fit together, or this checkpoint."""
        factor = self.autoencoder.factor
        if height % factor or width % factor:
            raise UserError(f"pictures of {width}x{height}: both must be multiples of {factor}")
        if mask is not None and image is None:
            raise UserError("a mask was given without an image; expected both")
        if self.paints and (image is None or mask is None):
            raise UserError("this checkpoint paints into pictures: it needs --image and --mask")
        if image is not None and (not 0 < strength <= 1 or int(steps * strength) < 1):
            raise UserError(
                f"strength is {strength} and steps {steps}; expected a strength above 0, up to 1, "
                "and strength times steps at least 1"
            )

    def _start(
        self,
        rng: Rng,
        image: Tensor | None,
        mask: Tensor | None,
        strength: float,
        time: float,
        unscaled: bool,
        height: int,
        width: int,
    ) -> Start:
        """Return what B pictures begin from at a time."""
        factor, kept = self.autoencoder.factor, None
        shape = (self.autoencoder.latent, height // factor, width // factor)
        if image is not None:
            image = image.to(self.where).expand(len(rng), -1, -1, -1)
            if not (self.paints and strength == 1):  # else nothing of it is used
                kept = self.autoencoder.encode(image, rng.normal(*shape))
        noise = rng.normal(*shape)
        alpha, sigma = level(self.spacing.schedule, time)
        x = sigma * noise if unscaled else noise
        if kept is not None and strength < 1:
            x = alpha * kept + sigma * noise
        if mask is None or image is None:
            return Start(x, noise)
        mask = (mask.to(self.where) >= 0.5).float().expand(len(rng), -1, -1, -1)
        small = F.interpolate(mask, size=shape[1:])
        if not self.paints:
            return Start(x, noise, kept, small)
        masked = self.autoencoder.encode(image * (1 - mask), rng.normal(*shape))
        return Start(x, noise, told=torch.cat([small, masked], 1))

    def decode(self, latent: Tensor) -> Tensor:
        """Map latents (B, D, h, w) to pictures (B, 3, H, W) in [-1, 1], one after another."""
        bands = latent.shape[2] * latent.shape[3] > WHOLE**2
        with torch.inference_mode(), device.autocast(self.kind, self.where):
            parts = [self.autoencoder.decode(one[None], bands) for one in latent]
        return torch.cat(parts).clamp(-1, 1)

    def with_autoencoder(self, autoencoder: Autoencoder) -> StableDiffusion:
        """Return the same with another autoencoder."""
        return replace(self, autoencoder=autoencoder)

    def _denoiser(
        self,
        texts: Sequence[str],
        negative: str | None,
        guidance: Guidance,
        told: Tensor | None,
        size: tuple[int, int],
        reuse: Reuse | None,
        merge: float,
    ) -> Denoiser:
        """Return the denoiser of pictures under texts, guided away from a negative one."""
        count, away = len(texts), guidance.scale != 1
        if negative and not away:
            raise UserError(NOT_AWAY)
        read = self.reader([*texts, *[negative or ""] * (count if away else 0)])
        if away and negative is None and self.zeros:
            read = Embedded(
                vector=_emptied(read.vector, count), tokens=_emptied(read.tokens, count)
            )
        numbers = self._numbers(size, count, away)

        def predict(x: Tensor, t: float, text: Embedded) -> Tensor:
            alpha, sigma = level(self.spacing.schedule, t)
            given = x if told is None else torch.cat([x, told], 1)
            if device.channels_last(self.where, self.kind):
                given = given.contiguous(memory_format=torch.channels_last)
            time = torch.full((len(given),), t, dtype=torch.float64)
            assert text.tokens is not None
            facts = None if numbers is None else numbers[: len(text.tokens)]
            output = self.unet(given, time, text, facts, reuse, merge)
            x = for_each_text(x, output)
            if self.spacing.prediction == "sample":
                return output
            if self.spacing.prediction == "v_prediction":
                return alpha * x - sigma * output
            return (x - sigma * output) / alpha

        return guided(predict, read, guidance, self.spacing.schedule)

    def _numbers(self, size: tuple[int, int], count: int, guided: bool) -> Tensor | None:
        """Return what XL is told of the picture (B, 5 or 6): its size, that it is not cropped."""
        if not self.unet.numbers:
            return None
        if self.unet.numbers == 6:
            rows: list[list[float]] = [[*size, 0, 0, *size]] * 2
        elif self.unet.numbers == 5:  # the refiner: how beautiful, in place of the size to be
            rows = [[*size, 0, 0, 6.0], [*size, 0, 0, 2.5]]
        else:
            raise UserError(f"the U-Net is told {self.unet.numbers} numbers; expected 5 or 6")
        told = torch.tensor(rows[: 1 + guided], device=self.where, dtype=torch.float32)
        return told.repeat_interleave(count, 0)


def _emptied(part: Tensor | None, count: int) -> Tensor | None:
    """Return (2 count, ...) with zeros for what follows the first `count`."""
    return None if part is None else torch.cat([part[:count], torch.zeros_like(part[count:])])
