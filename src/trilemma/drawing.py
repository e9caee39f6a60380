"""Pictures into files: PNGs that carry their recipe, and sheets of many."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from trilemma.batch import Rng
from trilemma.errors import UserError
from trilemma.sampling import Trained

GAP = 2  # pixels between pictures on a sheet


def to_pil(image: Tensor) -> Image.Image:
    """Convert one uint8 (C, H, W) image, C of 1 or 3, to a PIL image."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def check_free(paths: Iterable[Path]) -> None:
    """Raise UserError if a file is there that no drawing wrote: it is not ours to replace."""
    for path in paths:
        if not path.exists():
            continue
        try:
            with Image.open(path) as there:
                ours = "trilemma" in there.info
        except OSError:
            ours = False
        if not ours:
            raise UserError(f"{path} is there, and Trilemma did not draw it; give another --out")


def write(picture: Image.Image, path: Path, info: PngImagePlugin.PngInfo) -> None:
    """Write a PNG, all or nothing. Raises OSError, with the path, where there is no room."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        picture.save(temporary, "PNG", pnginfo=info)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Lay out uint8 (N, C, H, W) images in rows on white, `GAP` pixels apart.

    `columns` None makes a near-square grid.
    """
    n, channels, height, width = images.shape
    columns = min(n, columns or int(n**0.5 + 0.999))
    rows = -(-n // columns)
    size = (channels, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    sheet = torch.full(size, 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[:, top : top + height, left : left + width] = image
    return to_pil(sheet)


def captioned(
    images: Tensor, texts: Sequence[str], columns: int | None = None, least: int = 96
) -> Image.Image:
    """Lay out uint8 (N, C, H, W) images in rows on white, each over its text.

    Small pictures are enlarged by a whole factor to `least` pixels or more, so that there is room
    for words.
    """
    n, _, height, width = images.shape
    columns = min(n, columns or int(n**0.5 + 0.999))
    factor = max(1, -(-least // width))
    height, width = factor * height, factor * width
    font = ImageFont.load_default(10)
    lines = [textwrap.wrap(text, max(8, width // 6))[:3] for text in texts]
    below = 12 * max(map(len, lines), default=0) + 6
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * (width + 8), rows * (height + below + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left, top = i % columns * (width + 8) + 4, i // columns * (height + below + 4)
        sheet.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + height + 2), "\n".join(lines[i]), "black", font, spacing=2)
    return sheet


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Lay out sheets of any sizes one below the other on white, 4 `GAP` pixels apart."""
    width = max(sheet.width for sheet in sheets)
    height = sum(sheet.height + 4 * GAP for sheet in sheets) - 4 * GAP
    whole = Image.new(sheets[0].mode, (width, height), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height + 4 * GAP
    return whole


def save(
    trained: Trained,
    n: int,
    out: str | Path,
    *,
    seed: int = 0,
    label: str | int | None = None,
    attributes: Sequence[str] | None = None,
    text: str | Sequence[str] | None = None,
    batch: int | None = None,
    **options: Any,
) -> Iterator[Path]:
    """Draw `n` images into `out` as numbered PNGs and, at the end, `grid.png`; yield each path.

    Every PNG carries its full recipe as JSON under `trilemma` and a line under `parameters` in the
    form that other tools read. Drawings of the same numbers are replaced.

    Raises:
        UserError: as `Trained.batches`; `out` is a file, or holds another picture of such a name.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder for the images")
    options = trained.opened(options)
    chosen, judge = trained.options(options), options.get("classifier")
    labels = trained.labels(n, label, judge)
    has = trained.attributes(Rng(range(seed, seed + n)), attributes)
    texts = trained.texts(n, text, options.get("clip"))
    names, traits = (judge or trained).data["label_names"], trained.data["attribute_names"]
    kept: list[Tensor] = []
    digits = max(5, len(str(n - 1)))
    paths = [out / f"{i:0{digits}d}.png" for i in range(n)]
    check_free(paths)
    index = 0
    asked: dict[str, Any] = {"label": label, "attributes": attributes, "text": text, **options}
    for images in trained.batches(n, seed=seed, batch=batch, **asked):
        out.mkdir(parents=True, exist_ok=True)
        for image in images:
            facts = {
                "seed": seed + index,
                "label": None if labels is None else names[int(labels[index])],
                "attributes": None
                if has is None
                else [name for name, bit in zip(traits, has[index], strict=True) if bit],
                "text": None if texts is None else texts[index],
                "sample": chosen,
                "recipe": trained.recipe,
                "progress": trained.progress,
            }
            path = paths[index]
            write(to_pil(image), path, _metadata(trained, facts))
            if index < 100:
                kept.append(image)
            index += 1
            yield path
    sheet = {"seed": seed, "count": n, "sample": chosen, "recipe": trained.recipe}
    if texts is None:
        columns = 10 if labels is not None and len(kept) >= 10 else None
        picture = grid(torch.stack(kept), columns)
    else:
        different = len(dict.fromkeys(texts))
        columns = different if 1 < different <= 10 else None
        picture = captioned(torch.stack(kept), texts[: len(kept)], columns)
    write(picture, out / "grid.png", _metadata(trained, sheet))
    yield out / "grid.png"


def _metadata(trained: Trained, facts: dict[str, Any]) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("trilemma", json.dumps(facts))
    grid = facts["sample"].get("grid")
    height, width = facts["sample"].get("size") or trained.data["shape"][1:]
    said = {
        "Steps": facts["sample"].get("steps"),
        "Sampler": facts["sample"].get("solver"),
        "Schedule type": grid if grid is None or isinstance(grid, str) else "tuned",
        "CFG scale": facts["sample"].get("guidance"),
        "Seed": facts["seed"],
        "Size": f"{width}x{height}",
        "Model": trained.name,
    }
    line = ", ".join(f"{key}: {value}" for key, value in said.items() if value is not None)
    asked = ", ".join(part for part in (facts.get("label"), facts.get("text")) if part)
    negative = facts["sample"].get("negative")
    away = f"\nNegative prompt: {negative}" if negative else ""
    info.add_text("parameters", f"{asked}{away}\n{line}")
    return info
