"""Several recipes, the same pictures, one budget: which generator costs what.

Every recipe is trained into its own run folder inside `out`. When all are trained and their speeds
are known, they are judged by the same protocol (`foresight` says by how many pictures), and told of
in one report. How each comes to its entry there, and what is kept of it when a comparison is
interrupted, is `entries`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trilemma import __version__, checkpoint, device, foresight, recipe, report
from trilemma import data as pictures
from trilemma.entries import Work
from trilemma.errors import UserError
from trilemma.judge import Judge
from trilemma.model import DrawsEmbeddings, Generator, Matches, TellsClasses
from trilemma.report import choice, commands, scales
from trilemma.report.commands import Request
from trilemma.training import facts

STEPS = (5, 10, 20, 50)
_OWN_FOLDERS = ("images", "scores", "speeds")
_FROM_PICTURES = {
    "unpaired": ("translates pictures", "translate"),
    "shrunk": ("enlarges pictures", "upscale"),
    "damaged": ("repairs pictures", "edit repair"),
}
"""What models of such data do, and by which command."""


def compare(
    recipes: Sequence[str],
    data: str | Path,
    *,
    out: str | Path,
    budget: float | None = None,
    equal: str = "time",
    images: int | None = None,
    size: int | None = None,
    seed: int = 0,
    n: int = 2000,
    judge_budget: float | None = None,
    features: str = "lite0",
    probes: int = 4,
    steps: Sequence[int] = STEPS,
    overrides: Sequence[str] = (),
    device_name: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train recipes under one budget, judge them alike, and write the report.

    Writes `report.html`, `report.json` and `trilemma.png` into `out`, beside a run folder for each
    recipe. Called again with the same request it goes on where it was; recipes can be added.

    Args:
        recipes: packaged recipes or recipe files.
        data: a named data set, or a folder or zip of pictures.
        out: the folder of the comparison.
        budget: seconds of training for each, with `equal="time"`.
        equal: `time`: the same seconds for each; `images`: the same number of training images.
        images: training images for each, with `equal="images"`.
        size: height and width of the pictures; None keeps theirs where that can be.
        seed: of training and of the drawn pictures.
        n: pictures that each model draws to be judged.
        judge_budget: seconds that a model may take to draw them; None for as long as the longest
            training, 5 minutes at least; infinity for no bound. If the slowest would take longer,
            all draw fewer; one that could not draw even 500 is not judged.
        features: what judges them, as for `evaluate`.
        probes: how often a model is scored while it trains, on fewer pictures.
        steps: numbers of steps at which models that draw in steps are scored.
        overrides: `section.key=value` changes to every recipe.
        device_name: `cpu`, `cuda` or `mps`; None picks the fastest there is.
        quiet: show nothing.

    Returns:
        The report, as in `report.json`.

    Raises:
        UserError: a recipe, budget or data that cannot be used, another comparison in `out`, or
            no recipe that came to an end.
        Interrupted: by Ctrl-C or SIGTERM; call again to go on.
    """
    out = Path(out)
    screen = Console(stderr=True, quiet=quiet, highlight=False)
    _check_length(equal, budget, images)
    if judge_budget is not None and not judge_budget > 0:
        raise UserError(f"judge_budget is {judge_budget}; expected seconds above 0, or infinity")
    specs = _specs(recipes, overrides)
    multiple = math.lcm(*(spec.get("data", {}).get("multiple", 1) for spec in specs.values()))
    training = pictures.load(data, split="train", size=size, multiple=multiple)
    held_out = pictures.load(data, split="test", size=training.shape[1], multiple=multiple)
    request = Request(
        str(data), list(training.shape), training.fingerprint, equal, budget, images, seed,
        list(overrides),
    )  # fmt: skip
    judge = Judge(
        training, held_out, out, n=n, features=features, seed=seed, steps=steps,
        device_name=device_name, screen=screen,
    )  # fmt: skip
    for name, spec in specs.items():
        if not (out / name / "recipe.toml").exists():  # else it holds what it uses
            recipe.resolve(spec, facts(training))  # a run that is not there is told of at once
    _agree(out, request)
    work = Work(
        specs, dict(zip(specs, recipes, strict=True)), training, request, judge, out, probes,
        device_name, quiet, screen,
    )  # fmt: skip
    measured = work.measured()
    rates = {name: each["speed"]["images_per_second"] for name, each in measured.items()}
    longest = budget or max((each["seconds"] for each in measured.values()), default=0.0)
    plan = foresight.plan(rates, n, judge_budget or max(foresight.LEAST, longest))
    judge.n = plan.n
    if plan.note:
        screen.print(plan.note, markup=False)
    for name, reason in plan.left_out.items():
        work.failed.append({"name": name, "error": reason, "speed": measured.pop(name)["speed"]})
        screen.print(f"{name} is {reason}", style="red", markup=False)
    models, failed = work.judged(measured), work.failed
    if not models:
        raise UserError(f"no recipe came to an end; {failed[0]['name']}: {failed[0]['error']}")
    made: dict[str, Any] = {
        "schema": report.SCHEMA,
        "trilemma": __version__,
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "title": "",
        "request": {**asdict(request), "recipes": list(specs), "n": n, "probe_n": judge.probe_n},
        "machine": _machine(device_name),
        "data": judge.data(),
        "judging": plan.told(),
        "protocol": judge.told(),
        "reference": judge.reference(),
        "models": models,
        "failed": failed,
        "commands": [commands.again(recipes, request, n, judge_budget, out)],
    }
    made["choice"] = choice.choose(made)
    made["title"] = choice.headline(made["choice"], models, Path(training.name).name)
    page = report.write(made, out)
    screen.print(summary(made))
    if plan.note:
        screen.print(plan.note, markup=False)
    screen.print(f"the report: {page}", soft_wrap=True)
    return made


def summary(made: dict[str, Any]) -> Table:
    """Return the main numbers of a report as a table for the terminal."""
    table = Table(title=made["title"], title_justify="left", box=None, header_style="bold")
    distance = made["protocol"]["distance"]
    for title in ("model", f"{distance} (lower)", "coverage (higher)", "pictures/s (higher)"):
        table.add_column(title, justify="left" if title == "model" else "right")
    _, coverage, _ = scales.axes(made)
    for model in made["models"]:
        written = (
            ("quality", scales.number(model["scores"]["fd"])),
            ("coverage", coverage.write(model["scores"]["coverage"])),
            ("speed", scales.number(model["speed"]["images_per_second"])),
        )
        best = made["choice"]
        cells = [
            f"[bold green]{text}[/]" if model["name"] in best[axis]["models"] else text
            for axis, text in written
        ]
        table.add_row(model["name"], *cells)
    real = made["reference"]
    table.add_row(
        "real pictures", scales.number(real["fd"]), coverage.write(real["coverage"]), "–",
        style="dim",
    )  # fmt: skip
    for entry in made["failed"]:
        cells = ["failed", "", ""]
        if "speed" in entry:
            cells = ["not judged", "", scales.number(entry["speed"]["images_per_second"])]
        table.add_row(entry["name"], *cells, style="red")
    return table


def _check_length(equal: str, budget: float | None, images: int | None) -> None:
    if equal not in ("time", "images"):
        raise UserError(f"equal is '{equal}'; expected time or images")
    given = {"budget": budget, "images": images}
    wanted, other = ("budget", "images") if equal == "time" else ("images", "budget")
    value = given[wanted]
    if value is None or value <= 0 or given[other] is not None:
        raise UserError(
            f"a comparison at equal {equal} needs --{wanted} above 0, and no --{other}: such as "
            f"{'--budget 10m' if equal == 'time' else '--equal images --images 500k'}"
        )


def _specs(recipes: Sequence[str], overrides: Sequence[str]) -> dict[str, recipe.Recipe]:
    """Return each recipe under its name, which its run folder bears too."""
    if not recipes:
        raise UserError(f"name the recipes to compare: {', '.join(recipe.names())}")
    specs: dict[str, recipe.Recipe] = {}
    for given in recipes:
        name = Path(given).stem
        if name in _OWN_FOLDERS:
            raise UserError(f"a recipe cannot be called '{name}' here: that is the report's folder")
        if name in specs:
            raise UserError(f"two recipes are called '{name}'; give each once, under its own name")
        specs[name] = recipe.override(recipe.load(given), overrides)
        pair = specs[name].get("data", {}).get("pair")
        if pair in _FROM_PICTURES:
            does, command = _FROM_PICTURES[pair]
        elif _is(specs[name], Generator, if_unknown=True):
            continue
        elif _is(specs[name], TellsClasses):
            does, command = "tells classes", "sample --classifier"
        elif _is(specs[name], Matches):
            does, command = "matches pictures and words", "search"
        elif _is(specs[name], DrawsEmbeddings):
            does, command = "draws embeddings of pictures", "join"
        else:
            does, command = "restores pictures", "edit reconstruct"
        raise UserError(
            f"{name} {does} and draws none of its own, so it cannot be compared with models that "
            f"do; train it by itself, and use trilemma {command}"
        )
    return specs


def _is(spec: recipe.Recipe, kind: type, if_unknown: bool = False) -> bool:
    """Whether the model is of a kind; one that cannot be built is told of in its turn."""
    try:
        return issubclass(recipe.lookup(spec["model"]["type"]), kind)
    except UserError:
        return if_unknown


def _agree(out: Path, request: Request) -> None:
    """Write the request into `out`, or check that it is the one already there."""
    path = out / "comparison.json"
    new = asdict(request)
    if path.exists():
        old = json.loads(path.read_text("utf-8"))
        for key, value in new.items():
            if old.get(key) != value:
                told = f"{key} was {old.get(key)} and is {value} now"
                if key == "fingerprint":
                    told = "the pictures have changed"
                raise UserError(
                    f"{out} holds another comparison: {told}; ask for the same again to go on with "
                    f"it, or take another --out"
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no comparison; take another --out")
    else:
        checkpoint.write_text(path, json.dumps(new, indent=2) + "\n")


def _machine(device_name: str | None) -> dict[str, Any]:
    where = device.pick(device_name)
    return {
        "device": where.type,
        "processor": device.name(where),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
