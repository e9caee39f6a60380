"""Draw the gallery of a family page: pictures of each of several runs beside its name.

    python tools/gallery.py docs/images/gans.png runs/dcgan runs/sngan wgan=runs/other ...
    python tools/gallery.py docs/images/repaired.png runs/colourise --data emoji

The same seeds for all, each run's own defaults; classes in turn where there are any. Of a run that
repairs pictures: test pictures of the data in threes, what is given, what is drawn, the original.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import trilemma
from trilemma import data as pictures
from trilemma import restoring
from trilemma.drawing import grid

WIDTH, COLUMNS, ROWS = 500, 10, 2  # of a row of pictures in pixels; pictures of a run
LEAD = 130  # pixels for the name


def row(run: str, name: str, data: str | None) -> Image.Image:
    """Return the pictures of a run with its name to the left."""
    trained = trilemma.load(run)
    if trained.repairs or trained.enlarges:
        test = pictures.load(data, split="test", size=trained.data["shape"][1])
        some = np.linspace(0, len(test) - 1, restoring.SHOWN).astype(int)  # of all kinds
        drawn = restoring.sheet(trained, replace(test, images=test.images[some]))
    else:
        drawn = grid(trained.sample(COLUMNS * ROWS, seed=0), COLUMNS)
    drawn = drawn.resize((WIDTH, WIDTH * drawn.height // drawn.width), Image.Resampling.NEAREST)
    made = Image.new("RGB", (LEAD + drawn.width, drawn.height + 6), "white")
    made.paste(drawn.convert("RGB"), (LEAD, 0))
    font = ImageFont.load_default(14)
    ImageDraw.Draw(made).text((4, drawn.height // 2 - 9), name, fill="black", font=font)
    return made


def main() -> None:
    """Write the picture that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out")
    parser.add_argument("runs", nargs="+", help="a run's folder, or NAME=FOLDER")
    parser.add_argument("--data", help="whose test pictures are repaired")
    given = parser.parse_args()
    pairs = [run.rpartition("=") for run in given.runs]
    rows = [
        row(run, name or run.rstrip("/").rpartition("/")[2], given.data) for name, _, run in pairs
    ]
    height = sum(made.height for made in rows)
    sheet = Image.new("RGB", (rows[0].width, height), "white")
    top = 0
    for made in rows:
        sheet.paste(made, (0, top))
        top += made.height
    sheet.save(given.out, optimize=True)


if __name__ == "__main__":
    main()
