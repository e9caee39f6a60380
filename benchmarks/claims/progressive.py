"""Claim: growing a GAN reaches the same quality sooner than training it at full size throughout.

Karras et al. (2018), section 2: comparable quality up to 2 to 6 times faster, depending on the
final size (their measurements: section 6.2, figure 4). Both sides are the recipe `progan`, the same
final networks, losses, rates and batches; one grows, the other has both lengths of growth at 0. For
each seed one trains after the other for the same time in one process; probes are not training time.

At each probe the averaged generator draws pictures, which EfficientNet-Lite0 compares with the test
pictures (Fréchet distance). Time to equal distance: the first probe at which a side is at or below
a target; targets are multiples of the distance at which the slower side ends, in the mean over
seeds.

    python benchmarks/claims/progressive.py --data fashion --minutes 10 --out runs/progressive
"""

import argparse
import json
import platform
import statistics as numbers
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

import trilemma
from trilemma import data as pictures
from trilemma.metrics.features import extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.sampling import Trained, grid

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

SIDES = {"growing": [], "full size": ["model.stage_images=0", "model.fade_images=0"]}
TARGETS = (3.0, 2.0, 1.5, 1.25, 1.0)

Trace = list[tuple[float, int, float]]  # seconds, images seen, distance


def reached(trace: Trace, target: float) -> tuple[float, int] | None:
    """Return seconds and images at the first probe at or below `target`, or None."""
    return next(((time, seen) for time, seen, fd in trace if fd <= target), None)


def middle(values: list[float] | None) -> str:
    return "-" if values is None else f"{numbers.median(values):.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="training time of each run")
    parser.add_argument("--data", default="fashion")
    parser.add_argument("--size", type=int, help="side of the pictures; else their own")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each side")
    parser.add_argument("--n", type=int, default=1000, help="pictures drawn at a probe")
    parser.add_argument("--probes", type=int, default=20, help="looks at each run")
    parser.add_argument("--set", action="append", default=[], help="change to both sides' recipe")
    parser.add_argument("--out", type=Path, help="where curves, figure and grids are put")
    options = parser.parse_args()

    train, test = (
        pictures.load(options.data, split=split, size=options.size, multiple=4)
        for split in ("train", "test")
    )
    see = extractor("lite0")
    real = statistics(see(test.images, pooled_only=True).pooled)

    def distance(drawn: np.ndarray | torch.Tensor) -> float:
        return frechet_distance(statistics(see(drawn, pooled_only=True).pooled), real)

    traces: dict[str, list[Trace]] = {side: [] for side in SIDES}
    drawn = {}
    for seed in range(options.seeds):
        for side, changes in SIDES.items():
            trace: Trace = []

            def probe(trained: Trained, elapsed: float, side=side, trace=trace) -> dict[str, float]:
                fd = distance(trained.sample(options.n))
                trace.append((elapsed, trained.progress["seen"], fd))
                told = f"{elapsed:.0f} s, {trained.progress['seen']} images: {fd:.1f}"
                print(f"{time.strftime('%H:%M:%S')} {side}, {told}", file=sys.stderr, flush=True)
                return {"fd": fd}

            with tempfile.TemporaryDirectory() as folder:
                trained = trilemma.train(
                    "progan",
                    train,
                    out=Path(folder) / "run",
                    budget=60 * options.minutes,
                    seed=seed,
                    overrides=["train.grids=0", *options.set, *changes],
                    probe=probe,
                    probes=options.probes,
                    quiet=True,
                )
            traces[side].append(trace)
            drawn.setdefault(side, trained.sample(100))

    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "curves.json").write_text(json.dumps(traces, indent=1))
        for side, images in drawn.items():
            grid(images, 10).save(options.out / f"{side.replace(' ', '-')}.png")
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for color, (side, runs) in enumerate(traces.items()):
            for i, trace in enumerate(runs):
                minutes, distances = [t / 60 for t, _, _ in trace], [fd for _, _, fd in trace]
                axes.plot(minutes, distances, f"C{color}", label=None if i else side)
        axes.set(xlabel="minutes of training", ylabel="FD-Lite0", yscale="log")
        axes.legend()
        figure.savefig(options.out / "curves.png", dpi=150, bbox_inches="tight")

    floor = distance(train.images[: options.n])
    where = f"{torch.get_num_threads()} threads" if not torch.cuda.is_available() else "CUDA"
    print(f"{platform.machine()}, {where}, torch {torch.__version__}; {options.data} at")
    print(f"{train.shape[1]} pixels, {options.minutes:g} minutes a run, {options.seeds} seeds,")
    print(f"{options.n} drawn and {len(test)} test pictures; real ones score {floor:.0f}\n")
    ends = {side: numbers.mean(trace[-1][2] for trace in runs) for side, runs in traces.items()}
    print("| | " + " | ".join(SIDES) + " | ratio |\n|---|---|---|---|")
    print("| FD-Lite0 at the end | " + " | ".join(f"{fd:.0f}" for fd in ends.values()) + " | |")
    for target in (factor * max(ends.values()) for factor in TARGETS):
        found = {side: [reached(trace, target) for trace in runs] for side, runs in traces.items()}
        times = {
            side: None if None in runs else [seconds / 60 for seconds, _ in runs]
            for side, runs in found.items()
        }
        growing, full = times.values()
        ratio = [a / b for a, b in zip(full, growing, strict=True)] if growing and full else None
        row = f"{middle(growing)} | {middle(full)} | {middle(ratio)}"
        print(f"| minutes to FD-Lite0 {target:.0f} | {row} |")


if __name__ == "__main__":
    main()
