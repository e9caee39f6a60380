"""Claim 15: a student draws in one to four network calls as its teacher does in 1,000 of DDPM.

Song, Dhariwal, Chen, Sutskever (2023), "Consistency Models"; Salimans & Ho (2022), "Progressive
Distillation for Fast Sampling of Diffusion Models"; Liu, Gong, Liu (2023), "Flow Straight and
Fast"; Sauer, Lorenz, Blattmann, Rombach (2023), "Adversarial Diffusion Distillation": a few calls
do what took hundreds, and adversarial students are ahead at one.

One teacher, and students of it by each method, for about the same processor time each. Where there
are fewer students than numbers of calls, one draws in all of them: an adversarial student for 4
calls in fewer, a consistency model in any, a progressive run by its halvings. FD-Lite0, precision,
recall and coverage of pictures of the same seeds to the test pictures; beside them the teacher by
the best fast solver of claim 7 with as few calls.

Speed is taken apart, for it asks for a machine at rest: with `--speed`, on kept students, in turns.
DDPM's is that of 20 of its calls, times the number of them.

    OMP_NUM_THREADS=1 python benchmarks/claims/fewstep.py --run runs/claims/triangle/quick-diffusion
    python benchmarks/claims/fewstep.py --run runs/claims/triangle/quick-diffusion --speed

Refuted if the best student's distance is more than 1.25 times that of the teacher's DDPM at 4
calls, or more than 2 times at 1.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
from matplotlib import pyplot

import trilemma
from trilemma import checkpoint
from trilemma import data as pictures
from trilemma.distilling import distill
from trilemma.sampling import Trained

IMAGES = {"adversarial": 32_000, "consistency": 60_000, "progressive": 60_000, "reflow": 20_000}
"""Training images of a student by each method, about the same processor time."""
SCORES = ("precision", "recall", "coverage")
BATCH, TIMED = 100, 20
"""Pictures drawn at a time for --speed, and calls at most; more cost as much each."""
TINY = {"images": 8, "n": 8, "long": 4, "rounds": 1, "to": [1]}


class Row(NamedTuple):
    """One way of drawing."""

    name: str
    calls: int
    trained: Trained
    options: dict
    seconds: float | None = None
    """Processor time of training, of a student."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.options(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the teacher's")
    parser.add_argument("--data", default="fashion-mnist", help="what it was trained on")
    parser.add_argument("--methods", nargs="*", default=list(IMAGES), choices=list(IMAGES))
    parser.add_argument("--to", type=int, nargs="+", default=[1, 2, 4], help="numbers of calls")
    parser.add_argument("--images", type=int, help="of every student, for all methods alike")
    parser.add_argument("--long", type=int, default=1000, help="calls of the teacher's DDPM")
    parser.add_argument(
        "--ddpm", type=float, help="its distance, where claim 7 has measured it under this protocol"
    )
    parser.add_argument("--n", type=int, default=1000, help="pictures of each")
    parser.add_argument("--rounds", type=int, default=5, help="of --speed")
    parser.add_argument("--speed", action="store_true", help="measure the speeds, and no more")
    given = common.parse(parser, TINY, argv)
    speed, rounds = given.speed, given.rounds
    del given.speed, given.rounds  # they change nothing of what is kept
    teacher = trilemma.load(given.run)
    rows = [Row("teacher, ddpm", given.long, teacher, {"solver": "ddpm", "steps": given.long})]
    for calls in given.to:
        fast = {"solver": "dpmpp_3m", "steps": calls}
        rows.append(Row("teacher, dpmpp_3m", calls, teacher, fast))
    for row in rows:
        row.options["guidance"] = 1.0
    for method in given.methods:
        rows += students(given, method)
    if speed:
        speeds(rows, rounds)
        return

    train, test = (
        pictures.load(given.data, split=s, size=teacher.data["shape"][1]) for s in ("train", "test")
    )
    distance = common.Distance(test, given.features, given.reference)
    kept = common.Kept("fewstep", given)
    first = f"{rows[0].name}, {given.long} calls"
    if given.ddpm:
        kept.found[first] = {"fd": given.ddpm}
    table, shown = [], []
    for name, calls, trained, options, seconds in rows:
        part = f"{name}, {calls} calls"
        scores = kept.draw(
            part,
            lambda trained=trained, options=options: trained.sample(given.n, batch=100, **options),
            distance.scores,
            shown=20,
        )
        best = kept.found[first]["fd"]
        if "drawing" in scores:
            shown.append(part)
        table.append(
            (
                name,
                f"{calls:,}",
                f"{trained.progress['seen']:,}",
                "" if seconds is None else f"{seconds:.0f}",
                f"{scores['fd']:.0f}",
                f"{scores['fd'] / best:.2f}",
                *(f"{scores[s]:.2f}" if s in scores else "" for s in SCORES),
            )
        )
    real = kept("real", lambda: distance.scores(train.images[: given.n]))
    told = (f"{real[s]:.2f}" for s in SCORES)
    table.append(("real training pictures", "", "", "", f"{real['fd']:.0f}", "", *told))

    figure, axes = pyplot.subplots(len(shown), 1, figsize=(6, 1.6 * len(shown)), squeeze=False)
    for left, part in zip(axes[:, 0], shown, strict=True):
        common.show(left, kept.pictures(part), part)
    figure.tight_layout()
    kept.save(given.out, figure)
    common.publish(
        f"{teacher.name} after {teacher.progress['seen']:,} images, without guidance; students at "
        f"one pass of its network a call; seeds 0 to {given.n - 1}, {len(test):,} test pictures.",
        (
            "drawn by",
            "calls",
            "images of training",
            "processor seconds",
            "FD-Lite0",
            "of DDPM's",
            "precision",
            "recall",
            "coverage",
        ),
        table,
    )


def students(given: argparse.Namespace, method: str) -> list[Row]:
    """Return the rows of a method, of students that are trained if need be."""
    images, calls = given.images or IMAGES[method], sorted(given.to)
    made = {
        "adversarial": {calls[0]: calls[:1], calls[-1]: calls},
        "consistency": {calls[0]: calls},
        "progressive": {calls[0]: calls},
        "reflow": {to: [to] for to in calls},
    }[method]  # students, and the numbers of calls that each draws in
    rows = []
    for to, draws in made.items():
        trained, seconds = student(given, method, to, images)
        name = f"{method}, --to {to}"
        for n in draws:
            drawing = trained
            if method == "progressive" and n != to:
                drawing = trilemma.load(trained.path / "halvings" / f"{n}")
            rows.append(Row(name, n, drawing, {"steps": n}, seconds))
    return rows


def student(given: argparse.Namespace, method: str, to: int, images: int) -> tuple[Trained, float]:
    """Train a student, or go on with it; return it and the processor seconds that it took.

    Where it is gone on with, what was trained before is taken to have cost as much an image.
    """
    out = common.RUNS / "fewstep" / f"{method}-{to}-{images}"
    began = checkpoint.read_model(out)[1]["progress"]["seen"] if out.exists() else 0
    start = time.process_time()
    trained = distill(
        given.run, to, method=method, data=given.data, out=out, images=images, resume=True,
        overrides=("train.grids=0", "train.watches=0"), quiet=True,
    )  # fmt: skip
    spent, seen = time.process_time() - start, trained.progress["seen"]
    told = out / "processor.json"
    if not told.exists():
        told.write_text(json.dumps(spent * seen / max(seen - began, 1)))
    return trained, json.loads(told.read_text())


def speeds(rows: Sequence[Row], rounds: int) -> None:
    """Print the pictures a second of each way, the median of turns."""
    rates: dict[tuple[str, int], list[float]] = {(row.name, row.calls): [] for row in rows}
    for _ in range(rounds + 1):  # the first warms up
        for name, calls, trained, options, _ in rows:
            taken = min(calls, TIMED)
            start = time.perf_counter()
            trained.sample(BATCH, batch=BATCH, **options | {"steps": taken})
            seconds = (time.perf_counter() - start) * calls / taken
            rates[name, calls].append(BATCH / seconds)
    medians = {way: float(np.median(found[1:])) for way, found in rates.items()}
    slow = medians[rows[0].name, rows[0].calls]
    common.publish(
        f"Pictures a second in batches of {BATCH}, the median of {rounds} turns.",
        ("drawn by", "calls", "images/s", "of DDPM's"),
        [
            (name, f"{calls:,}", f"{rate:.3g}", f"{rate / slow:.0f}")
            for (name, calls), rate in medians.items()
        ],
    )


if __name__ == "__main__":
    main()
