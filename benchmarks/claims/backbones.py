"""Claim 8: a U-Net and a DiT of like size learn alike by the image; the DiT takes longer.

Peebles, Xie (2023), "Scalable Diffusion Models with Transformers": the inductive bias of a U-Net is
not crucial. What is told of Fashion-MNIST: of like size, like quality after as many iterations, at
more time for the DiT.

Four networks in the same recipe but for the learning rate, which is that of their own recipes, on
Fashion-MNIST:

    U-Net                  DDPM's with attention, narrow, on 2 x 2 pixels folded into channels
    quick U-Net            that of `quick-diffusion`: convolutions of single channels and 1 x 1
    DiT, like parameters   4 blocks of width 96, patch 4, adaLN-Zero
    DiT, like compute      6 blocks of width 96: the U-Nets' operations, with more parameters

One run of each at a constant learning rate, whose averaged weights are probed at the same numbers
of images: FD-Lite0, recall and coverage of drawn pictures of all classes in turn, without guidance.
Equal iterations are equal probes; equal time is the processor time of training noted at each probe
(probes themselves do not count), at which a line is drawn between probes. Processor time of one
thread, so other work may run beside it; forth and back of all networks is timed in turns as well.

    OMP_NUM_THREADS=1 python benchmarks/claims/backbones.py

Refuted if after as many images the distance of either DiT is more than a quarter off that of the
better U-Net, in either direction, or if the DiT of like parameters takes no more time an image.
"""

from collections.abc import Sequence

import common
import numpy as np
from common import Side

from trilemma import data as pictures

TINY = {"images": 64, "probes": 2, "n": 8, "steps": 2, "rounds": 1}
UNET = (
    'model.network={type="networks.unet.UNet", in_channels="@channels", out_channels="@channels", '
    'size="@size", channels=32, multipliers=[1, 2], blocks=1, attention=[7], patch=2, '
    "embedding_dim=128}"
)


def dit(depth: int) -> list[str]:
    """Return the changes that make the recipe `dit` narrow and so deep."""
    narrow = ["model.network.width=96", "model.network.heads=4", f"model.network.depth={depth}"]
    return [*narrow, "model.network.embedding_dim=96", "model.conditioner.dim=96"]


SIDES = {
    "U-Net": Side("quick-diffusion", [UNET]),
    "quick U-Net": Side("quick-diffusion"),
    "DiT, like parameters": Side("dit", dit(4)),
    "DiT, like compute": Side("dit", dit(6)),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.options(__doc__)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=32_000, help="training of each network")
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="of the solver, at a probe")
    parser.add_argument("--n", type=int, default=1000, help="pictures drawn at a probe")
    parser.add_argument("--rounds", type=int, default=10, help="turns of timing")
    given = common.parse(parser, TINY, argv)
    train, test = (pictures.load(given.data, split=s, multiple=4) for s in ("train", "test"))
    distance = common.Distance(test, given.features, given.reference)
    kept = common.Kept("backbones", given)

    sides = {
        name: side._replace(changes=[*side.changes, "train.schedule=constant"])
        for name, side in SIDES.items()
    }
    probe = distance.probe(given.n, solver="euler", steps=given.steps, guidance=1.0)
    trained = common.learn("backbones", sides, train, probe, given)
    taken = kept("milliseconds", lambda: common.step_times(trained, train, given.rounds))
    for name, one in trained.items():
        kept.draw(
            name,
            lambda one=one: one.sample(20, solver="euler", steps=given.steps, guidance=1.0),
            lambda images: {},
            shown=20,
        )
    found = {name: common.probes(one) for name, one in trained.items()}
    kept.found["probes"] = found

    least = min(probes[-1]["processor"] for probes in found.values())
    rows = []
    for name, probes in found.items():
        seconds, distances = ([p[key] for p in probes] for key in ("processor", "fd"))
        rows.append(
            (
                name,
                f"{common.parameters(trained[name]):,}",
                f"{common.operations(trained[name]) / 1e6:.0f}",
                f"{taken[name]:.2f}",
                f"{1000 * seconds[-1] / given.images:.2f}",
                f"{distances[len(probes) // 2 - 1]:.0f}",
                f"{distances[-1]:.0f}",
                f"{np.interp(least, seconds, distances):.0f}",
                f"{probes[-1]['coverage']:.2f}",
            )
        )
    half = next(iter(found.values()))[given.probes // 2 - 1]["seen"]

    figure, plots, places = common.board(len(trained))
    common.curves(plots[0], trained, "seen", "images trained on")
    common.curves(plots[1], trained, "processor", "processor seconds of training")
    plots[0].legend(fontsize=8)
    for place, name in zip(places, trained, strict=True):
        common.show(place, kept.pictures(name), name)
    kept.save(given.out, figure)
    common.publish(
        f"{given.data} at {train.shape[1]} pixels, {given.images:,} images, seed 0, constant rate; "
        f"{given.n} drawn by euler in {given.steps} steps without guidance, {len(test):,} test "
        f"pictures. Equal time is {least:.0f} processor seconds.",
        (
            "network",
            "parameters",
            "MFLOPs",
            "ms an image, forth and back",
            "training",
            f"FD-Lite0 at {half:,} images",
            f"at {given.images:,}",
            "at equal time",
            "coverage at the end",
        ),
        rows,
    )


if __name__ == "__main__":
    main()
