"""One picture file to uint8 pixels of the wanted size.

The rule, the same for every picture: the first frame; turned as its EXIF orientation says; brought
to 8 bits (16-bit grey is divided by 257, not clipped); transparent parts composed on the
background; the largest centred square cut out; resized to the wanted side by Lanczos filtering,
which is antialiased, after a reduction by whole numbers where the picture is more than 3 times too
large. JPEGs far too large are decoded at a reduced size by the discrete cosine transform itself.
`tiles` cuts a picture up instead, and resizes nothing; `fitted` cuts out of it the largest part of
the nearest of several proportions.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageColor

from trilemma.data.buckets import Size, nearest
from trilemma.data.listing import Unusable

MOST_PIXELS = 89_478_485  # Pillow's own warning level: a quarter of a gigabyte of RGB

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)

# What Pillow warns of (large pictures, odd EXIF) is checked here, or does no harm to the pixels.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its pixels are decoded; its sides when turned upright."""

    width: int
    height: int
    mode: str
    format: str


def read_header(content: bytes | np.ndarray) -> Header:
    """Return the header of a picture; raises Unusable with the reason."""
    image = _open(content)
    width, height = image.size
    # Of a PNG without it at the beginning, the orientation is known when all is decoded.
    if (image.format != "PNG" or "exif" in image.info) and _orientation(image) in _SIDEWAYS:
        width, height = height, width
    header = Header(width, height, image.mode, image.format or "array")
    if image.format == "PNG":
        try:
            image.verify()  # decoding does not look at the checksums of the pixels
        except Exception as error:  # as in decode
            raise Unusable(f"truncated or damaged: {error}") from None
    return header


def decode(
    content: bytes | np.ndarray, side: int, background: str, grey: bool = False
) -> np.ndarray:
    """Return the picture as uint8 (C, side, side).

    C is 1 when `grey` asks for it or the picture has no colour, else 3. Raises Unusable.
    """
    return fitted(content, [(side, side)], background, grey)


def fitted(
    content: bytes | np.ndarray, sizes: Sequence[Size], background: str, grey: bool = False
) -> np.ndarray:
    """Return the picture as uint8 (C, H, W), in that of `sizes` whose proportions are nearest.

    C is as from `decode`. Raises Unusable.
    """
    image = _open(content)
    try:
        if image.format == "JPEG":
            side = max(max(size) for size in sizes)
            image.draft(None, (2 * side, 2 * side))  # decode at no less than twice the side
        image = _upright(image, background, grey)
        width, height = image.size
        high, wide = nearest(sizes, height, width)
        # The largest part of the wanted proportions.
        if width * high > height * wide:
            part = max(1, round(height * wide / high)), height
        else:
            part = width, max(1, round(width * high / wide))
        left, top = (width - part[0]) // 2, (height - part[1]) // 2
        box = (left, top, left + part[0], top + part[1])
        if (width, height) != (wide, high):
            lanczos = Image.Resampling.LANCZOS
            image = image.resize((wide, high), lanczos, box=box, reducing_gap=3.0)
    except Unusable:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise Unusable(f"truncated or damaged: {error}") from None
    return _pixels(image)


def read(content: bytes | np.ndarray, background: str, grey: bool = False) -> Image.Image:
    """Return the whole picture, upright, in mode L or RGB; raises Unusable."""
    image = _open(content)
    try:
        return _upright(image, background, grey)
    except Unusable:
        raise
    except Exception as error:  # as in decode
        raise Unusable(f"truncated or damaged: {error}") from None


def read_mask(content: bytes) -> Image.Image:
    """Return a mask, upright, in mode L, for white: its transparency if it has some, else its grey.

    Raises Unusable.
    """
    image = _open(content)
    try:
        orientation, values = _orientation(image), _eight_bits(image, "white").convert("L")
        alpha = image.convert("RGBA").getchannel("A") if _transparent(image) else None
    except Unusable:
        raise
    except Exception as error:  # as in decode
        raise Unusable(f"truncated or damaged: {error}") from None
    if alpha is not None and alpha.getextrema() != (255, 255):
        values = ImageChops.invert(alpha)
    return values.transpose(_TURNS[orientation]) if orientation in _TURNS else values


def tiles(
    content: bytes | np.ndarray, side: int, background: str, grey: bool = False
) -> list[np.ndarray]:
    """Cut the picture into tiles that do not overlap, each as from `decode`, in rows.

    What is left over at the borders is shared by both sides. Raises Unusable, also when the
    picture is smaller than a tile.
    """
    image = read(content, background, grey)
    columns, rows = image.width // side, image.height // side
    if not columns or not rows:
        raise Unusable(
            f"smaller than the crop: {image.width} x {image.height} pixels, {side} x {side} needed"
        )
    left, top = (image.width - columns * side) // 2, (image.height - rows * side) // 2
    corners = [(left + x * side, top + y * side) for y in range(rows) for x in range(columns)]
    return [_pixels(image.crop((x, y, x + side, y + side))) for x, y in corners]


def _upright(image: Image.Image, background: str, grey: bool) -> Image.Image:
    """Return `image` turned as it says, in mode L or RGB."""
    orientation = _orientation(image)
    image = _eight_bits(image, background)
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    return image.convert("L") if grey and image.mode != "L" else image


def _pixels(image: Image.Image) -> np.ndarray:
    """Return (1, H, W) where the picture has no colour, else (3, H, W)."""
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        return pixels[None]
    pixels = pixels.transpose(2, 0, 1)
    grey = np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])
    return pixels[:1] if grey else pixels


def _open(content: bytes | np.ndarray) -> Image.Image:
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    if not content:
        raise Unusable("empty file (0 bytes)")
    try:
        image = Image.open(io.BytesIO(content))
    except Image.UnidentifiedImageError:
        raise Unusable(f"not a picture: {_kind(content)}") from None
    except Image.DecompressionBombError:
        raise Unusable(f"decompression bomb: more than {2 * MOST_PIXELS:,} pixels") from None
    except Exception as error:  # as in decode
        raise Unusable(f"damaged header: {error}") from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise Unusable(
            f"decompression bomb: {width} x {height} pixels, more than {MOST_PIXELS:,} in all"
        )
    return image


def _kind(content: bytes) -> str:
    """Say what a file that is no picture looks like."""
    start = content[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if start.startswith((b"<svg", b"<?xml")):
        return "SVG or XML"
    if b"ftyphei" in start or b"ftypmif1" in start:
        return "HEIC (convert it to JPEG)"
    if not any(content[:512]):
        return "only zero bytes"
    return f"starts with {content[:8]!r}"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF: the picture itself may be good
        return 1


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in image.info


def _eight_bits(image: Image.Image, background: str) -> Image.Image:
    """Return `image` in mode L or RGB, without transparency."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_scaled(np.asarray(image)))
    if _transparent(image):
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, ImageColor.getrgb(background))
        page.alpha_composite(image)
        return page.convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _scaled(values: np.ndarray) -> np.ndarray:
    """Bring integers or floats of wider range to uint8.

    16-bit integers keep their scale: 65535 is white. 32-bit integers that fit in 16 bits are taken
    as 16-bit. Floats within [0, 1] keep that scale. Anything else is stretched from its least to
    its greatest value.
    """
    if not np.isfinite(values).all():
        raise Unusable("holds values that are not finite")
    least, most = float(values.min()), float(values.max())
    if values.dtype.kind in "iu" and least >= 0 and most <= 65535:
        scale, offset = 257.0, 0.0
    elif values.dtype.kind == "f" and least >= 0 and most <= 1:
        scale, offset = 1 / 255, 0.0
    else:
        scale, offset = max(most - least, 1e-12) / 255, least
    return np.rint((values.astype(np.float64) - offset) / scale).astype(np.uint8)
