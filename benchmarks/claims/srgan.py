"""Claim 4: SRResNet has the highest PSNR, SRGAN the pictures nearest to real ones.

Ledig et al. (2017), "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial
Network", tables 1 and 2: of bicubic enlargement, SRResNet and SRGAN, SRResNet has the highest PSNR
and SSIM, and people find SRGAN's pictures the best. In place of people, FD-Lite0 between enlarged
and original tiles.

Trains srresnet on tiles of the training photographs, then srgan from it, four times larger in both,
and measures both and bicubic enlargement on tiles of the test photographs: PSNR and SSIM of luma
without a border as wide as the factor, and FD-Lite0. Networks are smaller than the paper's, and
content is the error of pixels, the paper's SRGAN-MSE: with VGG's features, --content vgg, a step
takes ten times as long, and a few hundred steps only spoil the colours.

PHOTOS is a folder of photographs, in `train` and `test` or all in one (some are then held out);
what is smaller than a tile is left out. They should be sharp at their full size: to what is out of
focus nothing can be added.

    python benchmarks/claims/srgan.py --data PHOTOS
"""

import common
import torch

from trilemma import data as pictures
from trilemma import restoring, upscale
from trilemma.batch import to_float, to_uint8
from trilemma.drawing import grid
from trilemma.metrics.features import extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.metrics.reference import thinned
from trilemma.models.srgan import shrink

SMALL = ["model.generator.width=32", "model.generator.blocks=4", "train.grids=0"]
SHOWN = 8  # tiles


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument(
        "--images",
        type=int,
        nargs=2,
        default=[24_000, 8_000],
        metavar="N",
        help="tiles that srresnet and srgan are trained on",
    )
    parser.add_argument("--data", required=True, help="folder of photographs")
    parser.add_argument("--size", type=int, default=64, help="side of the tiles")
    parser.add_argument("--content", default="pixels", help="of srgan: pixels or vgg")
    parser.add_argument("--n", type=int, default=1000, help="test tiles")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    name = f"{given.size}-seed{given.seed}"
    shared = {"size": given.size, "seed": given.seed}
    srresnet = common.train(
        "srresnet", given.data, "srgan", f"srresnet-{name}", **shared,
        images=given.images[0], overrides=[
            *SMALL, "train.optimizer.type=muon", "train.optimizer.lr=5e-3",
            "train.optimizer.adam_lr=1e-3", "train.schedule=cosine",
        ],
    )  # fmt: skip
    srgan = common.train(
        "srgan", given.data, "srgan", f"srgan-{given.content}-{name}", **shared,
        images=given.images[1], overrides=[
            *SMALL, "model.critic.width=32", f"model.content={given.content}", "train.batch=8",
            "train.optimizer.lr=2e-4", "train.watches=0",
        ],
        init=srresnet.path,
    )  # fmt: skip
    models = {"srresnet": srresnet, "srgan": srgan}
    test = pictures.load(given.data, split="test", size=given.size, multiple=4, tiles=True)
    images = test.tensor(thinned(len(test), given.n))
    factor = srgan.model.factor
    low = to_uint8(shrink(to_float(images), factor))
    made = {"bicubic": upscale.bicubic(low, factor)}
    made |= {way: upscale.enlarge(model, low) for way, model in models.items()}
    see = extractor("lite0")
    real = statistics(see(images, pooled_only=True).pooled)
    rows = []
    for way, enlarged in made.items():
        numbers = restoring.likeness(enlarged, images, factor)
        distance = frechet_distance(statistics(see(enlarged, pooled_only=True).pooled), real)
        seen = f"{models[way].progress['seen']:,}" if way in models else "-"
        cells = (f"{numbers['psnr']:.2f}", f"{numbers['ssim']:.4f}", f"{distance:.1f}")
        rows.append((way, seen, *cells))
    some = torch.linspace(0, len(images) - 1, SHOWN).long()
    coarse = low[some].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    shown = [coarse, *(enlarged[some] for enlarged in made.values()), images[some]]
    given.out.mkdir(parents=True, exist_ok=True)
    grid(torch.cat(shown), SHOWN).save(given.out / "srgan.png")
    common.publish(
        f"{given.data}, tiles of {given.size} pixels enlarged {factor} times, "
        f"seed {given.seed}, content of srgan: {given.content}; {len(images)} tiles "
        f"of the test photographs.",
        ("way", "tiles seen", "PSNR", "SSIM", "FD-Lite0 of tiles"),
        rows,
    )


if __name__ == "__main__":
    main()
