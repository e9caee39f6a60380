"""Claim 5: CycleGAN learns to redraw one designer's emoji in the other's style without pairs.

A is Noto Emoji, B is Twemoji, from the packaged `emoji`. The emoji of its training split are cut in
two by their first code point: Noto's drawings of one half and Twemoji's of the other are trained
on, so that no emoji is there by both designers. The test emoji, drawn by both, are only measured.

Each way of translating them is held against the true drawing of the other designer:

    identity      the picture as it is
    nearest       the training picture of the target domain nearest to it in features
    cyclegan      the translation

by the root mean squared difference of pixels (0 to 255), the mean distance of EfficientNet-Lite0
features, and, over all of them, FD-Lite0 to the target designer's test pictures. Identity is near
the truth where the designers agree, and has the wrong style; nearest has the right style and is
another emoji.

    python benchmarks/claims/cyclegan.py --minutes 60 --out runs/claim-cyclegan
"""

import argparse
import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import trilemma
from trilemma import data as pictures
from trilemma.data.named import PACKAGED
from trilemma.metrics.features import extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.metrics.neighbours import nearest
from trilemma.sampling import grid
from trilemma.translation import translate

DESIGNERS = ("noto", "twemoji")  # A, B


def write_domains(folder: Path) -> None:
    """Write trainA and trainB, which share no emoji, and testA and testB, which share all."""
    with zipfile.ZipFile(PACKAGED / "emoji.zip") as archive:
        for line in archive.read("metadata.jsonl").decode().splitlines():
            row = json.loads(line)
            designer, _, file = row["file_name"].partition("/")
            domain = DESIGNERS.index(designer)
            half = zlib.crc32(file[:-5].split("-")[0].encode()) % 2
            if row["split"] == "train" and half != domain:
                continue
            path = folder / f"{row['split']}{'AB'[domain]}" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(archive.read(row["file_name"]))).save(path, lossless=True)


def tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(images))


def measure(trained: trilemma.Trained, folder: Path, size: int) -> tuple[list[dict], Image.Image]:
    """Return a row for each way and direction, and a sheet: source, nearest, cyclegan, truth."""
    see = extractor("lite0", "cpu")
    train, test = (pictures.load(folder, split=split, size=size) for split in ("train", "test"))
    rows, shown = [], []
    for direction in ("a-to-b", "b-to-a"):
        source, truth, known = tensor(test.source), tensor(test.images), tensor(train.images)
        if direction == "b-to-a":
            source, truth, known = truth, source, tensor(train.source)
        index, _ = nearest(see(source).pooled, see(known).pooled)
        ways = {
            "identity": source,
            "nearest": known[index[:, 0]],
            "cyclegan": translate(trained, source, direction),
        }
        real = see(truth).pooled
        for name, images in ways.items():
            seen = see(images).pooled
            difference = (images.float() - truth.float()).square().flatten(1).mean(1).sqrt()
            rows.append(
                {
                    "direction": direction,
                    "way": name,
                    "pixel_rmse": float(difference.mean()),
                    "feature_distance": float((seen - real).norm(dim=1).mean()),
                    "fd_lite0": frechet_distance(statistics(seen), statistics(real)),
                }
            )
        some = torch.linspace(0, len(source) - 1, 24).long()
        four = (source, ways["nearest"], ways["cyclegan"], truth)
        shown.append(torch.stack([images[some] for images in four], 1).flatten(0, 1))
    return rows, grid(torch.cat(shown), 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/claim-cyclegan"))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="of training; else --images")
    length.add_argument("--images", type=int, help="of training; else the recipe's own length")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()

    folder = given.out / "emoji"
    if not folder.exists():
        write_domains(folder)
    trained = trilemma.train(
        "cyclegan",
        folder,
        out=given.out / "run",
        size=given.size,
        budget=given.minutes and 60 * given.minutes,
        images=given.images,
        seed=given.seed,
        overrides=given.set,
        resume=(given.out / "run" / "training").exists(),
    )
    rows, sheet = measure(trained, folder, given.size)
    sheet.save(given.out / "claim.png")
    about = {"size": given.size, "seed": given.seed, "set": given.set, **trained.progress}
    (given.out / "claim.json").write_text(json.dumps({**about, "rows": rows}, indent=1))
    print("| direction | way | pixel RMSE | feature distance | FD-Lite0 |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['direction']} | {row['way']} | {row['pixel_rmse']:.1f} "
            f"| {row['feature_distance']:.2f} | {row['fd_lite0']:.0f} |"
        )


if __name__ == "__main__":
    main()
