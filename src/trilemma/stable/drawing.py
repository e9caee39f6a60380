"""Pictures of a checkpoint into a folder, with the recipe of each written into it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from trilemma import drawing
from trilemma.batch import Rng, to_uint8
from trilemma.data.decode import read, read_mask
from trilemma.data.listing import Unusable
from trilemma.errors import UserError
from trilemma.networks.tiny_autoencoder import TinyAutoencoder
from trilemma.stable.pipeline import StableDiffusion
from trilemma.stable.rectified import Rectified


def read_image(path: Path, size: tuple[int, int] | None, factor: int, grey: bool = False) -> Tensor:
    """Read a picture, upright, as float (1, C, H, W): colours in [-1, 1], grey in [0, 1].

    Args:
        path: of the picture.
        size: width and height to bring it to; its own, cut to multiples of `factor`, if None.
        factor: see `size`.
        grey: read a mask.

    Raises:
        UserError: it cannot be read.
    """
    picture = _opened(path, grey)
    width, height = size or (side // factor * factor for side in picture.size)
    if not width or not height:
        raise UserError(f"{path} is {picture.size[0]}x{picture.size[1]}: too small a picture")
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.array(picture)).float() / 255
    return values[None, None] if grey else values.permute(2, 0, 1)[None] * 2 - 1


def _opened(path: Path, grey: bool) -> Image.Image:
    try:
        content = path.read_bytes()
        return read_mask(content) if grey else read(content, "white").convert("RGB")
    except (OSError, Unusable) as error:
        raise UserError(f"{path} cannot be read as a picture: {error}") from error


def check_mask(mask: Path, image: Path) -> None:
    """Raise UserError for a mask that is not of a picture's proportions, or hides nothing of it."""
    hidden, (width, height) = _opened(mask, grey=True), _opened(image, grey=False).size
    if abs(hidden.width * height - hidden.height * width) > 0.02 * hidden.height * width:
        raise UserError(
            f"mask {mask} is {hidden.width} x {hidden.height} and {image} is {width} x {height}: a "
            f"mask covers its picture; make it {width} x {height}, or of these proportions"
        )
    if np.asarray(hidden).max() < 128:
        raise UserError(
            f"mask {mask} hides nothing: what is to be drawn must be white, or transparent in a "
            "picture with transparency"
        )


def takes(stable: StableDiffusion | Rectified) -> list[str]:
    """Return the options of a checkpoint's `draw` that `save` hands on."""
    own = ("texts", "rng", "height", "width", "watch", "own")
    return [name for name in inspect.signature(stable.draw).parameters if name not in own]


def save(
    stable: StableDiffusion | Rectified,
    path: Path,
    texts: Sequence[str],
    out: Path,
    *,
    n: int = 1,
    seed: int = 0,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    image: Path | None = None,
    mask: Path | None = None,
    preview: TinyAutoencoder | None = None,
    told: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[Path]:
    """Draw `n` pictures of texts, in turn, into `out`, and `grid.png` at the end; yield each path.

    Picture i draws from the stream of seed + i: it does not depend on `n` or `batch`.

    Args:
        stable: the checkpoint.
        path: it was read from; written into the pictures.
        texts: at least one.
        out: the folder.
        n: how many pictures.
        seed: of the first.
        batch: pictures drawn at once.
        size: width and height.
        image: to begin from.
        mask: white where to draw.
        preview: shows the picture expected, after each step, in `preview.png`.
        told: what else was asked for; written into the pictures.
        options: of `StableDiffusion.draw`.

    Raises:
        UserError: as `StableDiffusion.draw`; `out` is a file, or holds a picture of such a name
            that was not drawn; a mask that is not of the picture's proportions, or hides nothing.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder for the images")
    if not texts:
        raise UserError('this checkpoint draws texts: say what, with --text "..."')
    factor = stable.multiple
    if image is not None:
        options["image"] = read_image(image, size, factor)
        if mask is not None:
            sides = options["image"].shape[:1:-1]  # width, height
            check_mask(mask, image)
            options["mask"] = read_image(mask, sides, factor, grey=True)
    elif mask is not None:
        raise UserError("--mask says where to draw in a picture; give the picture with --image")
    elif options.get("strength") is not None:
        raise UserError("--strength says how far a picture is given up; give it with --image")
    drawing.check_free(out / f"{i:05d}.png" for i in range(n))
    if size is not None and image is None:
        options["width"], options["height"] = size
    out.mkdir(parents=True, exist_ok=True)
    if preview is not None:
        small = stable.with_autoencoder(preview)

        def watch(step: int, expected: Tensor) -> None:
            shown = drawing.grid(to_uint8(small.decode(expected)).cpu())
            shown.save(out / "preview.png")

        options["watch"] = watch
    plain = {
        k: v for k, v in options.items() if k not in ("watch", "image", "mask") and v is not None
    }
    plain |= {k: str(v) for k, v in {"image": image, "mask": mask}.items() if v is not None}
    plain |= {k: v for k, v in (told or {}).items() if v}
    kept: list[Tensor] = []
    for start in range(0, n, batch):
        seeds = range(seed + start, seed + min(start + batch, n))
        asked = [texts[(each - seed) % len(texts)] for each in seeds]
        drawn = stable.draw(asked, Rng(seeds, stable.where), **options)
        if not drawn.isfinite().all():
            raise UserError(
                f"{path} drew pictures that are not finite; try --option precision=fp32"
            )
        for one, text, picture in zip(seeds, asked, to_uint8(drawn).cpu(), strict=True):
            facts = {"checkpoint": str(path), "text": text, "seed": one, "sample": plain}
            name = out / f"{one - seed:05d}.png"
            drawing.write(drawing.to_pil(picture), name, _metadata(stable, facts, picture))
            kept.append(picture)
            yield name
    facts = {
        "checkpoint": str(path),
        "text": list(texts),
        "seed": seed,
        "count": n,
        "sample": plain,
    }
    sheet = drawing.grid(torch.stack(kept[:100]))
    drawing.write(sheet, out / "grid.png", _metadata(stable, facts, kept[0]))
    yield out / "grid.png"


def _metadata(
    stable: StableDiffusion | Rectified, facts: Mapping[str, Any], picture: Tensor
) -> PngImagePlugin.PngInfo:
    """Return all facts as JSON under `trilemma`, and `parameters` as other tools read them."""
    info = PngImagePlugin.PngInfo()
    info.add_text("trilemma", json.dumps(facts))
    options = facts["sample"]
    said = {
        "Steps": options.get("steps", stable.steps),
        "Sampler": options.get("solver", stable.solver),
        "CFG scale": options.get("guidance", stable.guidance),
        "Seed": facts["seed"],
        "Size": f"{picture.shape[2]}x{picture.shape[1]}",
        "Model": Path(facts["checkpoint"]).stem,
        "Denoising strength": options.get("strength"),
    }
    line = ", ".join(f"{key}: {value}" for key, value in said.items() if value is not None)
    text = facts["text"] if isinstance(facts["text"], str) else " | ".join(facts["text"])
    negative = options.get("negative")
    unwanted = f"Negative prompt: {negative}\n" if negative else ""
    info.add_text("parameters", f"{text}\n{unwanted}{line}")
    return info
