"""Claim 18: CLIP's gradient makes a model that knows no words follow them, at a price in time.

Nichol et al. (2022), "GLIDE", section 2.3 and figure 6: guidance by a CLIP raises CLIP's own score,
and people still prefer classifier-free guidance, for a CLIP can be pleased without the picture
getting better. Crowson et al. (2022), "VQGAN-CLIP", section 3.2: crops against that.

A model draws with its words left out (guidance 0), led by CLIP towards the captions of held-out
pictures at each scale; once more with a single crop, the whole picture, at the middle scale; and
beside them by its own words with classifier-free guidance. The cosine of picture and caption is
that of the guiding CLIP, which is flattered; the share of pictures whose category a run of
`classifier` tells has nothing to do with it. FD-Lite0 to the test pictures. Time is processor time
of one thread.

    OMP_NUM_THREADS=1 python benchmarks/claims/clip_guidance.py --run emoji --clip runs/clip \
        --classifier runs/classifier

Refuted if no scale raises the share of categories told by half of the way from chance to that of
classifier-free guidance; or if one of equal share takes less than twice its time.
"""

from collections.abc import Sequence

import common
import numpy as np
import torch
from matplotlib import pyplot
from words import found, told

import trilemma
from trilemma import data as pictures
from trilemma.batch import to_float

SHARES = "first", "five", "category"
TINY = {"n": 6, "steps": 2, "scales": [1.0]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.options(__doc__)
    parser.add_argument("--run", required=True, help="a model that draws by text")
    parser.add_argument("--clip", required=True, help="a run of the recipe clip")
    parser.add_argument("--classifier", help="a run of the recipe classifier")
    parser.add_argument("--data", default="runs/emoji-text")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.3, 1, 3])
    parser.add_argument("--free", type=float, default=3.0, help="of classifier-free guidance")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--n", type=int, default=256, help="captions of test pictures")
    given = common.parse(parser, TINY, argv)
    trained, clip = trilemma.load(given.run), trilemma.load(given.clip)
    judge = given.classifier and trilemma.load(given.classifier)
    test = pictures.load(given.data, split="test", size=trained.data["shape"][1])
    distance = common.Distance(test, given.features, given.reference)
    kept = common.Kept("clip_guidance", given)
    rows = np.linspace(0, len(test) - 1, given.n).astype(np.int64)
    texts = list(test.condition(rows).text)
    real = test.tensor(rows)
    label = None if test.label is None else test.label[rows]
    with torch.no_grad():
        wanted = clip.model.embed_texts(texts)

    def measures(images: torch.Tensor) -> dict[str, float]:
        with torch.no_grad():
            seen = clip.model.embed_images(to_float(images))
        said = {"cosine": float((seen * wanted).sum(1).mean()), "fd": distance(images)}
        said["first"], said["five"] = found(clip, images, texts)
        if judge:
            said["category"] = float(told(judge, images, label))
        return said

    ways = {"no words": {"guidance": 0.0}}
    for scale in given.scales:
        ways[f"CLIP, scale {scale:g}"] = {"guidance": 0.0, "clip": clip, "clip_scale": scale}
    middle = given.scales[len(given.scales) // 2]
    ways[f"CLIP, scale {middle:g}, one crop"] = {
        "guidance": 0.0, "clip": clip, "clip_scale": middle, "crops": 1,
    }  # fmt: skip
    ways[f"its own words, guidance {given.free:g}"] = {"guidance": given.free}

    def cells(said: dict[str, float]) -> list[str]:
        shares = [f"{said[key]:.1%}" if key in said else "" for key in SHARES]
        return [f"{said['cosine']:.2f}", *shares, f"{said['fd']:.0f}"]

    table = [("test pictures", "", *cells(kept("test pictures", lambda: measures(real))))]
    for way, options in ways.items():
        said = kept.draw(
            way,
            lambda options=options: trained.sample(
                given.n, text=texts, steps=given.steps, **options
            ),
            measures,
            shown=16,
        )
        table.append((way, f"{1000 * said['drawing'] / given.n:.0f}", *cells(said)))

    figure, axes = pyplot.subplots(1, 1 + len(ways), figsize=(14, 2.8), layout="constrained")
    common.show(axes[0], real[:16], "test pictures", 4)
    for place, way in zip(axes[1:], ways, strict=True):
        common.show(place, kept.pictures(way), way, 4)
    kept.save(given.out, figure)
    common.publish(
        f"{trained.name} after {trained.progress['seen']:,} images, led by a CLIP of "
        f"{clip.progress['seen']:,}; {given.n} captions of test pictures, "
        f"{len(dict.fromkeys(texts))} different; {given.steps} steps, {torch.get_num_threads()} "
        "threads.",
        ("drawn by", "processor ms a picture", "cosine to the caption", "own caption first",
         "among five", "category told", "FD-Lite0"),
        table,
    )  # fmt: skip


if __name__ == "__main__":
    main()
