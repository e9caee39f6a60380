"""Claim 3: a GAN that grows reaches the same quality sooner than at full size from the start.

Karras, Aila, Laine, Lehtinen (2018), "Progressive Growing of GANs", section 2: comparable quality
up to 2 to 6 times faster, depending on the final size (their measurements: section 6.2, figure 4).
Both sides are the recipe `progan`, the same final networks, losses, rates and batches; one grows,
the other has both lengths of growth at 0. For each seed one trains after the other for the same
time; probes are not training time.

At each probe the averaged generator draws pictures, which EfficientNet-Lite0 compares with the test
pictures (Fréchet distance). Time to equal distance: when the line through a run's probes first
falls to a target. Targets are multiples of the distance at which the worse side ends, in the mean
over seeds; one that a run has reached at its first probe already tells nothing and is left out.

    python benchmarks/claims/progressive.py
"""

import statistics as numbers
from itertools import pairwise

import common
from matplotlib import pyplot

from trilemma import data as pictures

SIDES = {
    "growing": ["model.stage_images={0}", "model.fade_images={0}"],
    "full size": ["model.stage_images=0", "model.fade_images=0"],
}
TARGETS = (2.0, 1.5, 1.25, 1.1, 1.0)

Trace = list[tuple[float, float]]  # minutes, distance


def reached(trace: Trace, target: float) -> float | None:
    """Return the minutes at which the line through the probes falls to `target`, or None."""
    for (before, high), (after, low) in pairwise(trace):
        if low <= target < high:
            return before + (after - before) * (high - target) / (high - low)
    return None


def middle(values: list[float], form: str = ".2f") -> str:
    return f"{numbers.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument("--minutes", type=float, default=3.5, help="training of each of four runs")
    parser.add_argument("--data", default="fashion")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures")
    parser.add_argument("--length", type=int, default=4000, help="images of a stage and of a fade")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each side")
    parser.add_argument("--probes", type=int, default=12, help="looks at each run")
    parser.add_argument("--n", type=int, default=1000, help="pictures drawn at a probe")
    given = parser.parse_args()
    train, test = (
        pictures.load(given.data, split=split, size=given.size, multiple=4)
        for split in ("train", "test")
    )
    distance = common.Distance(test)
    probe = distance.probe(given.n)

    traces: dict[str, list[Trace]] = {side: [] for side in SIDES}
    seen: dict[str, list[int]] = {side: [] for side in SIDES}
    for seed in range(given.seeds):
        for side, changes in SIDES.items():
            growth = [change.format(given.length) for change in changes]
            trained = common.train(
                "progan", train, "progressive",
                f"{side.replace(' ', '-')}-{given.size}-{given.length}-seed{seed}", seed=seed,
                budget=60 * given.minutes, probe=probe, probes=given.probes,
                overrides=["train.grids=0", "train.watches=0", *growth],
            )  # fmt: skip
            probed = [line for line in common.log(trained) if "probe" in line]
            traces[side].append([(line["elapsed"] / 60, line["probe"]["fd"]) for line in probed])
            seen[side].append(trained.progress["seen"])

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for color, (side, runs) in enumerate(traces.items()):
        for i, trace in enumerate(runs):
            axes.plot(*zip(*trace, strict=True), f"C{color}o-", label=None if i else side)
    axes.set(xlabel="minutes of training", ylabel="FD-Lite0", yscale="log")
    axes.legend()
    given.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out / "progressive.png", dpi=150)

    ends = {side: [trace[-1][1] for trace in runs] for side, runs in traces.items()}
    rows = [
        ("pictures seen", *(f"{numbers.mean(runs):,.0f}" for runs in seen.values()), ""),
        ("FD-Lite0 at the end", *(middle(runs, ".0f") for runs in ends.values()), ""),
    ]
    worse = max(numbers.mean(runs) for runs in ends.values())
    for target in (factor * worse for factor in TARGETS):
        if any(trace[0][1] <= target for runs in traces.values() for trace in runs):
            continue
        found = {side: [reached(trace, target) for trace in runs] for side, runs in traces.items()}
        growing, full = ([at for at in times if at is not None] for times in found.values())
        ratio = "-"
        if len(growing) == len(full) == given.seeds:
            ratio = middle([b / a for a, b in zip(growing, full, strict=True)])
        cells = (
            middle(times) if len(times) == given.seeds else f"{len(times)} of {given.seeds} runs"
            for times in (growing, full)
        )
        rows.append((f"minutes to FD-Lite0 {target:.0f}", *cells, ratio))
    floor = distance(train.images[: given.n])
    common.publish(
        f"{given.data} at {train.shape[1]} pixels, {given.minutes:g} minutes a run, {given.seeds} "
        f"seeds (mean, least to most); {given.n} drawn and {len(test)} test pictures at a probe; "
        f"{given.n} real training pictures score {floor:.0f}.",
        ("", *SIDES, "full size / growing"),
        rows,
    )


if __name__ == "__main__":
    main()
