"""Claim 10: guidance trades coverage for precision; the best distance lies a little above 1.

Ho, Salimans (2021), "Classifier-Free Diffusion Guidance", tables 1 and 2: FID is best at a small
scale and grows with it, while pictures look ever more like their class. Kynkaanniemi et al. (2024),
"Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
Models": with the scale in force at middle noise alone, coverage is kept, so that the best distance
is smaller and lies at a larger scale.

One trained model draws the same seeds at every scale, in the same number of steps (two network
calls each where it is guided): 0 leaves the class out, 1 follows it, above that it is overdone; and
each scale above 1 again within an interval of sigma / alpha; scale 1 once more with other seeds, to
tell how far chance moves the numbers. EfficientNet-Lite0 compares the pictures with the test
pictures. No training.

    python benchmarks/claims/guidance.py --run runs/claims/triangle/quick-diffusion

Refuted if the distance is best at scale 1 or at the largest, if precision does not rise or coverage
does not fall from scale 1 to the largest, or if the interval does not make the best distance
smaller.
"""

from collections.abc import Sequence

import common
from matplotlib import pyplot

import trilemma
from trilemma import data as pictures

TINY = {"n": 8, "steps": 2, "scales": [0.0, 1.0, 3.0], "interval": [0.2, 3.0]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.options(__doc__)
    parser.add_argument("--run", required=True, help="of a diffusion model trained with dropout")
    parser.add_argument("--data", default="fashion-mnist", help="what it was trained on")
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 1, 1.25, 1.5, 2, 3, 5])
    parser.add_argument("--interval", type=float, nargs=2, default=[0.2, 3.0])
    parser.add_argument("--solver", default="euler")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--n", type=int, default=1000, help="pictures at each scale")
    given = common.parse(parser, TINY, argv)
    trained = trilemma.load(given.run)
    side = trained.data["shape"][1]
    train, test = (pictures.load(given.data, split=s, size=side) for s in ("train", "test"))
    distance = common.Distance(test, given.features, given.reference)
    kept = common.Kept("guidance", given)

    ways = {f"{scale:g}": {"guidance": scale} for scale in given.scales}
    ways |= {
        f"{scale:g} within": {"guidance": scale, "guidance_interval": given.interval}
        for scale in given.scales
        if scale > 1
    }
    ways["1, other seeds"] = {"guidance": 1.0, "seed": given.n}
    found = {
        way: kept.draw(
            way,
            lambda options=options: trained.sample(
                given.n, solver=given.solver, steps=given.steps, **options
            ),
            distance.scores,
            shown=20,
        )
        for way, options in ways.items()
    }
    real = kept("real", lambda: distance.scores(train.images[: given.n]))

    figure, axes = pyplot.subplots(2, 3, figsize=(10, 6), layout="constrained")
    for left, score in zip(axes.flat, ("fd", "precision", "recall", "coverage"), strict=False):
        everywhere = [(scale, found[f"{scale:g}"][score]) for scale in given.scales]
        within = [(s, found[f"{max(s, 1):g}{' within' * (s > 1)}"][score]) for s in given.scales]
        left.plot(*zip(*everywhere, strict=True), "C0o-", label="everywhere")
        left.plot(*zip(*within[1:], strict=True), "C1s--", label="within the interval")
        left.axhline(real[score], color="0.6", linewidth=1)
        left.set(xlabel="guidance scale", title="FD-Lite0" if score == "fd" else score)
    axes[0, 0].legend(fontsize=8)
    last = given.scales[-1]
    common.show(axes[1, 1], kept.pictures("1"), "scale 1")
    common.show(axes[1, 2], kept.pictures(f"{last:g}"), f"scale {last:g}, everywhere")
    kept.save(given.out, figure)
    low, high = given.interval
    common.publish(
        f"{trained.name} after {trained.progress['seen']:,} images, {given.solver} in "
        f"{given.steps} steps, seeds 0 to {given.n - 1}; the interval is {low:g} < sigma / alpha "
        f"<= {high:g}; "
        f"FD-{given.features.capitalize()} to {len(test):,} test pictures, the rest to {given.n}.",
        ("guidance", "FD-Lite0", "precision", "recall", "coverage"),
        [
            (way, f"{scores['fd']:.0f}", *(f"{scores[s]:.2f}" for s in list(scores)[1:4]))
            for way, scores in {**found, "real training pictures": real}.items()
        ],
    )


if __name__ == "__main__":
    main()
