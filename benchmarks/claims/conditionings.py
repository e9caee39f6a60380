"""Claim 9: of the four ways to condition a DiT adaLN-Zero is best; cross-attention costs most.

Peebles, Xie (2023), "Scalable Diffusion Models with Transformers", section 3.2 and figure 5:
adaLN-Zero has the lowest FID at every stage of training, then adaLN, cross-attention and
in-context; cross-attention costs about 15 % more operations, in-context and adaLN hardly any.

The same small DiT (6 blocks of width 96, patch 4) on Fashion-MNIST with each conditioning, all else
as in the recipe `dit` at a constant learning rate, two seeds of each; depth and width stay, as in
the paper, so adaLN has more parameters. FD-Lite0 and coverage of drawn pictures of all classes in
turn, without guidance, at the same numbers of images. Operations are counted (a multiply-add is
two). The time of a step is processor time of one thread, forth and back, all four in turns, so
other work may run beside it.

    OMP_NUM_THREADS=1 python benchmarks/claims/conditionings.py

Refuted if adaLN-Zero does not have the lowest mean distance at the end, by more than its two seeds
are apart; or if cross-attention takes less than 5 % or in-context more than 10 % more operations
than adaLN.
"""

from collections.abc import Sequence

import common
import numpy as np
from backbones import dit
from common import Side

from trilemma import data as pictures

WAYS = "in-context", "cross-attention", "adaln", "adaln-zero"
TINY = {"images": 64, "probes": 2, "n": 8, "steps": 2, "rounds": 1, "seeds": 1}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.options(__doc__)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=20_000, help="training of each of the runs")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each conditioning")
    parser.add_argument("--probes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="of the solver, at a probe")
    parser.add_argument("--n", type=int, default=1000, help="pictures drawn at a probe")
    parser.add_argument("--rounds", type=int, default=10, help="turns of timing")
    given = common.parse(parser, TINY, argv)
    train, test = (pictures.load(given.data, split=s, multiple=4) for s in ("train", "test"))
    distance = common.Distance(test, given.features, given.reference)
    kept = common.Kept("conditionings", given)

    probe = distance.probe(given.n, solver="euler", steps=given.steps, guidance=1.0)
    runs = {}
    for way in WAYS:
        changes = [f"model.network.conditioning={way}", "train.schedule=constant", *dit(6)]
        sides = {f"{way}, seed {s}": Side("dit", changes, s) for s in range(given.seeds)}
        runs[way] = common.learn("conditionings", sides, train, probe, given)
    first = {way: next(iter(trained.values())) for way, trained in runs.items()}
    taken = kept("milliseconds", lambda: common.step_times(first, train, given.rounds))
    for way, one in first.items():
        kept.draw(
            way,
            lambda one=one: one.sample(20, solver="euler", steps=given.steps, guidance=1.0),
            lambda images: {},
            shown=20,
        )
    found = {way: [common.probes(one) for one in trained.values()] for way, trained in runs.items()}
    kept.found["probes"] = found

    work = {way: common.operations(one) for way, one in first.items()}
    rows = []
    for way, probes in found.items():
        ends = [one[-1]["fd"] for one in probes]
        middle = [one[len(one) // 2 - 1]["fd"] for one in probes]
        rows.append(
            (
                way,
                f"{common.parameters(first[way]):,}",
                f"{work[way] / 1e6:.1f} ({work[way] / work['adaln']:.2f})",
                f"{taken[way]:.2f} ({taken[way] / taken['adaln']:.2f})",
                f"{np.mean(middle):.0f}",
                f"{np.mean(ends):.0f} ({min(ends):.0f} to {max(ends):.0f})",
                f"{np.mean([one[-1]['coverage'] for one in probes]):.2f}",
            )
        )
    half = found["adaln"][0][given.probes // 2 - 1]["seen"]

    figure, (over, costs), places = common.board(len(first))
    for color, (way, probes) in enumerate(found.items()):
        for i, one in enumerate(probes):
            line = [p["seen"] for p in one], [p["fd"] for p in one]
            over.plot(*line, f"C{color}o-", ms=3, label=None if i else way)
    over.set(xlabel="images trained on", ylabel="FD-Lite0", yscale="log")
    over.legend(fontsize=8)
    costs.scatter([work[w] / work["adaln"] for w in work], [taken[w] for w in work])
    for way in work:
        place = work[way] / work["adaln"], taken[way]
        costs.annotate(f"{way}  ", place, fontsize=8, ha="right", va="top")
    costs.margins(x=0.25)
    costs.set(xlabel="operations, of adaLN's", ylabel="ms an image, forth and back")
    for place, way in zip(places, first, strict=True):
        common.show(place, kept.pictures(way), way)
    kept.save(given.out, figure)
    common.publish(
        f"{given.data} at {train.shape[1]} pixels, {given.images:,} images a run, {given.seeds} "
        f"seeds (mean, least to most), constant rate; {given.n} drawn by euler in {given.steps} "
        f"steps without guidance, {len(test):,} test pictures. In brackets after operations and "
        "time: of adaLN's.",
        (
            "conditioning",
            "parameters",
            "MFLOPs",
            "ms an image, forth and back",
            f"FD-Lite0 at {half:,} images",
            f"at {given.images:,}",
            "coverage",
        ),
        rows,
    )


if __name__ == "__main__":
    main()
