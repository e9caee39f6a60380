"""What a recipe's `[train]` may say, how long a run is to be, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Settings:
    """A recipe's `[train]`.

    Attributes:
        batch: images per step, over all processes.
        images: length of training when the user gives none.
        accumulate: parts a process cuts its batch into, to save memory.
        clip: largest norm of a phase's gradient; 0 does not clip.
        warmup: images over which the learning rate rises from 0; at most a fifth of training, lest
            a short budget end in it.
        schedule: `constant`, or `linear` or `cosine` to 0 at the end of training, or `linear-half`:
            constant for the first half, then linear to 0.
        ema_halflife: images after which an old weight counts half in the average; 0 for none.
        ema_rampup: the half-life is at most this share of the images seen so far.
        precision: `auto`, `bf16` or `fp32`.
        compile: `auto`, `on` or `off`: torch.compile.
        optimizer: `type` (adam, adamw, muon, rmsprop) and its arguments.
        phases: the same per phase name, over `optimizer`.
        cache: where the model learns on what a frozen first stage makes of pictures, compute that
            once and keep it (`latents`).
        save_every: seconds between saves.
        grids: sample grids drawn during training.
        watches: how often an adversarial run's coverage is looked at, evenly spread; 0 also turns
            off the warning of a critic that is too sure.
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
    cache: bool = True
    save_every: float = 60.0
    grids: int = 10
    watches: int = 20
    log_every: int = 50

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule '{self.schedule}' is not one of {', '.join(SCHEDULES)}")
        for kind in fields(self):
            value = getattr(self, kind.name)
            if kind.type in ("int", "float") and not isinstance(value, int | float):
                raise ValueError(f"{kind.name} is {value!r}; expected a number")
        for name in ("batch", "images", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def rate(self, seen: int, done: float) -> float:
        """Return the factor on every learning rate after so many images and share of training."""
        rise = seen / self.warmup if self.warmup else 1.0
        return min(1.0, max(rise, done / LONGEST_WARMUP)) * SCHEDULES[self.schedule](done)


LONGEST_WARMUP = 0.2
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "linear-half": lambda done: min(1.0, 2.0 * (1.0 - done)),
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
