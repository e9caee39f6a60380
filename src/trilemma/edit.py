"""Changing pictures with a trained model: the same verbs for every family that can.

A model that maps pictures to latents and back (`HasLatents`) can restore a picture from its latent,
walk from one picture to another, move a picture along the difference of two groups, and tell which
pictures it finds strange. Latents are (B, ...) tensors whose meaning is the family's own; here they
are points on which three formulas act, with w the angle between a and b:

    linear        (1 - s) a + s b
    spherical     sin((1 - s) w) / sin w a + sin(s w) / sin w b
    arithmetic    z + strength (mean of z_plus - mean of z_minus)

Spherical: Shoemake 1985, "Animating Rotation with Quaternion Curves"; White 2016, "Sampling
Generative Networks", section 2.1: latents drawn from a Gaussian lie near a sphere, and the straight
line between two of them leaves it. Arithmetic: Radford, Metz, Chintala 2015, section 6.3.2; Larsen
et al. 2016, "Autoencoding beyond pixels using a learned similarity metric".

Two verbs need no latents: an autoregressive model completes a picture of which the upper part is
given (`HasCompletion`), and noise is removed by a diffusion model (`HasDenoising`), or by any
autoencoder whose latents have no room for it.

`track` of these functions is called with each sequence of batches that is gone through, to show
progress: `rich.progress.track`, for example.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from trilemma import device
from trilemma.batch import Condition, Rng, to_float, to_uint8
from trilemma.data import Dataset
from trilemma.drawing import check_free, grid, to_pil, write
from trilemma.errors import UserError
from trilemma.metrics.likelihood import bits_per_dimension
from trilemma.metrics.restoration import noise_deviation
from trilemma.model import (
    HasCompletion,
    HasCostlyLikelihood,
    HasDenoising,
    HasLatents,
    HasLikelihood,
    Model,
)
from trilemma.sampling import Trained

BATCH = 32
SHOWN = 32  # pictures on a sheet

Track = Callable[[Sequence[Tensor]], Iterable[Tensor]]


def reconstruct(trained: Trained, images: Tensor, track: Track = iter) -> Tensor:
    """Return what is left of uint8 images (N, C, H, W) after encoding and decoding.

    Raises:
        UserError: the model has no latents, or the images are not of its shape.
    """
    return decode(trained, encode(trained, images, track), track)


def sheet(trained: Trained, data: Dataset) -> Image.Image:
    """Lay out the first pictures, each with what is left of it to its right."""
    images = data.tensor(slice(SHOWN))
    return grid(torch.stack([images, reconstruct(trained, images)], 1).flatten(0, 1), 8)


def interpolate(
    trained: Trained,
    first: Tensor,
    second: Tensor,
    steps: int = 8,
    path: str = "spherical",
    track: Track = iter,
) -> Tensor:
    """Walk from each picture of `first` to its partner in `second`.

    Args:
        trained: a model with latents.
        first: uint8 (N, C, H, W).
        second: of the same shape.
        steps: pictures on each way, both ends included; at least 2.
        path: "spherical" or "linear".
        track: shows progress.

    Returns:
        uint8 (N, steps, C, H, W).

    Raises:
        UserError: as `reconstruct`; an unknown path; fewer than 2 steps.
    """
    if path not in PATHS:
        raise UserError(f"no path '{path}'; there is {', '.join(PATHS)}")
    if steps < 2 or first.shape != second.shape:
        raise UserError(
            f"{steps} steps between {len(first)} and {len(second)} pictures: expected at least 2 "
            "steps and as many pictures on one side as on the other"
        )
    a, b = encode(trained, first, track), encode(trained, second, track)
    way = [PATHS[path](a, b, i / (steps - 1)) for i in range(steps)]
    pictures = decode(trained, torch.stack(way, 1).flatten(0, 1), track)
    return pictures.unflatten(0, (len(first), steps))


def arithmetic(
    trained: Trained,
    images: Tensor,
    plus: Tensor,
    minus: Tensor,
    strength: float = 1.0,
    track: Track = iter,
) -> Tensor:
    """Move pictures along the difference between the mean latents of two groups.

    Args:
        trained: a model with latents.
        images: uint8 (N, C, H, W), to be changed.
        plus: uint8 (P, C, H, W), pictures that have what is to be added.
        minus: uint8 (M, C, H, W), pictures that lack it.
        strength: how much of the difference is added; negative takes it away.
        track: shows progress.

    Returns:
        uint8 (N, C, H, W).

    Raises:
        UserError: as `reconstruct`; a strength that is not finite.
    """
    if not math.isfinite(strength):
        raise UserError(f"strength is {strength}; expected a finite number, such as 1 or -0.5")
    direction = encode(trained, plus, track).mean(0) - encode(trained, minus, track).mean(0)
    return decode(trained, encode(trained, images, track) + strength * direction, track)


def complete(
    trained: Trained,
    images: Tensor,
    keep: float = 0.5,
    n: int = 4,
    *,
    seed: int = 0,
    label: str | int | None = None,
    track: Track = iter,
    **options: Any,
) -> Tensor:
    """Keep the upper part of pictures and draw the rest anew.

    Args:
        trained: a model that draws pictures from the top, an autoregressive one.
        images: uint8 (N, C, H, W).
        keep: the share of their height that is kept.
        n: completions of each picture; number j of picture i has the stream seed + i n + j.
        seed: of all that is drawn.
        label: the class of all pictures; None lets the kept part tell, where there are classes.
        track: shows progress.
        **options: of the family's `sample`.

    Returns:
        uint8 (N, n, C, H, W).

    Raises:
        UserError: the model completes no pictures; an unknown class or option; the images are not
            of its shape; no row or every row would be kept, or n is below 1.
    """
    model = trained.model
    if not isinstance(model, HasCompletion):
        raise UserError(
            f"{trained.name} is a {type(model).__name__}, which completes no pictures; "
            "use an autoregressive model, such as pixelcnn"
        )
    chosen, height = trained.options(options), trained.data["shape"][1]
    rows = round(keep * height) if math.isfinite(keep) else 0
    if n < 1 or not 0 < rows < height:
        raise UserError(
            f"{n} completions that keep {rows} of {height} rows were asked for; expected at least "
            f"1 completion, and 1 to {height - 1} rows"
        )
    known = None if label is None else trained.labels(1, label)
    made, start = [], seed
    with inference(trained) as where:
        for part in track(_batches(trained, images.repeat_interleave(n, dim=0))):
            labels = None if known is None else known.expand(len(part)).to(where)
            rng = Rng(range(start, start + len(part)), where)
            condition = Condition(len(part), labels)
            drawn = model.complete(to_float(part).to(where), rows, condition, rng, **chosen)
            made.append(to_uint8(drawn).cpu())
            start += len(part)
    return torch.cat(made).unflatten(0, (len(images), n))


def denoise(
    trained: Trained, images: Tensor, deviation: float | None = None, track: Track = iter
) -> Tensor:
    """Remove Gaussian noise from pictures.

    Args:
        trained: a diffusion model, or one whose latents have no room for noise; best an autoencoder
            that was trained on noisy pictures, `denoising-ae`.
        images: uint8 (N, C, H, W).
        deviation: of the noise, on the scale of [-1, 1]; None estimates each picture's. Models with
            latents do not ask.
        track: shows progress.

    Returns:
        uint8 (N, C, H, W).

    Raises:
        UserError: the model removes no noise, or the images are not of its shape.
    """
    model = trained.model
    if trained.repairs:
        raise UserError(
            f"{trained.name} draws from given pictures and removes no noise; use denoising-ae, "
            "another autoencoder or a diffusion model without a source"
        )
    if not isinstance(model, HasDenoising):
        if not isinstance(model, HasLatents) or _exact(model):
            raise UserError(
                f"{trained.name} is a {type(model).__name__}, which removes no noise; "
                "use denoising-ae, another autoencoder or a diffusion model"
            )
        return reconstruct(trained, images, track)
    made = []
    with inference(trained) as where:
        for part in track(_batches(trained, images)):
            noisy = to_float(part).to(where)
            level = noise_deviation(noisy)
            if deviation is not None:
                level = torch.full_like(level, deviation)
            try:
                made.append(to_uint8(model.restore(noisy, level)).cpu())
            except ValueError as error:
                raise UserError(f"{trained.name} removes no noise: {error}") from error
    return torch.cat(made)


def add_noise(images: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """Return uint8 images (N, C, H, W) with Gaussian noise, clipped to 0 to 255.

    The deviation is on the scale of [-1, 1]; image i has the stream seed + i.
    """
    noise = Rng(range(seed, seed + len(images))).normal(*images.shape[1:])
    return to_uint8(to_float(images) + deviation * noise)


def score(trained: Trained, images: Tensor, track: Track = iter) -> tuple[Tensor, str]:
    """Return how strange each picture is to the model (N,), higher is stranger, and by what.

    By what the latents lose of it, the root of the mean squared error on the scale of 0 to 255,
    where the model has latents; but in bits per dimension where it tells an exact likelihood, for
    the latents of a flow lose nothing. (A likelihood alone favours smooth pictures whatever they
    show: Nalisnick et al. 2019, "Do Deep Generative Models Know What They Don't Know?".)

    Raises:
        UserError: the model has neither, or the images are not of its shape.
    """
    model = trained.model
    if isinstance(model, HasLatents) and not _exact(model):
        lost = reconstruct(trained, images, track).float() - images.float()
        return lost.square().flatten(1).mean(1).sqrt(), "reconstruction error (0-255)"
    if not isinstance(model, HasLikelihood):
        raise UserError(
            f"{trained.name} has neither latents nor likelihoods, by which pictures are scored; "
            "train a vae, for example"
        )
    check(trained, images)
    with inference(trained) as where:
        bits = bits_per_dimension(model, images, batch=BATCH, where=where)
    return bits.float(), "likelihood (bits/dimension)"


def encode(trained: Trained, images: Tensor, track: Track = iter) -> Tensor:
    """Return the latents (N, ...) of uint8 images (N, C, H, W); errors as `reconstruct`."""
    model = _latents(trained)
    with inference(trained) as where:
        parts = track(_batches(trained, images))
        return torch.cat([model.encode(to_float(part).to(where)).float() for part in parts])


def decode(trained: Trained, latents: Tensor, track: Track = iter) -> Tensor:
    """Return the uint8 images (N, C, H, W) of latents (N, ...).

    Raises:
        UserError: the model has no latents.
        ValueError: latents of another shape.
    """
    model = _latents(trained)
    with inference(trained) as where:
        parts = track(latents.split(BATCH))
        return torch.cat([to_uint8(model.decode(part.to(where))).cpu() for part in parts])


def save(
    trained: Trained,
    images: Tensor,
    out: str | Path,
    facts: dict[str, Any],
    columns: int,
    sheet: Tensor | None = None,
) -> list[Path]:
    """Write uint8 images (N, C, H, W) as numbered PNGs and `grid.png`; return their paths.

    Every PNG carries `facts` and the model's recipe as JSON under `trilemma`. The grid is of
    `sheet` (M, C, H, W) where given, else of the first 16 rows of the images.

    Raises:
        UserError: `out` is a file, or holds a picture of such a name that was not drawn.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder for the pictures")
    out.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_text("trilemma", json.dumps({**facts, "recipe": trained.recipe}))
    paths = [out / f"{i:05d}.png" for i in range(len(images))]
    check_free(paths)
    for path, image in zip(paths, images, strict=True):
        write(to_pil(image), path, info)
    sheet = images[: 16 * columns] if sheet is None else sheet
    write(grid(sheet, columns), out / "grid.png", info)
    return [*paths, out / "grid.png"]


def linear(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Return the points (N, ...) at `share` of the straight way from a to b."""
    return torch.lerp(a, b, share)


def spherical(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Return the points (N, ...) at `share` of the great circle's way from a to b.

    Where a and b point the same way the way is straight.
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = cosine.acos()[:, None]  # (N, 1)
    curved = ((1 - share) * angle).sin() * flat_a + (share * angle).sin() * flat_b
    sine = angle.sin()
    straight = torch.lerp(flat_a, flat_b, share)
    return torch.where(sine > 1e-4, curved / sine.clamp(min=1e-4), straight).view_as(a)


PATHS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "spherical": spherical,
    "linear": linear,
}


def _latents(trained: Trained) -> HasLatents:
    if trained.repairs:
        raise UserError(
            f"{trained.name} draws from given pictures, so a picture has no latents to edit; "
            f"use trilemma edit repair {trained.path} PICTURES --out DIR"
        )
    if not isinstance(trained.model, HasLatents):
        raise UserError(
            f"{trained.name} is a {type(trained.model).__name__}, which has no latents to edit; "
            "use an autoencoder, a GAN, a flow or a diffusion model"
        )
    return trained.model


def _exact(model: Model) -> bool:
    """Whether the model tells exact likelihoods: if it has latents too, they lose nothing."""
    told = isinstance(model, HasLikelihood) and not isinstance(model, HasCostlyLikelihood)
    return told and not model.bound


def _batches(trained: Trained, images: Tensor) -> Sequence[Tensor]:
    """Cut uint8 images into batches."""
    check(trained, images)
    return images.split(BATCH)


def check(trained: Trained, images: Tensor) -> None:
    """Raise UserError unless images are uint8 (N, C, H, W) of the model's shape, N at least 1."""
    expected = tuple(trained.data["shape"])
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise UserError(
            f"the pictures are {images.dtype} of {tuple(images.shape)}; {trained.name} was trained "
            f"on uint8 pictures of {expected}"
        )
    if not len(images):
        raise UserError("there are no pictures; give at least one")


@contextmanager
def inference(trained: Trained) -> Iterator[torch.device]:
    """Work under the number format the model was trained in; gives its device.

    Not in inference mode: a family may search its latents by gradients.
    """
    with torch.no_grad(), device.autocast(trained.dtype, trained.where):
        yield trained.where
