"""Pictures changed by way of CLIP's embedding of them: variations, blends, changes by words.

Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents", section 3:
what is drawn of a picture's embedding z keeps what CLIP knows of it, and all else is drawn anew.

- `variations` (3.1): several pictures of the same z.
- `blend` (3.2): pictures of the embeddings on the way from z_1 to z_2, along the sphere.
- `change` (3.3): pictures of z turned towards the difference of two texts' embeddings.

Within a row the noise is the same, so that what changes is z alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilemma.batch import Condition, Rng, to_float, to_uint8
from trilemma.conditioning import ClipImage
from trilemma.edit import BATCH, check, inference, spherical
from trilemma.errors import UserError
from trilemma.model import Reads
from trilemma.models.unclip import UnCLIP, clip_of
from trilemma.sampling import Trained

Track = Callable[[Iterable[Any]], Iterable[Any]]


def variations(
    trained: Trained,
    images: Tensor,
    n: int = 4,
    *,
    seed: int = 0,
    track: Track = iter,
    **options: Any,
) -> Tensor:
    """Draw pictures of which CLIP thinks as it does of the given ones.

    Args:
        trained: an UnCLIP, or its decoder alone.
        images: uint8 (N, C, H, W).
        n: variations of each.
        seed: of all that is drawn.
        track: shows progress.
        **options: of the model's `sample`.

    Returns:
        uint8 (N, n, C, H, W).

    Raises:
        UserError: a model that draws no embeddings' pictures; images not of its shape; n below 1;
            an unknown option.
    """
    if n < 1:
        raise UserError(f"asked for {n} variations of each picture; expected at least 1")
    z = embed(trained, images)
    noises = torch.arange(seed, seed + len(z) * n)
    return _drawn(trained, z.repeat_interleave(n, 0), noises, track, options).unflatten(0, (-1, n))


def blend(
    trained: Trained,
    first: Tensor,
    second: Tensor,
    n: int = 8,
    *,
    seed: int = 0,
    track: Track = iter,
    **options: Any,
) -> Tensor:
    """Draw the way from pictures to others; arguments and errors as `variations`.

    Returns:
        uint8 (N, n, C, H, W), from what is like the first to what is like the second.
    """
    if len(first) != len(second) or n < 2:
        raise UserError(
            f"{n} pictures from {len(first)} to {len(second)} were asked for; expected at least "
            "2, and as many pictures at both ends"
        )
    ends = embed(trained, first), embed(trained, second)
    shares = torch.linspace(0, 1, n)
    z = torch.stack([F.normalize(spherical(*ends, float(s)), dim=1) for s in shares], 1)
    return _rows(trained, z, seed, track, options)


def change(
    trained: Trained,
    images: Tensor,
    before: str,
    after: str,
    n: int = 5,
    strength: float = 0.5,
    *,
    seed: int = 0,
    track: Track = iter,
    **options: Any,
) -> Tensor:
    """Draw pictures as one text rather than another would have them; errors as `variations`.

    The difference of the texts' embeddings, made a unit vector, is what z is turned to, by up to
    `strength` of the way (the paper: 0.25 to 0.5).

    Returns:
        uint8 (N, n, C, H, W), unchanged to changed the most.
    """
    if n < 2 or not 0 < strength <= 1:
        raise UserError(
            f"{n} pictures up to {strength} were asked for; expected at least 2, up to more than 0 "
            "and at most 1"
        )
    clip = _clip(trained)
    with inference(trained):
        texts = clip.embed_texts([before, after])
    if torch.equal(texts[0], texts[1]):
        raise UserError(f"'{before}' and '{after}' are the same to CLIP; say what changes")
    towards = F.normalize(texts[1:] - texts[:1], dim=1).cpu()
    z = embed(trained, images)
    shares = torch.linspace(0, strength, n)
    turned = [spherical(z, towards.expand_as(z), float(share)) for share in shares]
    return _rows(trained, F.normalize(torch.stack(turned, 1), dim=2), seed, track, options)


def embed(trained: Trained, images: Tensor) -> Tensor:
    """Return the unit embeddings (N, D) of uint8 images (N, C, H, W), on the CPU.

    Raises:
        UserError: a model that draws no embeddings' pictures; images not of its shape.
    """
    clip = _clip(trained)
    check(trained, images)
    with inference(trained) as where:
        parts = [clip.embed_images(to_float(part).to(where)) for part in images.split(BATCH)]
    return torch.cat(parts).cpu()


def _clip(trained: Trained) -> Reads:
    model = trained.model
    if not any(isinstance(part, ClipImage) for part in model.modules()):
        raise UserError(
            f"{trained.name} draws nothing of CLIP's embeddings; use a run of unclip-decoder, or "
            "what trilemma join made of one"
        )
    return clip_of(model.decoder if isinstance(model, UnCLIP) else model)


def _rows(trained: Trained, z: Tensor, seed: int, track: Track, options: dict[str, Any]) -> Tensor:
    """Draw embeddings (N, n, D), each row with one noise."""
    noises = torch.arange(seed, seed + len(z)).repeat_interleave(z.shape[1])
    return _drawn(trained, z.flatten(0, 1), noises, track, options).unflatten(0, (-1, z.shape[1]))


def _drawn(
    trained: Trained, z: Tensor, noises: Tensor, track: Track, options: dict[str, Any]
) -> Tensor:
    chosen = trained.arguments({**trained.options(options), **trained.opened(options)})
    drawn = []
    with inference(trained) as where:
        for part in track(range(0, len(z), BATCH)):
            some = slice(part, part + BATCH)
            told = Condition(len(z[some]), embedding=z[some].to(where))
            image = trained.generator.sample(told, Rng(noises[some], where), **chosen)
            drawn.append(to_uint8(image).cpu())
    return torch.cat(drawn)
