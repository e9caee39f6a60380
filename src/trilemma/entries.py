"""Each recipe's way to its entry in the report of a comparison: trained, timed, judged.

What is done is kept in files, so that a comparison that was interrupted goes on where it was. A
recipe that fails is listed with its error and does not lose the rest.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from trilemma import checkpoint, recipe, sampling
from trilemma.data import Dataset
from trilemma.errors import UserError
from trilemma.judge import Judge
from trilemma.report import commands
from trilemma.report.commands import Request
from trilemma.sampling import Trained
from trilemma.settings import Length, Progress
from trilemma.training import train


@dataclass
class Work:
    """Each recipe's way to its entry in the report; what is done is kept in files (`_kept`).

    Attributes:
        specs: the recipes by name, and `given` as they were named or where their files are.
        failed: the models that did not come to an end, and why.
    """

    specs: dict[str, recipe.Recipe]
    given: dict[str, str]
    training: Dataset
    request: Request
    judge: Judge
    out: Path
    probes: int
    device_name: str | None
    quiet: bool
    screen: Console
    failed: list[dict[str, Any]] = field(default_factory=list)

    def measured(self) -> dict[str, dict[str, Any]]:
        """Train all; return each one's `speed`, and the `seconds` it was trained for."""
        found = {}
        for name, spec in self.specs.items():
            with self._listed(name):
                path, key = self.out / "speeds" / f"{name}.json", {"recipe": spec}
                each = _kept(path, key)
                if each is None:
                    trained = self._trained(name)
                    seconds = trained.progress["elapsed"]
                    each = {"seconds": seconds, "speed": self.judge.speed(trained)}
                    _keep(path, key, each)
                found[name] = each
        return found

    def judged(self, measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Judge the models of which `measured` tells; return their entries in the report."""
        found = []
        for name, each in measured.items():
            with self._listed(name):
                path = self.out / "scores" / f"{name}.json"
                key = {"recipe": self.specs[name], "protocol": self.judge.protocol}
                entry = _kept(path, key)
                if entry is None or not _has_sheets(self.out, entry):
                    trained = self._loaded(name)
                    self._tell(name, "judging")
                    judged = self.judge.full(trained, each["speed"])
                    probes = _probes(trained, judged.pop("quick")) if self.probes else []
                    entry = {**_facts(trained), **judged, "probes": probes}
                    _keep(path, key, entry)
                given, n = self.given[name], self.judge.n
                onward = commands.of_model(name, given, self.request, n, self.out)
                found.append(entry | {"commands": onward})
        return found

    def _loaded(self, name: str) -> Trained:
        folder = self.out / name
        if _done(folder, self.request):
            return sampling.load(folder, self.device_name)
        return self._trained(name)

    def _trained(self, name: str) -> Trained:
        """Train a recipe to the end of its budget, or go on with it."""
        folder, request = self.out / name, self.request
        _done(folder, request)  # refuses a run of another length

        def probe(model: Trained, elapsed: float) -> dict[str, Any]:
            seen = model.progress["seen"]
            if elapsed >= (request.budget or math.inf) or seen >= (request.images or math.inf):
                return {"skipped": "the model is finished; it is scored with the others"}
            return self.judge.probe(model)

        self._tell(name, "training")
        return train(
            self.given[name],
            self.training,
            out=folder,
            budget=request.budget,
            images=request.images,
            seed=request.seed,
            overrides=request.overrides,
            resume=(folder / "training").exists(),
            device_name=self.device_name,
            probe=probe,
            probes=self.probes,
            quiet=self.quiet,
        )

    def _tell(self, name: str, what: str) -> None:
        place = list(self.specs).index(name) + 1
        self.screen.print(f"[bold]{name}[/], {place} of {len(self.specs)}: {what}")

    @contextmanager
    def _listed(self, name: str) -> Iterator[None]:
        """Let a model's error lose that model alone: it is told of in the report."""
        try:
            yield
        except Exception as error:
            told = _told(error, self.out / f"{name}-error.txt")
            self.failed.append({"name": name, "error": told})
            self.screen.print(f"{name} failed: {told}", style="red", markup=False)


def _kept(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """Return what an earlier call has found out and written to `path`, if by the same key."""
    if not path.exists():
        return None
    kept = json.loads(path.read_text("utf-8"))
    return kept["entry"] if kept["key"] == json.loads(json.dumps(key)) else None


def _keep(path: Path, key: dict[str, Any], entry: dict[str, Any]) -> None:
    checkpoint.write_text(path, json.dumps({"key": key, "entry": entry}, indent=2) + "\n")


def _has_sheets(out: Path, entry: dict[str, Any]) -> bool:
    """Say whether the sheets of a judged model are there."""
    return all((out / entry[sheet]["path"]).exists() for sheet in ("sheet", "neighbours"))


def _done(folder: Path, request: Request) -> bool:
    """Say whether a run has come to the end of its budget.

    Raises:
        UserError: it was trained on, to another length than the others.
    """
    saved = folder / "model.safetensors"
    if not saved.exists():
        return False
    facts = checkpoint.read(saved)[1]
    length = facts["recipe"]["run"]["length"]
    if length not in ({"seconds": request.budget}, {"images": request.images}):
        told = ", ".join(f"{value:g} {unit}" for unit, value in length.items())
        raise UserError(
            f"{folder} was trained on to {told}, which is not what the others had; move it "
            f"away to train it anew, or compare in another --out"
        )
    return Length(**length).done(Progress(**facts["progress"])) >= 1.0


def _told(error: Exception, path: Path) -> str:
    """Return one line on an error; the traceback of one that is not the user's goes to a file."""
    if isinstance(error, UserError | ValueError | OSError):
        return str(error)
    path.write_text("".join(traceback.format_exception(error)), "utf-8")
    line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {line} (the traceback is in {path})"


def _facts(trained: Trained) -> dict[str, Any]:
    about, progress = trained.recipe.get("about", {}), trained.progress
    return {
        "name": trained.name,
        "conditional": trained.conditional,
        "family": about.get("family", ""),
        "summary": about.get("summary", ""),
        "paper": about.get("paper", ""),
        "training": {
            "seconds": progress["elapsed"],
            "images": progress["seen"],
            "steps": progress["step"],
            "images_per_second": progress["seen"] / progress["elapsed"],
        },
    }


def _probes(trained: Trained, last: dict[str, float]) -> list[dict[str, Any]]:
    """Return the quick scores while training, from the run's log, and the finished model's."""
    log = Path(trained.path or ".") / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    found = [
        {"seconds": line["elapsed"], "images": line["seen"], **line["probe"]}
        for line in lines
        if "skipped" not in line.get("probe", {"skipped": "no probe"})
    ]
    progress = trained.progress
    return [*found, {"seconds": progress["elapsed"], "images": progress["seen"], **last}]
