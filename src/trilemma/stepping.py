"""The training loop, the same for every family.

A step takes one batch through the model's phases. In a phase only its own modules learn. All
randomness is a function of the run's seed and the position in the data, so an interrupted run that
goes on is, bit for bit, the run that was never interrupted; and several processes, or gradient
accumulation, give the losses of one process with the same total batch, to rounding.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from trilemma import alarm, checkpoint, device, distributed
from trilemma.batch import Batch
from trilemma.data import Dataset
from trilemma.errors import Interrupted, UserError
from trilemma.log import Log, clock, count
from trilemma.model import Losses, Phase
from trilemma.previews import Previews
from trilemma.run import Run
from trilemma.sampling import Trained
from trilemma.settings import Progress

PATIENCE = 5  # non-finite steps in a row before a run gives up
SHOW_EVERY = 0.5  # seconds between updates of the progress bar


def loop(
    run: Run,
    stream: Iterator[Batch],
    asked: threading.Event,
    probe: Callable[[Trained, float], dict[str, Any]] | None = None,
    probes: int = 0,
    quiet: bool = True,
    notes: Sequence[str] = (),
) -> None:
    """Train to the end of the run's length; save on the way, at the end, and when asked to stop.

    Args:
        run: from where it is.
        stream: its batches from there on.
        asked: set when it is to save and stop.
        probe: called with the model so far and the seconds trained; its numbers are logged.
        probes: how often, evenly spread over the whole run.
        quiet: show nothing.
        notes: told first.

    Raises:
        UserError: a loss or gradient that stays non-finite.
        Interrupted: asked to stop, after saving.
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
        told, trouble = _turns(run, batch, run.rate(done))
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


def _turns(run: Run, batch: Batch, rate: float) -> tuple[Losses, str | None]:
    """Take the turns of the phases whose step this is; return their losses, and any trouble."""
    told: Losses = {}
    for phase in run.phases:
        if run.progress.step % phase.every or run.progress.seen < phase.start:
            continue
        losses, trouble = take(run, phase, batch, rate)
        several = len(run.phases) > 1  # then the phase's name comes before a loss's
        told |= {f"{phase.name}/{k}" if several else k: v for k, v in losses.items()}
        if trouble:
            return told, trouble
    return told, None


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


def _share(done: float, parts: int) -> int:
    """Return how many of `parts` evenly spread marks have been passed."""
    return int(done * parts + 1e-9)
