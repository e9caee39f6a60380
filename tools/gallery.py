"""Draw the gallery of a family page: a row of pictures for each of several runs, with its name.

    python tools/gallery.py docs/images/gans.png runs/dcgan runs/sngan wgan=runs/other ...

The same seeds for all, each run's own defaults; classes in turn where there are any.
"""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw, ImageFont

import trilemma
from trilemma.drawing import grid

SIDE, COLUMNS, ROWS = 48, 10, 2  # of a picture in pixels; pictures of a run
LEAD = 130  # pixels for the name


def row(run: str, name: str) -> Image.Image:
    """Return the pictures of a run with its name to the left."""
    images = trilemma.load(run).sample(COLUMNS * ROWS, seed=0)
    drawn = grid(images, COLUMNS)
    drawn = drawn.resize((COLUMNS * SIDE, ROWS * SIDE), Image.Resampling.NEAREST)
    made = Image.new("RGB", (LEAD + drawn.width, drawn.height + 6), "white")
    made.paste(drawn.convert("RGB"), (LEAD, 0))
    font = ImageFont.load_default(14)
    ImageDraw.Draw(made).text((4, drawn.height // 2 - 9), name, fill="black", font=font)
    return made


def main() -> None:
    """Write the picture that the command line names."""
    out, *runs = sys.argv[1:]
    pairs = [given.rpartition("=") for given in runs]
    rows = [row(run, name or run.rstrip("/").rpartition("/")[2]) for name, _, run in pairs]
    height = sum(made.height for made in rows)
    sheet = Image.new("RGB", (rows[0].width, height), "white")
    top = 0
    for made in rows:
        sheet.paste(made, (0, top))
        top += made.height
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main()
