"""From a recipe and pictures to a trained model: what is asked, made ready for the loop.

The order matters: the data answer the recipe's `@facts`; the model is built, takes over weights it
begins with and measures the data; then a run in the same folder is gone on with. `stepping` trains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trilemma import (
    checkpoint,
    device,
    distributed,
    finetune,
    latents,
    preservation,
    recipe,
    signals,
)
from trilemma.batch import Batch, to_float
from trilemma.conditioning import reads_text
from trilemma.data import Dataset, batches, bucketed, load_buckets
from trilemma.data import load as load_data
from trilemma.errors import UserError
from trilemma.model import Begins, Frozen, Measures, Model
from trilemma.run import Run
from trilemma.sampling import Trained
from trilemma.settings import Length, Settings
from trilemma.stepping import loop

MEASURED = 512  # pictures from which a part of a model measures the data


def train(
    name: str | Path,
    data: str | Path | Dataset,
    *,
    out: str | Path | None = None,
    size: int | None = None,
    budget: float | None = None,
    images: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    resume: bool = False,
    init: str | Path | None = None,
    tune: Mapping[str, Any] | None = None,
    device_name: str | None = None,
    probe: Callable[[Trained, float], dict[str, Any]] | None = None,
    probes: int = 0,
    quiet: bool = False,
) -> Trained:
    """Train a recipe on pictures and return the trained model.

    Args:
        name: a packaged recipe's name, or the path of a recipe file.
        data: a named data set, a folder or zip of pictures, or a loaded Dataset.
        out: the run folder; None for `runs/NAME`.
        size: height and width of the pictures; None keeps theirs where that can be.
        budget: seconds of training; or `images`, or `steps`; else the recipe's own length.
        images: training images to see.
        steps: optimizer steps to take.
        seed: of everything random.
        overrides: `section.key=value` changes to the recipe.
        resume: go on with the run in `out`.
        init: a run to begin with the weights of: `finetune`.
        tune: what learns then, and more that a recipe's `[finetune]` may say: `{"mode": "lora"}`.
        device_name: `cpu`, `cuda` or `mps`; None picks the fastest there is.
        probe: called with the model so far and the seconds trained; its numbers are logged. Its
            time, like that of sample grids, is not counted as training.
        probes: how often `probe` is called, evenly spread, the last at the end.
        quiet: show nothing.

    Raises:
        UserError: a recipe, option or data that cannot be used; a run that exists; a loss that
            stays non-finite.
        Interrupted: by Ctrl-C or SIGTERM, after saving.
    """
    where = device.pick(device_name)
    rank, world = distributed.start(where)
    spec = recipe.override(recipe.load(name), overrides)
    asks, source = spec.get("data", {}), data
    data = _pictures(data, asks, size, name)
    out = Path(out) if out is not None else Path("runs") / Path(name).stem
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder for the run")
    begun = out / "recipe.toml"
    before = recipe.load(begun) if resume and begun.exists() else None
    was = None if before is None else before["run"].get("init")
    tuning = finetune.asked(spec, init, tune or {}, before)
    if tuning is not None and tuning.preserve:
        known = preservation.classes_of(tuning.init) if was is None else was["classes"]
        data = preservation.with_classes(data, known)
    plain, spec = spec, recipe.resolve(spec, facts(data), before)
    settings, length = _settings(spec, world), _length(budget, images, steps)
    spec["run"] = {"recipe": Path(name).stem, "data": data.name, "size": data.shape[1]}
    spec["run"]["seed"] = seed

    torch.manual_seed(seed)
    model: Model = recipe.build(spec["model"])
    sets, sizes = [data], []
    if asks.get("buckets"):
        sets = _buckets(source, data, model, tuning, asks, name)
        sizes = [each.shape[1:] for each in sorted(sets, key=len, reverse=True)]
    if reads_text(model) and not any(data.text or ()):
        raise UserError(
            f"{Path(name).stem} learns to draw by captions and {data.name} has none; expected "
            "metadata.csv or metadata.jsonl beside the pictures, with file_name and text in every "
            "row, or picture.txt beside picture.png; see trilemma data check"
        )
    notes: list[str] = []
    if tuning is not None:
        names = {"classes": data.label_names, "attributes": data.attribute_names}
        told = finetune.begin(model, tuning, plain, facts(data), names, was)
        spec["run"]["init"], notes = told
    if not resume:
        load_frozen(model)
        if tuning is None:
            done = isinstance(model, Begins) and model.begin()
        else:
            done = finetune.measured(model, spec["run"]["init"]["new"])
        if not done:
            measure(model, data)
    device.prepare(model, where, device.dtype(settings.precision, where))
    at_most = length or Length(images=settings.images)
    run = Run(model, spec, settings, at_most, data, out, rank, where, sizes)
    if resume:
        notes += run.restore(keep_length=length is None)
    elif (out / "training").exists():
        raise UserError(f"{out} already holds a run; add --resume to go on, or take another --out")
    elif (out / "model.safetensors").exists():
        raise UserError(
            f"{out} holds a model without the state to go on from; take another --out, and "
            f"--init {out} to begin with it"
        )
    distributed.barrier()  # all have looked at the folder before the first process writes to it
    if tuning is not None and tuning.preserve:
        if rank == 0 and not resume:
            preservation.draw(tuning.init, tuning.preserve, out, seed, device_name)
        distributed.barrier()
    stream = _stream(run, sets, asks, tuning, world)
    with signals.caught() as asked:
        loop(run, stream, asked, probe, probes, quiet, notes)
    return run.trained()


def _pictures(
    data: str | Path | Dataset, asks: Mapping[str, Any], size: int | None, name: str | Path
) -> Dataset:
    """Return the training pictures, loaded as the `[data]` of a recipe asks."""
    if not isinstance(data, Dataset):
        data = load_data(
            data,
            split="train",
            size=size,
            multiple=asks.get("multiple", 1),
            tiles=bool(asks.get("tiles", False)),
            captions=asks.get("captions", ()),
        )
    if asks.get("pair") == "unpaired" and (data.source is None or not len(data.source)):
        raise UserError(
            f"{name} translates between two domains and {data.name} has pictures of one to train "
            "on; expected a folder with the folders trainA and trainB, pictures in both"
        )
    return data


def _settings(spec: recipe.Recipe, world: int) -> Settings:
    """Return what `[train]` says, of a batch that the processes can share."""
    recipe.check_arguments(Settings, spec.get("train", {}), "[train]")
    try:
        settings = Settings(**spec.get("train", {}))
    except ValueError as error:
        raise UserError(f"[train] {error}") from error
    if settings.batch % (world * settings.accumulate):
        raise UserError(
            f"a batch of {settings.batch} cannot be shared by {world} processes in "
            f"{settings.accumulate} parts each; choose train.batch a multiple of both"
        )
    return settings


def _length(budget: float | None, images: int | None, steps: int | None) -> Length | None:
    """Return the length that was asked for, if any was."""
    given = [value for value in (budget, images, steps) if value is not None]
    if len(given) > 1 or any(value <= 0 for value in given):
        raise UserError("give one of a time budget, a number of images or of steps, above 0")
    return Length(budget, images, steps) if given else None


def _buckets(
    source: str | Path | Dataset,
    data: Dataset,
    model: Model,
    tuning: finetune.Tuning | None,
    asks: Mapping[str, Any],
    name: str | Path,
) -> list[Dataset]:
    """Return the pictures near their own proportions: a data set for each (`data.buckets`)."""
    if not model.any_size or isinstance(source, Dataset) or (tuning and tuning.preserve):
        raise UserError(
            "data.buckets is for diffusion models of pictures given by path or name, without "
            f"--preserve; leave it out of this run of {Path(name).stem}"
        )
    return load_buckets(
        source,
        data.shape[1],
        multiple=asks.get("multiple", 1),
        channels=data.shape[0],
        captions=asks.get("captions", ()),
    )


def _stream(
    run: Run,
    sets: Sequence[Dataset],
    asks: Mapping[str, Any],
    tuning: finetune.Tuning | None,
    world: int,
) -> Iterator[Batch]:
    """Return the batches from where the run is; latents that are cached are computed first."""
    settings, flip = run.settings, bool(asks.get("flip", False))
    place: dict[str, Any] = {"seed": run.seed, "start": run.progress.seen, "flip": flip}
    place |= {"rank": run.rank, "world": world}
    if tuning is not None and tuning.preserve:
        weight = tuning.preserve_weight
        return preservation.mixed(run.data, run.out, settings.batch, weight, **place)
    kept: list[np.ndarray | None] = [None] * len(sets)
    if settings.cache and run.length.done(run.progress) < 1.0:
        started = time.perf_counter()
        known = (flip, run.length, settings.batch, run.where, sum(map(len, sets)))
        kept = [latents.keep(run.model, each, *known) for each in sets]
        run.progress.elapsed += time.perf_counter() - started  # encoding pictures is training
    if asks.get("buckets"):
        return bucketed(sets, settings.batch, kept=kept, **place)
    return batches(run.data, settings.batch, kept=kept[0], **place)


def load_frozen(module: nn.Module) -> None:
    """Give every frozen part the weights of the run that trained it.

    A frozen part of a frozen part needs nothing: it is in the outer one's file.

    Raises:
        UserError: the run's weights do not fit its recipe.
    """
    for part in module.children():
        if not isinstance(part, Frozen):
            load_frozen(part)
        elif part.path is not None:
            checkpoint.load_weights(part.module, checkpoint.read_model(part.path)[0], part.path)


def measure(module: nn.Module, data: Dataset) -> None:
    """Let all that measures the data see pictures from all over it, the same in every run.

    Parts before the whole, which may look through them. What is frozen has measured its own.

    Raises:
        UserError: there is nothing to be measured.
    """
    if isinstance(module, Frozen):
        return
    for part in module.children():
        measure(part, data)
    if isinstance(module, Measures):
        rows = np.linspace(0, len(data) - 1, min(len(data), MEASURED)).astype(np.int64)
        parts = np.array_split(rows, min(8, len(rows)))
        try:
            module.measure(to_float(data.tensor(some)) for some in parts)
        except ValueError as error:
            raise UserError(f"{data.name}: {error}") from error


def facts(data: Dataset) -> dict[str, Any]:
    """Return what recipes may ask of the data with `@name`."""
    channels, size, _ = data.shape
    return {
        "shape": list(data.shape),
        "channels": channels,
        "size": size,
        "classes": len(data.label_names),
        "attributes": len(data.attribute_names),
        "count": len(data),
    }
