"""The training loop, the same for every family.

A step takes one batch through the model's phases. In a phase only its own modules learn. All
randomness is a function of the run's seed and the position in the data, so an interrupted run that
goes on is, bit for bit, the run that was never interrupted; and several processes, or gradient
accumulation, give the losses of one process with the same total batch, to rounding.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trilemma import (
    alarm,
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
from trilemma.errors import Interrupted, UserError
from trilemma.log import Log, clock, count
from trilemma.model import Begins, Frozen, Losses, Measures, Model, Phase
from trilemma.previews import Previews
from trilemma.run import Run
from trilemma.sampling import Trained
from trilemma.settings import Length, Progress, Settings

PATIENCE = 5  # non-finite steps in a row before a run gives up
MEASURED = 512  # pictures from which a part of a model measures the data
SHOW_EVERY = 0.5  # seconds between updates of the progress bar


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
    recipe.check_arguments(Settings, spec.get("train", {}), "[train]")
    try:
        settings = Settings(**spec.get("train", {}))
    except ValueError as error:
        raise UserError(f"[train] {error}") from error
    given = [value for value in (budget, images, steps) if value is not None]
    if len(given) > 1 or any(value <= 0 for value in given):
        raise UserError("give one of a time budget, a number of images or of steps, above 0")
    length = Length(budget, images, steps) if given else None
    if settings.batch % (world * settings.accumulate):
        raise UserError(
            f"a batch of {settings.batch} cannot be shared by {world} processes in "
            f"{settings.accumulate} parts each; choose train.batch a multiple of both"
        )
    spec["run"] = {"recipe": Path(name).stem, "data": data.name, "size": data.shape[1]}
    spec["run"]["seed"] = seed

    torch.manual_seed(seed)
    model: Model = recipe.build(spec["model"])
    sets, sizes = [data], []
    if asks.get("buckets"):
        if not model.any_size or isinstance(source, Dataset) or (tuning and tuning.preserve):
            raise UserError(
                "data.buckets is for diffusion models of pictures given by path or name, without "
                f"--preserve; leave it out of this run of {Path(name).stem}"
            )
        sets = load_buckets(
            source,
            data.shape[1],
            multiple=asks.get("multiple", 1),
            channels=data.shape[0],
            captions=asks.get("captions", ()),
        )
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
    flip = bool(asks.get("flip", False))
    place: dict[str, Any] = {"start": run.progress.seen, "flip": flip, "rank": rank, "world": world}
    if tuning is not None and tuning.preserve:
        if rank == 0 and not resume:
            preservation.draw(tuning.init, tuning.preserve, out, seed, device_name)
        distributed.barrier()
        weight = tuning.preserve_weight
        stream = preservation.mixed(data, out, settings.batch, weight, seed=seed, **place)
    else:
        kept: list[np.ndarray | None] = [None] * len(sets)
        if settings.cache and run.length.done(run.progress) < 1.0:
            started = time.perf_counter()
            known = (flip, run.length, settings.batch, where, sum(map(len, sets)))
            kept = [latents.keep(model, each, *known) for each in sets]
            run.progress.elapsed += time.perf_counter() - started  # encoding pictures is training
        if asks.get("buckets"):
            stream = bucketed(sets, settings.batch, seed=seed, kept=kept, **place)
        else:
            stream = batches(data, settings.batch, seed=seed, kept=kept[0], **place)
    with signals.caught() as asked:
        loop(run, stream, asked, probe, probes, quiet, notes)
    return run.trained()


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
    """Let every part that measures the data see pictures from all over it, the same in every run.

    What is frozen has measured its own.

    Raises:
        UserError: there is nothing to be measured.
    """
    for part in module.children():
        if isinstance(part, Measures):
            rows = np.linspace(0, len(data) - 1, min(len(data), MEASURED)).astype(np.int64)
            parts = np.array_split(rows, min(8, len(rows)))
            try:
                part.measure(to_float(data.tensor(some)) for some in parts)
            except ValueError as error:
                raise UserError(f"{data.name}: {error}") from error
        elif not isinstance(part, Frozen):
            measure(part, data)


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


def loop(
    run: Run,
    stream: Iterator[Batch],
    asked: threading.Event,
    probe: Callable[[Trained, float], dict[str, Any]] | None = None,
    probes: int = 0,
    quiet: bool = True,
    notes: Sequence[str] = (),
) -> None:
    """Train to the end of `length`; save on the way, at the end, and when asked to stop.

    `notes` are told first.
    """
    settings, progress = run.settings, run.progress
    first = run.rank == 0
    log = Log(run.out if first else None, run.spec["run"]["recipe"], quiet, progress.step)
    try:
        for note in [*notes, *([_skipped(run.data)] if run.data.skipped else [])]:
            log.say(note)
        if first:
            run.write_recipe()
        if progress.step == 0:
            run.save()
        for phase in run.phases:
            for module in phase.modules:
                device.maybe_compile(module, settings.compile, run.where)
        _steps(run, log, stream, asked, probe, probes)
    finally:
        log.close()


def _steps(
    run: Run,
    log: Log,
    stream: Iterator[Batch],
    asked: threading.Event,
    probe: Callable[[Trained, float], dict[str, Any]] | None,
    probes: int,
) -> None:
    progress, settings, length = run.progress, run.settings, run.length
    bad_in_row, saved_at, shown_at = 0, time.monotonic(), 0.0
    started_at, started_seen = progress.elapsed, progress.seen
    done = length.done(progress)
    previews = Previews(run.out / "samples", log.say)
    drawn, probed = _share(done, settings.grids), _share(done, probes)
    watched = _share(done, settings.watches)
    watching = run.rank == 0 and settings.watches > 0 and len(run.data) > 1
    ears = alarm.Alarm(run.out / "log.jsonl") if watching else None
    mark = time.perf_counter()
    while done < 1.0:
        batch = next(stream).to(run.where)
        device.seed(hash((run.seed, progress.step, run.rank)) & 0x7FFFFFFF, run.where)  # dropout
        told: dict[str, Tensor] = {}
        trouble = None
        for phase in run.phases:
            if progress.step % phase.every or progress.seen < phase.start:
                continue
            losses, trouble = take(run, phase, batch, run.rate(done))
            told.update(_named(losses, phase, run.phases))
            if trouble:
                break
        if trouble:
            bad_in_row += 1
            log.write({"step": progress.step, "seen": progress.seen, "non_finite": trouble})
            log.say(f"step {progress.step}: {trouble}; the step is skipped")
            if bad_in_row == PATIENCE:
                _give_up(run, trouble)
        else:
            bad_in_row = 0
            run.update_average(settings.batch)
        progress.step += 1
        progress.seen += settings.batch
        now = time.perf_counter()
        progress.elapsed, stop = distributed.largest(
            progress.elapsed + now - mark, float(asked.is_set())
        )
        mark = now
        done = length.done(progress)

        write = progress.step % settings.log_every == 0 or done >= 1.0
        if write or time.monotonic() - shown_at > SHOW_EVERY:
            shown_at = time.monotonic()
            rate = (progress.seen - started_seen) / max(progress.elapsed - started_at, 1e-9)
            line = {
                **asdict(progress),
                "images_per_second": rate,
                **{key: float(value) for key, value in told.items()},
            }
            if write:
                log.write(line)
                for warning in ears.hear(line) if ears is not None else ():
                    log.say(warning)
            here = max(done - length.done(Progress(0, started_seen, started_at)), 1e-9)
            log.show(done, line, (progress.elapsed - started_at) * (1 - done) / here)
        due = time.monotonic() - saved_at > settings.save_every
        if (due or done >= 1.0 or stop) and not bad_in_row:  # trouble is no good state
            run.save()
            saved_at = time.monotonic()
        if stop:
            raise Interrupted(
                f"stopped at step {progress.step} ({count(progress.seen)} images); "
                f"the state is saved in {run.out}; add --resume to go on"
            )
        if run.rank == 0 and _share(done, settings.grids) > drawn:
            previews.draw(run.trained(), run.data, progress.elapsed)
            drawn = _share(done, settings.grids)
        if ears is not None and _share(done, settings.watches) > watched:
            watched = _share(done, settings.watches)
            if ears.adversarial and run.trained().draws:
                numbers = {"coverage": alarm.coverage(run.trained(), run.data)}
                line = {**asdict(progress), "watch": numbers}
                log.write(line)
                for warning in ears.hear(line):
                    log.say(warning)
        if probe is not None and _share(done, probes) > probed:
            if run.rank == 0:
                numbers = probe(run.trained(), progress.elapsed)
                log.write({**asdict(progress), "probe": numbers})
            probed = _share(done, probes)
        distributed.barrier()
        mark = time.perf_counter()  # grids, watches, probes and saves are not training
    if run.rank == 0:
        share = progress.seen / run.settings.images
        log.say(
            f"trained on {count(progress.seen)} images in {clock(progress.elapsed)}"
            + (f", {share:.2%} of what the recipe asks for" if share < 0.1 else "")
            + f"; the model is {run.out / 'model.safetensors'}"
        )


def take(run: Run, phase: Phase, batch: Batch, rate: float) -> tuple[Losses, str | None]:
    """Take one phase's turn; return its losses, and what was not finite, if anything."""
    optimizer = run.optimizers[phase.name]
    accumulate = run.settings.accumulate
    total: Losses = {}
    with only_these_learn(run.model, phase.modules, run.optimizers):
        run.model.train()
        for part in batch.split(accumulate):
            with device.autocast(run.dtype, run.where):
                losses = phase.loss(part)
            (losses["loss"] / accumulate).backward()
            for key, value in losses.items():
                total[key] = total.get(key, 0) + value.detach().float() / accumulate
    distributed.average_gradients(phase.modules)
    distributed.average(total.values())
    learn = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in learn if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    trouble = None
    if not torch.isfinite(norm + total["loss"]):
        trouble = _name_trouble(run, phase, total)
    else:
        if run.settings.clip:
            nn.utils.clip_grads_with_norm_(learn, run.settings.clip, norm)
        for group, base in zip(optimizer.param_groups, run.rates[phase.name], strict=True):
            group["lr"] = base * rate
        optimizer.step()
        if phase.after is not None:
            phase.after()
    optimizer.zero_grad(set_to_none=True)
    return total, trouble


def _name_trouble(run: Run, phase: Phase, losses: Losses) -> str:
    bad = [key for key, value in losses.items() if not torch.isfinite(value)]
    if bad:
        return f"phase '{phase.name}': {', '.join(bad)} is not finite"
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"phase '{phase.name}': the gradient of {name} is not finite"
    return f"phase '{phase.name}': the gradient's norm overflows"


def _give_up(run: Run, trouble: str) -> None:
    path = run.out / "training" / "state.safetensors"
    _, state = checkpoint.read(path)
    raise UserError(
        f"{PATIENCE} steps in a row were skipped: {trouble}. The run is back at its last good "
        f"state, step {state['progress']['step']}. Try a learning rate two to ten times "
        f"smaller (--set train.optimizer.lr=...), train.clip=1, or train.precision=fp32"
    )


@contextmanager
def only_these_learn(
    model: nn.Module, modules: Sequence[nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> Iterator[None]:
    """Let gradients reach the parameters of `modules` alone, for the time of one phase."""
    if len(optimizers) == 1:
        yield
        return
    learn = {id(p) for module in modules for p in module.parameters()}
    held = [p for p in model.parameters() if p.requires_grad and id(p) not in learn]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def _skipped(data: Dataset) -> str:
    """Say which files are left out, the first few by name."""
    told = [f"  {path}: {reason}" for path, reason in list(data.skipped.items())[:5]]
    rest = f"\n  all of them: trilemma data check {data.name}" if len(data.skipped) > 5 else ""
    return "\n".join([f"{len(data.skipped)} files cannot be used and are left out:", *told]) + rest


def _named(losses: Losses, phase: Phase, phases: Sequence[Phase]) -> Losses:
    """Prefix the losses with the phase's name where there are several phases."""
    return losses if len(phases) == 1 else {f"{phase.name}/{k}": v for k, v in losses.items()}


def _share(done: float, parts: int) -> int:
    """Return how many of `parts` evenly spread marks have been passed."""
    return int(done * parts + 1e-9)
