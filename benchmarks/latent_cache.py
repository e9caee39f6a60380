"""Speed of training on latents that were computed once, against encoding each batch anew.

Each recipe over a first stage is trained by the steps of the training loop (reading the batch,
loss, gradient, optimizer, averaged weights) at its own batch. The two ways take turns, round by
round, in one process, on the same pictures; the first rounds warm up and are not counted; the
median round is shown. Filling is the time to compute what is kept, for each picture once. Weights
are random, on which speed does not depend, and pictures are noise of ten classes.

    python benchmarks/latent_cache.py                          # all, at 64 pixels
    python benchmarks/latent_cache.py latent-dit --size 32
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trilemma import device, latents, recipe, stepping, training
from trilemma.batch import Batch
from trilemma.data import Dataset, batches
from trilemma.run import Run
from trilemma.settings import Length, Settings

RECIPES = ("latent-diffusion", "latent-dit", "vq-diffusion", "vq-transformer")
WAYS = ("encoding each batch", "kept")


def with_new_stages(spec: Any) -> Any:
    """Return a recipe's model spec with new first stages in the place of trained ones."""
    if not isinstance(spec, dict):
        return spec
    if spec.get("type") == "trained":
        stage = recipe.load(Path(spec["path"]).name)["model"]
        stage |= {"weights": "none"} if "weights" in stage else {}
        return {"type": "model.Frozen", "module": stage}
    return {key: with_new_stages(value) for key, value in spec.items()}


def begin(name: str, data: Dataset, where: torch.device, changes: list[str]) -> Run:
    """Return a run of a recipe at its beginning."""
    spec = recipe.override(recipe.load(name), changes)
    spec["model"] = with_new_stages(spec["model"])
    spec = recipe.resolve(spec, training.facts(data))
    spec["run"] = {"recipe": name, "data": data.name, "size": data.shape[1], "seed": 0}
    settings = Settings(**spec["train"])
    torch.manual_seed(0)
    model = recipe.build(spec["model"])
    training.measure(model, data)
    device.prepare(model, where, device.dtype(settings.precision, where))
    return Run(model, spec, settings, Length(images=10**9), data, Path("unused"), 0, where)


def steps(run: Run, stream: Iterator[Batch], count: int) -> float:
    """Take so many steps; return the seconds of one."""
    device.synchronize(run.where)
    start = time.perf_counter()
    for _ in range(count):
        batch = next(stream).to(run.where)
        for phase in run.phases:
            stepping.take(run, phase, batch, run.rate(0.5))
        run.progress.seen += run.settings.batch
        run.update_average(run.settings.batch)
    device.synchronize(run.where)
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--count", type=int, default=2000, help="pictures")
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds not counted")
    parser.add_argument("--device", default=None)
    parser.add_argument("--set", action="append", default=[], help="changes to the recipes")
    given = parser.parse_args()
    where = device.pick(given.device)
    draw = np.random.default_rng(0)
    data = Dataset(
        name="noise",
        split="train",
        fingerprint="noise",
        images=draw.integers(0, 256, (given.count, 3, given.size, given.size), dtype=np.uint8),
        label=draw.integers(0, 10, given.count),
        label_names=[str(k) for k in range(10)],
    )
    print(
        f"{where}, {torch.get_num_threads()} threads; torch {torch.__version__}; {given.count} "
        f"pictures of 3x{given.size}x{given.size}, median of {given.rounds} rounds of "
        f"{given.steps} steps\n\n| recipe | batch | {WAYS[0]}, images/s | {WAYS[1]}, images/s | "
        "ratio | filling, images/s | bytes a picture |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in given.recipes:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            run = begin(name, data, where, given.set)
            batch = run.settings.batch
            start = time.perf_counter()
            kept = latents.keep(run.model, data, False, run.length, batch, where)
            filling = time.perf_counter() - start
            assert kept is not None
            streams = {
                way: batches(data, batch, seed=0, kept=kept if way == WAYS[1] else None)
                for way in WAYS
            }
            took: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(given.warmup + given.rounds):
                for way, stream in streams.items():
                    took[way].append(steps(run, stream, given.steps))
            rates = [batch / statistics.median(took[way][given.warmup :]) for way in WAYS]
            print(
                f"| {name} | {batch} | {rates[0]:.0f} | {rates[1]:.0f} | "
                f"{rates[1] / rates[0]:.2f} | {given.count / filling:.0f} | "
                f"{kept[0, 0].nbytes} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
