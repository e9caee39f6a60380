"""What the scripts of this folder share: options, progress, resumable training, the table.

A script prints its table with its protocol on standard output and saves one picture; what is known
while it runs goes to standard error. Trained runs are kept under `runs/claims`: a script that was
stopped goes on where it was, and one that has come to its end only measures again.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

import trilemma
from trilemma.data import Dataset
from trilemma.metrics.features import extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.sampling import Trained

matplotlib.use("Agg")

RUNS = Path("runs/claims")


def options(doc: str) -> argparse.ArgumentParser:
    """Return the options of every script, to which it adds its own."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("docs/claims"), help="where the picture is put"
    )
    return parser


def train(recipe: str, data: Dataset | Path, claim: str, name: str, **more: Any) -> Trained:
    """Train a recipe into `runs/claims`, or go on with it; `more` as `trilemma.train` takes it."""
    length = f"{more['images']}" if "images" in more else f"{more['budget']:g}s"
    out = RUNS / claim / f"{name}-{length}"
    trained = trilemma.train(
        recipe, data, out=out, resume=(out / "training").exists(), quiet=True, **more
    )
    tell(f"{name} trained", **trained.progress)
    return trained


class Distance:
    """FD-Lite0 of pictures (N, C, H, W), uint8, to given ones."""

    def __init__(self, images: np.ndarray) -> None:
        self.see = extractor("lite0")
        self.real = statistics(self.see(images, pooled_only=True).pooled)

    def __call__(self, images: np.ndarray | torch.Tensor) -> float:
        seen = self.see(images, pooled_only=True).pooled
        return frechet_distance(statistics(seen), self.real)

    def probe(self, n: int) -> Callable[[Trained, float], dict[str, float]]:
        """Return what measures n pictures of a model while it trains."""

        def probe(trained: Trained, elapsed: float) -> dict[str, float]:
            found = {"fd": self(trained.sample(n))}
            tell(f"{trained.name}, {trained.progress['seen']:,} images", **found)
            return found

        return probe


def log(trained: Trained) -> list[dict[str, Any]]:
    """Return the lines of a run's log, also of what was trained before it was gone on with."""
    assert trained.path is not None
    return [json.loads(line) for line in (trained.path / "log.jsonl").read_text().splitlines()]


def tell(what: str, **numbers: float) -> None:
    """Write numbers to standard error as soon as they are known."""
    told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    print(f"{time.strftime('%H:%M:%S')} {what}: {told}", file=sys.stderr, flush=True)


def publish(protocol: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a markdown table under its protocol and the machine."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    print(f"{protocol} {where}, {torch.get_num_threads()} threads, torch {torch.__version__}.\n")
    for cells in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(cells)} |")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
