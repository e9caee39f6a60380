"""Pictures drawn anew by a diffusion model: wholly but alike, in a part, beyond their borders.

- vary: noise of some strength is put on and removed again, by a way of its own (SDEdit).
- inpaint: what a mask hides is drawn, to fit the rest (RePaint, or a model trained with masks).
- outpaint: the canvas is extended; windows of the model's size, each half known, are inpainted from
  the picture outwards.
- repair: a model trained to draws what pictures lack: colours of grey ones, detail of small ones.

What is known is returned untouched, bit for bit. Picture i is drawn n times; number j of it has the
stream seed + i n + j. `track` is as in `trilemma.edit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trilemma.batch import Condition, Rng, to_float, to_uint8
from trilemma.conditioning import Source, source_of
from trilemma.data.decode import read
from trilemma.data.decode import read_mask as decode_mask
from trilemma.data.listing import Unusable
from trilemma.data.named import find
from trilemma.edit import BATCH, Track, check, inference
from trilemma.errors import UserError
from trilemma.model import HasRedrawing
from trilemma.sampling import Trained

Draw = Callable[[Tensor, Condition, Rng], Tensor]
"""uint8 (B, C, H, W) on the CPU, condition, rng -> uint8 (B, ...) on the CPU."""


def vary(
    trained: Trained,
    images: Tensor,
    strength: float = 0.6,
    n: int = 1,
    *,
    seed: int = 0,
    label: str | int | None = None,
    text: str | Sequence[str] | None = None,
    track: Track = iter,
    **options: Any,
) -> Tensor:
    """Draw pictures that are like the given ones.

    Args:
        trained: a diffusion model.
        images: uint8 (N, C, H, W).
        strength: the share of noise put on them, above 0; at 1 nothing is left of them.
        n: variations of each.
        seed: of all that is drawn.
        label: what they shall be; None says nothing.
        text: the same in words; of several, number j of each picture has the j-th, in turn.
        track: shows progress.
        **options: of the family's `sample`, `negative` among them: a text to go away from.

    Returns:
        uint8 (N, n, C, H, W).

    Raises:
        UserError: the model redraws no pictures; an unknown class or option; text for a model that
            reads none; the images are not of its shape; n below 1, or a strength that is not above
            0 and at most 1.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; expected more than 0 and at most 1")
    check(trained, images)
    model = _redrawing(trained)
    said, chosen = _asked(trained, n, label, text, options, "sample")

    def draw(part: Tensor, condition: Condition, rng: Rng) -> Tensor:
        drawn = model.vary(to_float(part).to(rng.device), strength, condition, rng, **chosen)
        return to_uint8(drawn).cpu()

    return _drawn(trained, images, n, seed, said, track, draw)


def inpaint(
    trained: Trained,
    images: Tensor,
    mask: Tensor,
    n: int = 1,
    *,
    seed: int = 0,
    label: str | int | None = None,
    text: str | Sequence[str] | None = None,
    track: Track = iter,
    **options: Any,
) -> Tensor:
    """Draw what a mask hides of pictures.

    Args:
        trained: a diffusion model.
        images: uint8 (N, C, H, W).
        mask: bool (H, W), true where it is to be drawn; or one for each picture, (N, H, W).
        n: pictures of each.
        seed: of all that is drawn.
        label: what they shall be; None says nothing.
        text: the same in words; of several, number j of each picture has the j-th, in turn.
        track: shows progress.
        **options: steps, resample (how often each is taken), and all that guides.

    Returns:
        uint8 (N, n, C, H, W), the same as `images` where nothing is hidden.

    Raises:
        UserError: as `vary`; a mask that is not of the pictures' size, or hides nothing.
    """
    check(trained, images)
    fits = mask.shape in (images.shape[2:], (len(images), *images.shape[2:]))
    if mask.dtype != torch.bool or not fits or not mask.any():
        raise UserError(
            f"the mask is {mask.dtype} of {tuple(mask.shape)} and hides {int(mask.sum())} pixels; "
            f"expected booleans of {tuple(images.shape[2:])}, some of them true, where to draw"
        )
    model = _redrawing(trained, filling=True)
    said, chosen = _asked(trained, n, label, text, options, "inpaint")
    draw = _painting(model, chosen)

    def paint(part: Tensor, condition: Condition, rng: Rng) -> Tensor:
        return draw(part[:, :-1], part[:, -1:].bool(), condition, rng)

    hidden = mask.expand(len(images), *mask.shape[-2:])[:, None].byte()
    return _drawn(trained, torch.cat([images, hidden], 1), n, seed, said, track, paint)


def outpaint(
    trained: Trained,
    images: Tensor,
    margins: tuple[int, int, int, int],
    n: int = 1,
    *,
    seed: int = 0,
    label: str | int | None = None,
    text: str | Sequence[str] | None = None,
    track: Track = iter,
    **options: Any,
) -> Tensor:
    """Draw what is beyond the borders of pictures.

    Args:
        trained: a diffusion model.
        images: uint8 (N, C, H, W).
        margins: pixels to add at the top, bottom, left and right.
        n: pictures of each.
        seed: of all that is drawn.
        label: what they shall be; None says nothing.
        text: the same in words; of several, number j of each picture has the j-th, in turn.
        track: shows progress.
        **options: as `inpaint`.

    Returns:
        uint8 (N, n, C, top + H + bottom, left + W + right).

    Raises:
        UserError: as `vary`; margins below 0, or all 0.
    """
    check(trained, images)
    top, bottom, left, right = margins
    if min(margins) < 0 or not any(margins):
        raise UserError(f"margins of {list(margins)} pixels: expected 0 or more, and some above 0")
    model = _redrawing(trained, filling=True)
    said, chosen = _asked(trained, n, label, text, options, "inpaint")
    draw = _painting(model, chosen)
    height, width = images.shape[2:]
    windows = [(y, x) for y in _places(top, bottom, height) for x in _places(left, right, width)]
    windows.sort(key=lambda at: abs(at[0] - top) / height + abs(at[1] - left) / width)

    def paint(part: Tensor, condition: Condition, rng: Rng) -> Tensor:
        canvas = F.pad(part, (left, right, top, bottom))
        hidden = F.pad(torch.zeros(height, width), (left, right, top, bottom), value=1).bool()
        for y, x in windows:
            place = (..., slice(y, y + height), slice(x, x + width))
            if hidden[place].any():
                mask = hidden[place].expand(len(part), 1, -1, -1)
                canvas[place] = draw(canvas[place], mask, condition, rng)
                hidden[place] = False
        return canvas

    return _drawn(trained, images, n, seed, said, track, paint)


def repair(
    trained: Trained,
    sources: Tensor,
    n: int = 1,
    *,
    seed: int = 0,
    label: str | int | None = None,
    text: str | Sequence[str] | None = None,
    track: Track = iter,
    **options: Any,
) -> Tensor:
    """Draw what pictures lack, by a model that was trained to.

    Args:
        trained: a diffusion model with a source: `colourise`, `super-resolution`.
        sources: uint8 (N, *source(trained).shape): grey ones, or small ones.
        n: pictures of each.
        seed: of all that is drawn.
        label: what they shall be; None says nothing.
        text: the same in words; of several, number j of each picture has the j-th, in turn.
        track: shows progress.
        **options: of the family's `sample`.

    Returns:
        uint8 (N, n, C, H, W).

    Raises:
        UserError: the model was not trained to; an unknown class or option; sources of another
            shape; n below 1.
    """
    expected = source(trained).shape
    if sources.dtype != torch.uint8 or tuple(sources.shape[1:]) != expected or not len(sources):
        raise UserError(
            f"the sources are {sources.dtype} of {tuple(sources.shape)}; {trained.name} draws from "
            f"uint8 pictures of {expected}"
        )
    said, chosen = _asked(trained, n, label, text, options, "sample")

    def draw(part: Tensor, condition: Condition, rng: Rng) -> Tensor:
        given = to_float(part).to(rng.device)
        told = replace(condition, source=given)
        return to_uint8(trained.generator.sample(told, rng, **chosen)).cpu()

    return _drawn(trained, sources, n, seed, said, track, draw)


def source(trained: Trained) -> Source:
    """Return what the model draws from.

    Raises:
        UserError: it was not trained to repair pictures, or to fill holes (`inpaint` does that).
    """
    found = source_of(trained.model)
    if found is None:
        raise UserError(
            f"{trained.name} was not trained to repair pictures; train colourise or "
            "super-resolution on such pictures as they shall become"
        )
    if found.kind == "masked":
        raise UserError(
            f"{trained.name} draws what a mask hides; use trilemma edit inpaint {trained.path} "
            "PICTURES --mask MASK --out DIR"
        )
    return found


def read_mask(mask: str | Path, pictures: str | Path, side: int) -> Tensor:
    """Read a mask for pictures: where it is white, or transparent if it has transparency, is drawn.

    It is cut and resized as the pictures are: the largest centred square, to side x side.

    Args:
        mask: an image file of any size, of the pictures' proportions.
        pictures: the picture file, folder or zip it is for.
        side: height and width of what the model draws.

    Returns:
        bool (side, side), true where to draw.

    Raises:
        UserError: it cannot be read, is not of the pictures' proportions, or hides nothing.
    """
    try:
        values = decode_mask(Path(mask).expanduser().read_bytes())
    except (OSError, Unusable) as error:
        raise UserError(f"mask {mask} cannot be read: {error}") from error
    hidden = values.point(lambda value: 255 if value >= 128 else 0)
    width, height = hidden.size
    for name, (w, h) in _sizes(pictures).items():
        if abs(width * h - height * w) > 0.02 * height * w:
            raise UserError(
                f"mask {mask} is {width} x {height} and {name} is {w} x {h}: a mask covers its "
                f"picture; make it {w} x {h}, or of these proportions"
            )
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    box = (left, top, left + square, top + square)
    small = hidden.resize((side, side), Image.Resampling.BOX, box=box)
    found = torch.from_numpy(np.asarray(small) >= 128)
    if not found.any():
        raise UserError(
            f"mask {mask} hides nothing of {side} x {side} pixels: what is to be drawn must be "
            "white, or transparent in a picture with transparency"
        )
    return found


def told(
    trained: Trained,
    given: dict[str, Any],
    label: str | int | None,
    text: str | Sequence[str] | None = None,
    verb: str = "sample",
) -> dict[str, Any]:
    """Return the complete options of a verb, as they are written down: `Trained.options`.

    Where nothing is said, nothing is guided by it, whatever the recipe's default.
    """
    said = (label, text, given.get("negative"), given.get("guidance"))
    if all(part is None for part in said):
        given = {**given, "guidance": 1.0}
    return trained.options(given, verb)


def _sizes(pictures: str | Path) -> dict[str, tuple[int, int]]:
    """Return the width and height of each picture that can be used, upright."""
    path = Path(pictures).expanduser()
    if path.is_file() and path.suffix.lower() != ".zip":
        contents: dict[str, Callable[[], Any]] = {path.name: path.read_bytes}
    else:
        files = find(pictures)
        names = [item.path for item in files.listing().items]
        contents = {name: partial(files.read, name) for name in names}
    sizes = {}
    for name, get in contents.items():
        try:
            sizes[name] = read(get(), "white").size
        except Unusable:
            continue  # told of where the pictures themselves are read
    return sizes


def _places(before: int, after: int, side: int) -> list[int]:
    """Return where windows begin on an axis: at the picture, and every half window outwards."""
    step = max(side // 2, 1)
    back = [max(before - k * step, 0) for k in range(1, -(-before // step) + 1)]
    ahead = [min(before + k * step, before + after) for k in range(1, -(-after // step) + 1)]
    return [before, *back, *ahead]


def _redrawing(trained: Trained, filling: bool = False) -> HasRedrawing:
    """Return the model as what redraws pictures; with `filling`, one trained with masks can too."""
    model = trained.model
    if not isinstance(model, HasRedrawing):
        raise UserError(
            f"{trained.name} is a {type(model).__name__}, which redraws no pictures; "
            "use a diffusion model, such as quick-diffusion"
        )
    masks = source_of(trained.model)
    fills = filling and masks is not None and masks.kind == "masked"
    if trained.repairs and not fills and source(trained):
        raise UserError(
            f"{trained.name} draws what given pictures lack and redraws none; use a diffusion "
            "model without a source, such as quick-diffusion"
        )
    return model


def _painting(
    model: HasRedrawing, chosen: dict[str, Any]
) -> Callable[[Tensor, Tensor, Condition, Rng], Tensor]:
    """Return (images, masks (B, 1, H, W), condition, rng) -> images, the known part untouched."""

    def paint(images: Tensor, mask: Tensor, condition: Condition, rng: Rng) -> Tensor:
        given, hidden = to_float(images).to(rng.device), mask.float().to(rng.device)
        drawn = to_uint8(model.inpaint(given, hidden, condition, rng, **chosen)).cpu()
        return torch.where(mask, drawn, images)

    return paint


def _asked(
    trained: Trained,
    n: int,
    label: str | int | None,
    text: str | Sequence[str] | None,
    options: dict[str, Any],
    verb: str,
) -> tuple[Condition, dict[str, Any]]:
    """Return what is said of the n pictures drawn of each, and the arguments of the family's verb.

    Raises:
        UserError: n below 1; an unknown class, text or option.
    """
    opened = trained.opened({name: value for name, value in options.items() if value is not None})
    chosen = trained.arguments({**told(trained, opened, label, text, verb), **opened})
    if n < 1:
        raise UserError(f"{n} pictures of each were asked for; expected at least 1")
    labels = None if label is None else trained.labels(n, label, opened.get("classifier"))
    clip = opened.get("clip")
    texts = None if text is None and clip is None else trained.texts(n, text, clip)
    return Condition(n, labels, text=texts), chosen


def _drawn(
    trained: Trained,
    images: Tensor,
    n: int,
    seed: int,
    said: Condition,
    track: Track,
    draw: Draw,
) -> Tensor:
    """Draw n of each picture, of which `said` is said, in batches: uint8 (N, n, ...)."""
    made, start = [], 0
    parts: Sequence[Tensor] = images.repeat_interleave(n, dim=0).split(BATCH)
    with inference(trained) as where:
        for part in track(parts):
            places = [(start + k) % n for k in range(len(part))]
            condition = Condition(
                len(part),
                label=None if said.label is None else said.label[places].to(where),
                text=None if said.text is None else [said.text[k] for k in places],
            )
            rng = Rng(range(seed + start, seed + start + len(part)), where)
            made.append(draw(part, condition, rng))
            start += len(part)
    return torch.cat(made).unflatten(0, (len(images), n))
