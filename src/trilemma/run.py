"""The state of a training run, and its files: what the loop moves and a checkpoint holds."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from torch import Tensor

from trilemma import __version__, adapters, checkpoint, device, recipe
from trilemma.conditioning import reads_text
from trilemma.data import Dataset
from trilemma.data.buckets import Size
from trilemma.errors import UserError
from trilemma.model import Model, Phase
from trilemma.networks import lora
from trilemma.optim import OPTIMIZERS
from trilemma.sampling import Trained
from trilemma.settings import Length, Progress, Settings

UNLIKE = ("about", "run.data", "run.length")  # of a recipe, what may differ when a run goes on,
FREE = ("compile", "grids", "log_every", "save_every", "watches")  # and of [train], which is told


class Run:
    """What the training loop moves, and what a checkpoint holds.

    Attributes:
        model: in training.
        average: its averaged weights, in evaluation mode: what is sampled and shared, without what
            only training needs.
        phases: of the model.
        optimizers: one for each phase, by the phase's name.
        rates: their learning rates before warm-up and schedule.
        progress: how far the run has come.
        length: how far it is to go.
        spec: the resolved recipe.
        out: the run folder.
        rank: this process; the first writes the files.
        attribute_shares: share of the training pictures that has each attribute.
        captions: some of the pictures', where the model reads them.
        buckets: heights and widths it learns from (`data.buckets`), the most frequent first.
    """

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
        buckets: Sequence[Size] = (),
    ) -> None:
        self.model, self.spec, self.settings, self.length = model, spec, settings, length
        self.data, self.out, self.rank, self.where = data, out, rank, where
        self.seed = spec["run"]["seed"]
        have = data.attributes
        self.attribute_shares = [] if have is None else have.mean(0).tolist()
        self.captions = captions(data) if reads_text(model) else []
        self.buckets = list(map(list, buckets))
        spec["run"]["length"] = {k: v for k, v in asdict(length).items() if v is not None}
        self.progress = Progress()
        try:
            self.phases = model.phases()
        except ValueError as error:  # something it learns with is missing
            raise UserError(f"{spec['run']['recipe']} cannot be trained: {error}") from error
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        for part in model.training_only:
            setattr(self.average, part, None)
        own = dict(model.named_parameters())
        pairs = [(mean, own[name]) for name, mean in self.average.named_parameters()]
        self._means: list[Tensor] = [mean for mean, value in pairs if value.requires_grad]
        self._values: list[Tensor] = [value for _, value in pairs if value.requires_grad]
        self.optimizers = {phase.name: self._optimizer(phase) for phase in self.phases}
        self.rates = {
            name: [group["lr"] for group in optimizer.param_groups]
            for name, optimizer in self.optimizers.items()
        }
        self.dtype = device.dtype(settings.precision, where)
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
        for name, value in chosen.items():
            if isinstance(value, str) or isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"optimizer {kind} has {name} {value!r}; expected a finite number")
        learn = [p for module in phase.modules for p in module.parameters() if p.requires_grad]
        return OPTIMIZERS[kind](learn, **chosen)

    def rate(self, done: float) -> float:
        """Return the factor on every learning rate when `done` of the run is done."""
        return self.settings.rate(self.progress.seen + self.settings.batch, done)

    @torch.no_grad()
    def update_average(self, images: int) -> None:
        """Move the averaged weights by an exponential average with a half-life in images."""
        halflife = min(self.settings.ema_halflife, self.progress.seen * self.settings.ema_rampup)
        weight = 1.0 - 0.5 ** (images / halflife) if halflife else 1.0
        torch._foreach_lerp_(self._means, self._values, weight)
        kept = dict(self.model.named_buffers())
        for name, mean in self.average.named_buffers():
            mean.copy_(kept[name])

    def trained(self) -> Trained:
        """Return the model so far, with its averaged weights."""
        spec, progress = self._shared(), asdict(self.progress)
        return Trained(self.average, spec, self._data(), progress, self.out)

    def _shared(self) -> dict[str, Any]:
        """Return the recipe of what is sampled and shared: without what only training needs."""
        left = self.model.training_only
        model = {key: value for key, value in self.spec["model"].items() if key not in left}
        return {**self.spec, "model": model}

    def _data(self) -> dict[str, Any]:
        data = self.data
        return {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "count": len(data),
            "shape": list(data.shape),
            "label_names": data.label_names,
            "attribute_names": data.attribute_names,
            "attribute_shares": self.attribute_shares,
            "captions": self.captions,
            "buckets": self.buckets,
        }

    def write_recipe(self) -> None:
        """Write the resolved recipe into the run folder."""
        checkpoint.write_text(self.out / "recipe.toml", tomli_w.dumps(self.spec))

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
            "precision": next(k for k, v in device.FORMATS.items() if v == self.dtype),
        }
        checkpoint.write(
            self.out / "training" / "state.safetensors", tensors, {**about, "state": state}
        )
        shared = {**about, "recipe": self._shared()}
        checkpoint.write(self.out / "model.safetensors", lora.merged(self.average), shared)
        adapters.write(self.out, self.average, shared)

    def restore(self, keep_length: bool) -> list[str]:
        """Take up the state in the run folder, and its length too if `keep_length`.

        What does not change what is learned may have changed: how sampling is done if nothing is
        said, how often the run is saved, logged and looked at, whether it is compiled.

        Returns:
            What has changed, for people.

        Raises:
            UserError: there is none, or it is of another recipe or other data.
        """
        path = self.out / "training" / "state.safetensors"
        if not path.exists():
            raise UserError(f"there is nothing to resume in {self.out}; leave out --resume")
        tensors, facts = checkpoint.read(path)
        told = []
        for place, differs in _differences(json.loads(json.dumps(self.spec)), facts["recipe"]):
            if place not in [f"train.{name}" for name in FREE] and place.split(".")[0] != "sample":
                raise UserError(
                    f"{self.out} was trained with another recipe: {differs}; resume with the same "
                    f"recipe and settings, or start anew in another --out (--init {self.out}); "
                    f"[sample] may change, and of [train] {', '.join(FREE)}"
                )
            told.append(differs)
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
        self.dtype = device.FORMATS[facts["precision"]]
        if keep_length:
            self.spec["run"]["length"] = facts["recipe"]["run"]["length"]
            self.length = Length(**self.spec["run"]["length"])
        return told


def captions(data: Dataset, most: int = 100) -> list[str]:
    """Return the captions of some pictures from all over the data, the same each time."""
    rows = np.linspace(0, len(data) - 1, min(len(data), most)).astype(np.int64)
    told = data.condition(rows).text or []
    return list(dict.fromkeys(text for text in told if text))


def _differences(new: Any, old: Any, path: str = "") -> list[tuple[str, str]]:
    """List what differs between two nested specs: its place, and `place is new now and was old`."""
    if path in UNLIKE:
        return []
    if isinstance(new, dict) and isinstance(old, dict):
        keys = dict.fromkeys([*new, *old])
        parts = ((new.get(key), old.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
        return [found for part in parts for found in _differences(*part)]
    return [] if new == old else [(path, f"{path} is {new} now and was {old}")]
