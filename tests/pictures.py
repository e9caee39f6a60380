"""Small folders of pictures, made on the fly, for tests of everything that reads pictures."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 40), mode: str = "RGB") -> Image.Image:
    """A picture with a coloured gradient and a disc: different for every seed."""
    rng = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[:height, :width] / max(size)
    low, high, disc = rng.integers(0, 256, (3, 3))
    ramp = (x * rng.random() + y * rng.random())[..., None]
    pixels = low + (high - low) * np.clip(ramp, 0, 1)
    centre, radius = rng.uniform(0.2, 0.8, 2), rng.uniform(0.1, 0.3)
    pixels[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = disc
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def save(image: Image.Image, path: Path, **options) -> Path:
    """Save `image`, making the folders above `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    """The file's bytes."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def folder(path: Path, count: int = 12, size: tuple[int, int] = (40, 40), seed: int = 0) -> Path:
    """`count` unlabelled PNGs."""
    for k in range(count):
        save(picture(seed + k, size), path / f"{k:04d}.png")
    return path


def class_folders(
    path: Path, classes: dict[str, int] | None = None, size: tuple[int, int] = (40, 40)
) -> Path:
    """PNGs in a folder for each class: {"cats": 6, "dogs": 6} when not said."""
    seed = 0
    for name, count in (classes or {"cats": 6, "dogs": 6}).items():
        folder(path / name, count, size, seed)
        seed += 1000
    return path


def captioned(path: Path, count: int = 8) -> Path:
    """PNGs with metadata.jsonl of captions."""
    folder(path, count)
    rows = [{"file_name": f"{k:04d}.png", "text": f"disc number {k}"} for k in range(count)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def translation(path: Path, count: int = 6) -> Path:
    """trainA, trainB, testA, testB: discs to noise."""
    for k, name in enumerate(("trainA", "trainB", "testA", "testB")):
        folder(path / name, count + k if name.startswith("train") else 2, seed=1000 * k)
    return path


def zipped(source: Path, target: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """All of the folder `source` as a zip."""
    with zipfile.ZipFile(target, "w", compression) as archive:
        for path in sorted(source.rglob("*")):
            archive.write(path, path.relative_to(source))
    return target


def bomb_png(width: int = 60_000, height: int = 60_000) -> bytes:
    """A small PNG that says it is huge: 3.6 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_000_000), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def bad_files(path: Path) -> dict[str, str]:
    """Write 15 files that cannot be used into `path`; return {name: a word of the reason}."""
    good = picture(1, (200, 200))
    png, jpeg, webp, gif = (encoded(good, f) for f in ("PNG", "JPEG", "WEBP", "GIF"))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    contents: dict[str, tuple[bytes, str]] = {
        "bad_truncated.png": (png[: len(png) // 2], "truncated"),
        "bad_truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "bad_truncated.webp": (webp[: len(webp) // 2], ""),
        "bad_truncated.gif": (gif[: len(gif) // 2], "truncated"),
        "bad_header_only.png": (png[:20], ""),
        "bad_flipped.png": (bytes(flipped), "damaged"),
        "bad_zero.jpg": (b"", "empty"),
        "bad_zeros.bmp": (bytes(5000), "zero bytes"),
        "bad_text.png": (b"this is no picture at all\n" * 20, "not a picture"),
        "bad_page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        "bad_drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        "bad_bomb.png": (bomb_png(), "bomb"),
        "bad_archive.gif": (b"PK\x03\x04" + bytes(range(200)), "not a picture"),
        "bad_tiff.tif": (b"II*\0" + bytes(range(100)), ""),
    }
    for name, (content, _) in contents.items():
        (path / name).write_bytes(content)
    (path / "bad_link.png").symlink_to(path / "nowhere.png")
    return {name: word for name, (_, word) in contents.items()} | {"bad_link.png": "cannot be read"}
