"""The training loop, the same for every family.

A step takes one batch through the model's phases. In a phase only its own modules learn. All
randomness is a function of the run's seed and the position in the data, so an interrupted run that
goes on is, bit for bit, the run that was never interrupted; and several processes, or gradient
accumulation, give the losses of one process with the same total batch, to rounding.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor, nn

from trilemma import __version__, checkpoint, device, distributed, recipe, sampling
from trilemma.batch import Batch
from trilemma.data import Dataset, batches
from trilemma.data import load as load_data
from trilemma.errors import Interrupted, UserError
from trilemma.log import Log, clock, count
from trilemma.model import Losses, Model, Phase
from trilemma.optim import OPTIMIZERS
from trilemma.sampling import Trained

PATIENCE = 5  # non-finite steps in a row before a run gives up
SHOW_EVERY = 0.5  # seconds between updates of the progress bar


@dataclass(frozen=True)
class Settings:
    """A recipe's `[train]`.

    Attributes:
        batch: images per step, over all processes.
        images: length of training when the user gives none.
        accumulate: parts a process cuts its batch into, to save memory.
        clip: largest norm of a phase's gradient; 0 does not clip.
        warmup: images over which the learning rate rises from 0.
        schedule: `constant`, or `linear` or `cosine` to 0 at the end of training.
        ema_halflife: images after which an old weight counts half in the average; 0 for none.
        ema_rampup: the half-life is at most this share of the images seen so far.
        precision: `auto`, `bf16` or `fp32`.
        compile: `auto`, `on` or `off`: torch.compile.
        optimizer: `type` (adam, adamw, muon) and its arguments.
        phases: the same per phase name, over `optimizer`.
        save_every: seconds between saves.
        grids: sample grids drawn during training.
        log_every: steps between lines of the log.
    """

    batch: int = 128
    images: int = 1_000_000
    accumulate: int = 1
    clip: float = 0.0
    warmup: int = 0
    schedule: str = "constant"
    ema_halflife: float = 50_000
    ema_rampup: float = 0.05
    precision: str = "auto"
    compile: str = "auto"
    optimizer: dict[str, Any] = field(default_factory=lambda: {"type": "adam", "lr": 2e-4})
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    save_every: float = 60.0
    grids: int = 10
    log_every: int = 50

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule '{self.schedule}' is not one of {', '.join(SCHEDULES)}")
        for name in ("batch", "images", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


@dataclass
class Progress:
    """How far a run has come: optimizer steps, images seen, seconds of training."""

    step: int = 0
    seen: int = 0
    elapsed: float = 0.0


@dataclass(frozen=True)
class Length:
    """How long to train: exactly one of seconds, images or steps."""

    seconds: float | None = None
    images: int | None = None
    steps: int | None = None

    def done(self, progress: Progress) -> float:
        """Return the share that is done, 1 at the end."""
        if self.seconds is not None:
            return min(1.0, progress.elapsed / self.seconds)
        if self.images is not None:
            return min(1.0, progress.seen / self.images)
        return min(1.0, progress.step / (self.steps or 1))


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
        init: a run whose fitting weights to start from.
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
    asks = spec.get("data", {})
    if not isinstance(data, Dataset):
        data = load_data(data, split="train", size=size, multiple=asks.get("multiple", 1))
    out = Path(out) if out is not None else Path("runs") / Path(name).stem
    spec = recipe.resolve(spec, facts(data))
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
    if init is not None:
        start_from(model, sampling.load(init, "cpu").model, str(init))
    device.prepare(model, where, device.dtype(settings.precision, where))
    at_most = length or Length(images=settings.images)
    run = Run(model, spec, settings, at_most, data, out, rank, where)
    if resume:
        run.restore(keep_length=length is None)
    elif (out / "training").exists():
        raise UserError(f"{out} already holds a run; add --resume to go on, or take another --out")
    distributed.barrier()  # all have looked at the folder before the first process writes to it
    with _signals(run):
        run.loop(world, probe, probes, quiet, bool(asks.get("flip", False)))
    return run.trained()


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


class Run:
    """The state of one training run: what the loop moves, and what a checkpoint holds."""

    def __init__(
        self,
        model: Model,
        spec: dict[str, Any],
        settings: Settings,
        length: Length,
        data: Dataset,
        out: Path,
        rank: int,
        where: torch.device,
    ) -> None:
        self.model, self.spec, self.settings, self.length = model, spec, settings, length
        self.data, self.out, self.rank, self.where = data, out, rank, where
        self.seed = spec["run"]["seed"]
        spec["run"]["length"] = {k: v for k, v in asdict(length).items() if v is not None}
        self.progress = Progress()
        self.phases = model.phases()
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimizers = {phase.name: self._optimizer(phase) for phase in self.phases}
        self.rates = {
            name: [group["lr"] for group in optimizer.param_groups]
            for name, optimizer in self.optimizers.items()
        }
        self.dtype = device.dtype(settings.precision, where)
        self.stop_asked = False
        unknown = settings.phases.keys() - self.optimizers.keys()
        if unknown:
            raise UserError(
                f"[train.phases.{min(unknown)}] names no phase; this model has "
                f"{', '.join(self.optimizers)}"
            )

    def _optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        chosen = {**self.settings.optimizer, **self.settings.phases.get(phase.name, {})}
        kind = chosen.pop("type", "adam")
        if kind not in OPTIMIZERS:
            raise UserError(f"no optimizer '{kind}'; there is {', '.join(OPTIMIZERS)}")
        recipe.check_arguments(OPTIMIZERS[kind], {"params": 0, **chosen}, f"optimizer {kind}")
        learn = [p for module in phase.modules for p in module.parameters() if p.requires_grad]
        return OPTIMIZERS[kind](learn, **chosen)

    def loop(
        self,
        world: int,
        probe: Callable[[Trained, float], dict[str, Any]] | None,
        probes: int,
        quiet: bool,
        flip: bool,
    ) -> None:
        """Train to the end of `length`; save on the way, at the end, and when asked to stop."""
        settings, progress = self.settings, self.progress
        first = self.rank == 0
        log = Log(self.out if first else None, self.spec["run"]["recipe"], quiet, progress.step)
        try:
            if self.data.skipped:
                log.say(_skipped(self.data))
            if first and progress.step == 0:
                self._write_recipe()
            if progress.step == 0:
                self.save()
            for phase in self.phases:
                for module in phase.modules:
                    device.maybe_compile(module, settings.compile, self.where)
            stream = batches(
                self.data,
                settings.batch,
                seed=self.seed,
                start=progress.seen,
                flip=flip,
                rank=self.rank,
                world=world,
            )
            self._loop(log, stream, probe, probes)
        finally:
            log.close()

    def _loop(
        self,
        log: Log,
        stream: Iterator[Batch],
        probe: Callable[[Trained, float], dict[str, Any]] | None,
        probes: int,
    ) -> None:
        progress, settings, length = self.progress, self.settings, self.length
        bad_in_row, saved_at, shown_at = 0, time.monotonic(), 0.0
        started_at, started_seen = progress.elapsed, progress.seen
        done = length.done(progress)
        drawn, probed = _share(done, settings.grids), _share(done, probes)
        mark = time.perf_counter()
        while done < 1.0:
            batch = next(stream).to(self.where)
            torch.manual_seed(hash((self.seed, progress.step, self.rank)) & 0x7FFFFFFF)  # dropout
            told: dict[str, Tensor] = {}
            trouble = None
            for phase in self.phases:
                if progress.step % phase.every:
                    continue
                losses, trouble = self._take(phase, batch, self._rate(done))
                told.update(_named(losses, phase, self.phases))
                if trouble:
                    break
            if trouble:
                bad_in_row += 1
                log.write({"step": progress.step, "seen": progress.seen, "non_finite": trouble})
                log.say(f"step {progress.step}: {trouble}; the step is skipped")
                if bad_in_row == PATIENCE:
                    self._give_up(trouble)
            else:
                bad_in_row = 0
                self._update_average(settings.batch)
            progress.step += 1
            progress.seen += settings.batch
            now = time.perf_counter()
            progress.elapsed, stop = distributed.largest(
                progress.elapsed + now - mark, float(self.stop_asked)
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
                here = max(done - length.done(Progress(0, started_seen, started_at)), 1e-9)
                log.show(done, line, (progress.elapsed - started_at) * (1 - done) / here)
            due = time.monotonic() - saved_at > settings.save_every
            if (due or done >= 1.0 or stop) and not bad_in_row:  # trouble is no good state
                self.save()
                saved_at = time.monotonic()
            if stop:
                raise Interrupted(
                    f"stopped at step {progress.step} ({count(progress.seen)} images); "
                    f"the state is saved in {self.out}; add --resume to go on"
                )
            if self.rank == 0 and _share(done, settings.grids) > drawn:
                self._draw_grid()
                drawn = _share(done, settings.grids)
            if probe is not None and _share(done, probes) > probed:
                if self.rank == 0:
                    numbers = probe(self.trained(), progress.elapsed)
                    log.write({**asdict(progress), "probe": numbers})
                probed = _share(done, probes)
            distributed.barrier()
            mark = time.perf_counter()  # grids, probes and saves are not training
        if self.rank == 0:
            log.say(
                f"trained on {count(progress.seen)} images in {clock(progress.elapsed)}; "
                f"the model is {self.out / 'model.safetensors'}"
            )

    def _take(self, phase: Phase, batch: Batch, rate: float) -> tuple[Losses, str | None]:
        """Take one phase's turn; return its losses, and what was not finite, if anything."""
        optimizer = self.optimizers[phase.name]
        accumulate = self.settings.accumulate
        total: Losses = {}
        with only_these_learn(self.model, phase.modules, self.optimizers):
            self.model.train()
            for part in batch.split(accumulate):
                with device.autocast(self.dtype, self.where):
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
            trouble = self._name_trouble(phase, total)
        else:
            if self.settings.clip:
                nn.utils.clip_grads_with_norm_(learn, self.settings.clip, norm)
            for group, base in zip(optimizer.param_groups, self.rates[phase.name], strict=True):
                group["lr"] = base * rate
            optimizer.step()
            if phase.after is not None:
                phase.after()
        optimizer.zero_grad(set_to_none=True)
        return total, trouble

    def _name_trouble(self, phase: Phase, losses: Losses) -> str:
        bad = [key for key, value in losses.items() if not torch.isfinite(value)]
        if bad:
            return f"phase '{phase.name}': {', '.join(bad)} is not finite"
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"phase '{phase.name}': the gradient of {name} is not finite"
        return f"phase '{phase.name}': the gradient's norm overflows"

    def _give_up(self, trouble: str) -> None:
        path = self.out / "training" / "state.safetensors"
        _, state = checkpoint.read(path)
        raise UserError(
            f"{PATIENCE} steps in a row were skipped: {trouble}. The run is back at its last good "
            f"state, step {state['progress']['step']}. Try a learning rate two to ten times "
            f"smaller (--set train.optimizer.lr=...), train.clip=1, or train.precision=fp32"
        )

    def _rate(self, done: float) -> float:
        warmup = self.settings.warmup
        rise = min(1.0, (self.progress.seen + self.settings.batch) / warmup) if warmup else 1.0
        return rise * SCHEDULES[self.settings.schedule](done)

    @torch.no_grad()
    def _update_average(self, images: int) -> None:
        """Move the averaged weights by an exponential average with a half-life in images."""
        halflife = min(self.settings.ema_halflife, self.progress.seen * self.settings.ema_rampup)
        weight = 1.0 - 0.5 ** (images / halflife) if halflife else 1.0
        torch._foreach_lerp_(
            list(self.average.parameters()), list(self.model.parameters()), weight
        )
        for mean, value in zip(self.average.buffers(), self.model.buffers(), strict=True):
            mean.copy_(value)

    def _draw_grid(self) -> None:
        """Draw a sample grid at fixed seeds into `samples/`."""
        trained = self.trained()
        n = 100 if trained.conditional else 64
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        sheet = sampling.grid(trained.sample(n), 10 if trained.conditional else 8)
        sheet.save(folder / f"{self.progress.seen:09d}.png")

    def trained(self) -> Trained:
        """Return the model so far, with its averaged weights."""
        return Trained(self.average, self.spec, self._data(), asdict(self.progress), self.out)

    def _data(self) -> dict[str, Any]:
        data = self.data
        return {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "count": len(data),
            "shape": list(data.shape),
            "label_names": data.label_names,
            "attribute_names": data.attribute_names,
        }

    def _write_recipe(self) -> None:
        temporary = self.out / ".recipe.toml.tmp"
        temporary.write_bytes(tomli_w.dumps(self.spec).encode())
        checkpoint.replace(temporary, self.out / "recipe.toml")

    def save(self) -> None:
        """Write the run's state and its model; the first process does it for all."""
        if self.rank != 0:
            return
        tensors: dict[str, Tensor] = {}
        state = {
            "model": checkpoint.flatten("model", self.model.state_dict(), tensors),
            "average": checkpoint.flatten("average", self.average.state_dict(), tensors),
            "optimizers": checkpoint.flatten(
                "optimizers", {k: o.state_dict() for k, o in self.optimizers.items()}, tensors
            ),
        }
        about = {
            "trilemma": __version__,
            "recipe": self.spec,
            "data": self._data(),
            "progress": asdict(self.progress),
        }
        checkpoint.write(
            self.out / "training" / "state.safetensors", tensors, {**about, "state": state}
        )
        checkpoint.write(self.out / "model.safetensors", self.average.state_dict(), about)

    def restore(self, keep_length: bool) -> None:
        """Take up the state in the run folder, and its length too if `keep_length`.

        Raises:
            UserError: there is none, or it is of another recipe or other data.
        """
        path = self.out / "training" / "state.safetensors"
        if not path.exists():
            raise UserError(f"there is nothing to resume in {self.out}; leave out --resume")
        tensors, facts = checkpoint.read(path)
        differs = _differences(json.loads(json.dumps(self.spec)), facts["recipe"])
        if differs:
            raise UserError(
                f"{self.out} was trained with another recipe: {differs[0]}; resume with the same "
                f"recipe and settings, or start anew in another --out (--init {self.out})"
            )
        if facts["data"]["fingerprint"] != self.data.fingerprint:
            raise UserError(
                f"the pictures have changed since {self.out} was begun; restore them, or start "
                f"anew in another --out (--init {self.out})"
            )
        state = {k: checkpoint.unflatten(rest, tensors) for k, rest in facts["state"].items()}
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
            for parameter, own in optimizer.state.items():
                for key, value in own.items():  # fused steps need the parameter's memory layout
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        own[key] = torch.empty_like(parameter).copy_(value)
        self.progress = Progress(**facts["progress"])
        if keep_length:
            self.spec["run"]["length"] = facts["recipe"]["run"]["length"]
            self.length = Length(**self.spec["run"]["length"])


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


@contextmanager
def _signals(run: Run) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a request to stop after the step at hand."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if run.stop_asked:  # asked twice: do not wait for the step to end
            raise KeyboardInterrupt
        run.stop_asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_from(model: Model, other: Model, where: str) -> None:
    """Copy every weight of `other` that has the same name and shape in `model`.

    Raises:
        UserError: none has.
    """
    own, given = model.state_dict(), other.state_dict()
    fitting = {
        name: tensor
        for name, tensor in given.items()
        if name in own and own[name].shape == tensor.shape
    }
    if not fitting:
        raise UserError(f"no weight of {where} fits this recipe; --init needs a run of its kind")
    model.load_state_dict(fitting, strict=False)


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


def _differences(new: Any, old: Any, path: str = "") -> list[str]:
    """List what differs between two nested specs, as `key: new here, old there`."""
    if isinstance(new, dict) and isinstance(old, dict):
        keys = list(dict.fromkeys([*new, *old]))
        return [
            found
            for key in keys
            if f"{path}.{key}" not in (".about", "run.length")
            for found in _differences(new.get(key), old.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if new == old else [f"{path} is {new} now and was {old}"]
