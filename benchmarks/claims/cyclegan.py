"""Claim 5: CycleGAN learns to redraw one designer's emoji in the other's style without pairs.

A is Noto Emoji, B is Twemoji, from the packaged `emoji`. The emoji of its training split are cut in
two by their first code point: Noto's drawings of one half and Twemoji's of the other are trained
on, so that no emoji is there by both designers. The test emoji, drawn by both, are only measured.

Each way of translating them is held against the true drawing of the other designer:

    identity      the picture as it is
    nearest       the training picture of the target domain nearest to it in features
    random        any training picture of the target domain
    cyclegan      the translation

by the root mean squared difference of pixels (0 to 255), the mean distance of EfficientNet-Lite0
features, the share of pictures that are nearer to the truth in features than identity is, and, over
all of them, FD-Lite0 and KD-Lite0 (the kernel distance, which so few pictures do not bias) to the
target designer's test pictures. Identity is near the truth where the designers agree, and has the
wrong style; nearest and random have the right style and are other emoji.

Networks are smaller than the recipe's, draw a change of their picture (`skip`), and the rate is
twice as high: minutes on a CPU.

    python benchmarks/claims/cyclegan.py
"""

import io
import json
import zipfile
import zlib
from pathlib import Path

import common
import torch
from PIL import Image

import trilemma
from trilemma import data as pictures
from trilemma.data.named import PACKAGED
from trilemma.drawing import grid
from trilemma.metrics.features import extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.metrics.kernel import kernel_distance
from trilemma.metrics.neighbours import nearest
from trilemma.metrics.reference import thinned
from trilemma.translation import translate

DESIGNERS = ("noto", "twemoji")  # A, B
SHOWN = 12  # emoji of each direction
COLUMNS = (
    "direction", "way", "pixel RMSE", "feature distance", "nearer than identity", "FD-Lite0",
    "1000 KD-Lite0",
)  # fmt: skip
SMALL = [
    *(f"model.{way}.{what}" for way in ("a_to_b", "b_to_a") for what in ("blocks=3", "skip=true")),
    "train.optimizer.lr=4e-4", "train.grids=0",
]  # fmt: skip


def write_domains(folder: Path) -> None:
    """Write trainA and trainB, which share no emoji, and testA and testB, which share all."""
    with zipfile.ZipFile(PACKAGED / "emoji.zip") as archive:
        for line in archive.read("metadata.jsonl").decode().splitlines():
            row = json.loads(line)
            designer, _, file = row["file_name"].partition("/")
            domain = DESIGNERS.index(designer)
            half = zlib.crc32(Path(file).stem.split("-")[0].encode()) % 2
            if row["split"] == "train" and half != domain:
                continue
            path = folder / f"{row['split']}{'AB'[domain]}" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(archive.read(row["file_name"]))).save(path, lossless=True)


def measure(
    trained: trilemma.Trained, folder: Path, size: int
) -> tuple[list[tuple[str, ...]], int, Image.Image]:
    """Return a row for each direction and way, the pairs measured, and a sheet.

    The sheet's rows are source, nearest, cyclegan, truth; above A to B, below B to A.
    """
    see = extractor("lite0")
    train, test = (pictures.load(folder, split=split, size=size) for split in ("train", "test"))
    domains = {
        name: [torch.tensor(data.source), torch.tensor(data.images)]
        for name, data in (("train", train), ("test", test))
    }
    rows, shown = [], []
    for direction, step in (("a-to-b", 1), ("b-to-a", -1)):
        source, truth = domains["test"][::step]
        known = domains["train"][::step][1]
        index, _ = nearest(*(see(x, pooled_only=True).pooled for x in (source, known)))
        ways = {
            "identity": source,
            "nearest": known[index[:, 0]],
            "random": known[thinned(len(known), len(source))],
            "cyclegan": translate(trained, source, direction),
        }
        real = see(truth, pooled_only=True).pooled
        apart = {}
        for way, images in ways.items():
            seen = see(images, pooled_only=True).pooled
            apart[way] = (seen - real).norm(dim=1)
            pixels = (images.float() - truth.float()).square().flatten(1).mean(1).sqrt().mean()
            nearer = (apart[way] < apart["identity"]).float().mean()
            rows.append(
                (
                    " to ".join(DESIGNERS[::step]),
                    way,
                    f"{pixels:.1f}",
                    f"{apart[way].mean():.2f}",
                    "-" if way == "identity" else f"{nearer:.0%}",
                    f"{frechet_distance(statistics(seen), statistics(real)):.0f}",
                    f"{1000 * kernel_distance(seen, real)[0]:.1f}",
                )
            )
        some = torch.linspace(0, len(source) - 1, SHOWN).long()
        shown += [images[some] for images in (source, ways["nearest"], ways["cyclegan"], truth)]
    return rows, len(source), grid(torch.cat(shown), SHOWN)


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument(
        "--images", type=int, default=20_000, help="training pictures of each designer"
    )
    parser.add_argument("--size", type=int, default=32, help="side of the pictures")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = common.RUNS / "cyclegan" / "emoji"
    if not folder.exists():
        write_domains(folder)
    patch = 1 if given.size <= 32 else 2  # critics see patches of about half the side
    trained = common.train(
        "cyclegan", folder, "cyclegan", f"{given.size}-seed{given.seed}",
        size=given.size, seed=given.seed, images=given.images,
        overrides=[*SMALL, *(f"model.critic_{domain}.depth={patch}" for domain in "ab")],
    )  # fmt: skip
    rows, pairs, sheet = measure(trained, folder, given.size)
    given.out.mkdir(parents=True, exist_ok=True)
    sheet.save(given.out / "cyclegan.png")
    common.publish(
        f"emoji at {given.size} pixels, {given.images:,} "
        f"pictures seen, seed {given.seed}; {pairs} test emoji by both designers.",
        COLUMNS,
        rows,
    )


if __name__ == "__main__":
    main()
