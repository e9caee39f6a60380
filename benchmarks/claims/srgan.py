"""Claim 4: SRResNet has the highest PSNR, SRGAN the pictures nearest to real ones.

Trains srresnet on the training photographs of a folder, then srgan from it, and measures both and
bicubic enlargement on tiles of the test photographs: PSNR and SSIM of luma without a border as wide
as the factor, and FD-Lite0 between enlarged and original tiles.

    python benchmarks/claims/srgan.py --data PHOTOS --minutes 60 --out runs/claim-srgan
"""

import argparse
import json
from pathlib import Path

import torch

import trilemma
from trilemma import data as pictures
from trilemma import upscale
from trilemma.batch import to_float, to_uint8
from trilemma.metrics.features import extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.models.srgan import shrink
from trilemma.sampling import grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of photographs")
    parser.add_argument("--out", type=Path, default=Path("runs/claim-srgan"))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="of training, for each of the two")
    length.add_argument("--images", type=int, help="of training, for each of the two")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of both")
    parser.add_argument("--content", default="vgg", help="of srgan: vgg or pixels")
    given = parser.parse_args()

    models = {}
    for name in ("srresnet", "srgan"):
        out = given.out / name
        models[name] = trilemma.train(
            name,
            given.data,
            out=out,
            size=given.size,
            budget=given.minutes and 60 * given.minutes,
            images=given.images,
            seed=given.seed,
            overrides=[*given.set, *[f"model.content={given.content}"] * (name == "srgan")],
            resume=(out / "training").exists(),
            init=given.out / "srresnet" if name == "srgan" else None,
        )
    test = pictures.load(given.data, split="test", size=given.size, multiple=4, tiles=True)
    images = test.tensor(slice(None))
    factor = models["srgan"].model.factor
    low = to_uint8(shrink(to_float(images), factor))
    scores = {name: upscale.evaluate(model, images) for name, model in models.items()}
    made = {"bicubic": upscale.bicubic(low, factor)}
    made |= {name: upscale.enlarge(model, low) for name, model in models.items()}
    see = extractor("lite0", "cpu")
    real = statistics(see(images).pooled)
    rows = []
    for name, enlarged in made.items():
        numbers = scores["srgan"]["bicubic"] if name == "bicubic" else scores[name]["model"]
        distance = frechet_distance(statistics(see(enlarged).pooled), real)
        rows.append({"way": name, **numbers, "fd_lite0": distance})
    some = torch.linspace(0, len(images) - 1, 12).long()
    shown = [part[some] for part in (*made.values(), images)]
    grid(torch.stack(shown, 1).flatten(0, 1), 8).save(given.out / "claim.png")
    about = {"size": given.size, "factor": factor, "tiles": len(images), "set": given.set}
    (given.out / "claim.json").write_text(json.dumps({**about, "rows": rows}, indent=1))
    print("| way | PSNR | SSIM | FD-Lite0 of tiles |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['way']} | {row['psnr']:.2f} | {row['ssim']:.4f} | {row['fd_lite0']:.1f} |")


if __name__ == "__main__":
    main()
