"""Pictures of any size enlarged by a trained super-resolution model.

A large picture is enlarged in tiles. Each is seen with a margin as wide as the network's reach, and
only what no border of its own can have touched is kept: the tiles are the whole, with no seams, to
rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from trilemma import device
from trilemma.batch import Condition, Rng, to_float, to_uint8
from trilemma.data.decode import read
from trilemma.data.listing import Unusable
from trilemma.data.named import find
from trilemma.drawing import check_free, write
from trilemma.errors import UserError
from trilemma.networks.srresnet import Generator
from trilemma.sampling import Trained

TILE = 128  # low resolution pixels of a tile without its margins


def enlarge(trained: Trained, images: Tensor, tile: int = TILE) -> Tensor:
    """Enlarge pictures.

    Args:
        trained: a model that enlarges.
        images: uint8 (N, C, h, w), C as the model's.
        tile: side of the parts enlarged at once.

    Returns:
        uint8 (N, C, factor h, factor w) on the CPU.

    Raises:
        UserError: the model does not enlarge, or not pictures of so many channels.
    """
    generator = _network(trained)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != generator.channels:
        raise UserError(
            f"the pictures are {images.dtype} of {tuple(images.shape)}; {trained.name} enlarges "
            f"uint8 pictures of {generator.channels} channels"
        )
    factor, reach = generator.factor, generator.reach
    n, channels, height, width = images.shape
    where = trained.where
    made = torch.empty(n, channels, factor * height, factor * width, dtype=torch.uint8)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            above, before = max(top - reach, 0), max(left - reach, 0)  # where the margin begins
            part = images[:, :, above : bottom + reach, before : right + reach]
            condition = Condition(n, source=to_float(part).to(where))
            with torch.inference_mode(), device.autocast(trained.dtype, where):
                drawn = trained.generator.sample(condition, Rng(range(n), where))
            y, x = factor * (top - above), factor * (left - before)
            made[:, :, factor * top : factor * bottom, factor * left : factor * right] = to_uint8(
                drawn[:, :, y : y + factor * (bottom - top), x : x + factor * (right - left)]
            ).cpu()
    return made


def enlarge_picture(trained: Trained, picture: Image.Image) -> Image.Image:
    """Enlarge a picture of mode L or RGB; the result is of the same mode.

    A model of grey pictures enlarges the luma of a coloured one, whose colours are enlarged
    bicubically. A model of coloured pictures sees a grey one as a coloured one.
    """
    generator = _network(trained)
    if generator.channels == 3:
        made = Image.fromarray(_array(enlarge(trained, _tensor(picture.convert("RGB")))))
        return made.convert(picture.mode)
    if picture.mode == "L":
        return Image.fromarray(_array(enlarge(trained, _tensor(picture)))[:, :, 0])
    y, *colours = picture.convert("YCbCr").split()
    size = (generator.factor * picture.width, generator.factor * picture.height)
    wide = [colour.resize(size, Image.Resampling.BICUBIC) for colour in colours]
    return Image.merge("YCbCr", [enlarge_picture(trained, y), *wide]).convert("RGB")


def upscale(
    trained: Trained, source: str | Path, out: str | Path
) -> tuple[list[Path], dict[str, str]]:
    """Enlarge a picture file, or all of a folder or zip, into `out` as PNGs of the same names.

    Returns:
        Their paths, and path -> reason of what cannot be used.

    Raises:
        UserError: the model does not enlarge; nothing can be used; `out` is a file, or holds a
            picture of such a name that was not drawn; two pictures have one name.
    """
    factor, out, path = _network(trained).factor, Path(out), Path(source).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder for the pictures")
    if path.is_file() and path.suffix.lower() != ".zip":
        content: dict[str, Callable[[], bytes | np.ndarray]] = {path.name: path.read_bytes}
        skipped: dict[str, str] = {}
    else:
        files = find(source)
        listing = files.listing()
        content = {item.path: partial(files.read, item.path) for item in listing.items}
        skipped = dict(listing.unusable)
    info = PngImagePlugin.PngInfo()
    info.add_text("trilemma", json.dumps({"upscale": factor, "recipe": trained.recipe}))
    written: dict[Path, str] = {}
    for name, get in content.items():
        target = (out / name).with_suffix(".png")
        if target in written:
            raise UserError(f"{name} and {written[target]} would both become {target}; rename one")
        check_free([target])
        try:
            picture = read(get(), "white")
        except Unusable as error:
            skipped[name] = str(error)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        write(enlarge_picture(trained, picture), target, info)
        written[target] = name
    if not written:
        told = next((f"{name}: {reason}" for name, reason in skipped.items()), "no pictures")
        raise UserError(f"{source} holds no picture that can be used ({told})")
    return list(written), skipped


def bicubic(low: Tensor, factor: int) -> Tensor:
    """Enlarge uint8 (N, C, h, w) bicubically (a = -1/2, as Pillow), the least one can do."""
    size = [factor * side for side in low.shape[2:]]
    return to_uint8(F.interpolate(to_float(low), size, mode="bicubic", antialias=True))


def factor(trained: Trained) -> int:
    """Return how much larger a model makes pictures. Raises UserError if it does not enlarge."""
    return _network(trained).factor


def _network(trained: Trained) -> Generator:
    if not trained.enlarges:
        raise UserError(f"{trained.name} does not enlarge pictures; train srresnet or srgan")
    return trained.model.generator  # type: ignore[return-value]


def _tensor(picture: Image.Image) -> Tensor:
    array = np.array(picture)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)[None]


def _array(images: Tensor) -> np.ndarray:
    return images[0].permute(1, 2, 0).contiguous().numpy()
