"""Pictures that are spoiled and restored by a model: how near they come, and sheets of them.

They are spoiled as in training: shrunk (SRGAN, `super-resolution`), without colours (`colourise`),
or with a part hidden (`inpainting`). Beside the model's stands what one has without a model: the
bicubic enlargement, the grey picture, the hole in mid grey.

- PSNR and SSIM between restored picture and original. Of enlarged ones as in the literature on
  super-resolution: luma (BT.601) without a border as wide as the factor; of others all channels.
- The Fréchet distance between all restored pictures and all originals, which asks for the look
  rather than the pixels: Ledig et al. 2017 is about the difference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trilemma import redraw, upscale
from trilemma.batch import Rng, to_float, to_uint8
from trilemma.conditioning import SOURCES, shrink, source_of
from trilemma.data import Dataset
from trilemma.drawing import grid
from trilemma.edit import Track
from trilemma.errors import UserError
from trilemma.metrics.features import Extractor
from trilemma.metrics.frechet import frechet_distance, rough, statistics
from trilemma.metrics.reference import thinned
from trilemma.metrics.restoration import WINDOW, luma, psnr, ssim
from trilemma.metrics.speed import speed
from trilemma.sampling import Trained

SHOWN = 16  # pictures on a sheet
MOST = 100.0  # decibels that a picture restored exactly counts for


class Restored(NamedTuple):
    """Pictures as they were given, without a model and by one; uint8 (N, C, H, W) each."""

    given: Tensor
    plain: Tensor
    drawn: Tensor


def restore(
    trained: Trained, images: Tensor, *, seed: int = 0, track: Track = iter, **options: Any
) -> Restored:
    """Spoil pictures as in training, and restore them.

    Args:
        trained: a model that enlarges, colours or fills holes.
        images: the originals, uint8 (N, C, H, W), of the shape it was trained on; of SRGAN of any.
        seed: of the first picture: of where holes are, and of what is drawn.
        track: shows progress.
        **options: of the family's `sample`.

    Raises:
        UserError: the model restores nothing; an unknown option.
    """
    original, streams = to_float(images), Rng(range(seed, seed + len(images)))
    if trained.enlarges:
        if options:
            raise UserError(f"{', '.join(options)}: {trained.name} takes no options to enlarge")
        factor = upscale.factor(trained)
        low = to_uint8(shrink(original, factor))
        made = [upscale.enlarge(trained, part) for part in track(low.split(redraw.BATCH))]
        return Restored(_wide(low, images), upscale.bicubic(low, factor), torch.cat(made))
    source = source_of(trained.model)
    if source is None:
        raise UserError(
            f"{trained.name} was not trained to restore pictures; train srresnet, srgan, "
            "super-resolution, colourise or inpainting"
        )
    spoiled = SOURCES[source.kind](original, streams, source.factor)
    if source.kind == "masked":
        given, hidden = to_uint8(spoiled[:, :-1]), spoiled[:, -1] > 0.5
        drawn = redraw.inpaint(trained, given, hidden, seed=seed, track=track, **options)[:, 0]
        return Restored(given, given, drawn)
    low = to_uint8(spoiled)
    drawn = redraw.repair(trained, low, seed=seed, track=track, **options)[:, 0]
    given = _wide(low, images)
    plain = upscale.bicubic(low, source.factor) if source.kind == "small" else given
    return Restored(given, plain, drawn)


def _wide(low: Tensor, images: Tensor) -> Tensor:
    """Show small or grey pictures in the shape of the originals, small ones in visible pixels."""
    return F.interpolate(low, images.shape[2:]).expand_as(images)


def likeness(made: Tensor, images: Tensor, factor: int | None = None) -> dict[str, float]:
    """Return the mean PSNR and SSIM of pictures, uint8 (N, C, H, W), to their originals.

    SSIM is left out of pictures that are smaller than its window.

    Args:
        made: the restored pictures.
        images: the originals.
        factor: of which pictures were enlarged; None if they were not.
    """
    a, b = (luma(made), luma(images)) if factor else (made.double(), images.double())
    border = factor or 0
    scores = {"psnr": float(psnr(a, b, border).clamp(max=MOST).mean())}
    if min(images.shape[2:]) - 2 * border >= WINDOW:
        scores["ssim"] = float(ssim(a, b, border).mean())
    return scores


def evaluate(
    trained: Trained,
    data: Dataset,
    see: Extractor,
    *,
    n: int = 5000,
    seed: int = 0,
    track: Track = iter,
    **options: Any,
) -> dict[str, Any]:
    """Measure how near restored pictures come to their originals, with the model and without.

    Args:
        trained: as for `restore`.
        data: the originals, of the shape the model was trained on.
        see: the features of the Fréchet distance.
        n: pictures at most, evenly spread over the data.
        seed: as for `restore`.
        track: shows progress.
        **options: of the family's `sample`.

    Returns:
        `scores`, those without the model with "plain" in their names; `speed`, as
        `metrics.speed.speed`; `protocol`; `warnings`.

    Raises:
        UserError: as `restore`; no pictures.
    """
    rows = thinned(len(data), n)
    if len(rows) < 2:
        raise UserError(f"{data.name} has {len(rows)} pictures in {data.split}; expected 2 or more")
    images = data.tensor(rows)
    made = restore(trained, images, seed=seed, track=track, **options)
    kind, factor = _task(trained)
    real = statistics(see(images, pooled_only=True).pooled)
    scores: dict[str, float] = {}
    for name, each in (("", made.drawn), ("-plain", made.plain)):
        scores |= {key + name: value for key, value in likeness(each, images, factor).items()}
        seen = statistics(see(each, pooled_only=True).pooled)
        scores[f"fd-{see.name}{name}"] = frechet_distance(seen, real)

    def draw(count: int) -> object:
        return restore(trained, images[:count], seed=seed, **options)

    protocol = see.protocol | {
        "data": data.name,
        "fingerprint": data.fingerprint,
        "split": data.split,
        "n": len(images),
        "size": list(data.shape),
        "spoiled": kind,
        "psnr_of": f"luma without a border of {factor}" if factor else "all channels",
        "plain": {"masked": "the hole in grey", "grey": "grey"}.get(kind, "bicubic"),
        "sampling": {"recipe": trained.name, "seen": trained.progress["seen"], "seed": seed}
        | ({} if trained.enlarges else trained.options(options)),
    }
    return {
        "scores": scores,
        "speed": speed(trained.model, draw, sorted({1, min(redraw.BATCH, len(images))})),
        "protocol": protocol,
        "warnings": rough(len(images), len(images)),
    }


def _task(trained: Trained) -> tuple[str, int | None]:
    """Return how pictures are spoiled, and by which factor they are shrunk if they are."""
    if trained.enlarges:
        return "small", upscale.factor(trained)
    source = source_of(trained.model)
    assert source is not None
    return source.kind, source.factor if source.kind == "small" else None


def sheet(trained: Trained, data: Dataset) -> Image.Image:
    """Lay out the first pictures in threes: what is given, what is drawn, the original."""
    images = data.tensor(slice(SHOWN))
    made = restore(trained, images)
    return grid(torch.stack([made.given, made.drawn, images], 1).flatten(0, 1), 6)
