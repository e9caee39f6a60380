"""The commands that go on from a comparison, as a user can paste them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """What the models of a comparison have in common; it cannot change on the way.

    Attributes:
        data: the data set's name or path.
        shape: (C, H, W) of a picture.
        fingerprint: of its training pictures.
        equal: `time` or `images`.
        budget: seconds of training, when time is equal.
        images: training images, when these are equal.
        seed: of everything random.
        overrides: changes to every recipe.
    """

    data: str
    shape: list[int]
    fingerprint: str
    equal: str
    budget: float | None
    images: int | None
    seed: int
    overrides: list[str]


def _command(words: Sequence[str | Path], request: Request) -> str:
    told = ["trilemma", *words, "--data", request.data]
    return shlex.join(str(word) for word in told)


def _training_options(request: Request, times: int) -> str:
    if request.budget is not None:
        length = f"--budget {_span(times * request.budget)}"
    else:
        length = f"--images {times * (request.images or 0)}"
    changes = "".join(f" --set {shlex.quote(change)}" for change in request.overrides)
    return f" --size {request.shape[1]} --seed {request.seed} {length}{changes}"


def _span(seconds: float) -> str:
    """Write a length of time as the command line reads it."""
    seconds = math.ceil(seconds)
    return f"{seconds // 60}m" if seconds % 60 == 0 else f"{seconds}s"


def of_model(name: str, given: str, request: Request, n: int, out: Path) -> list[dict[str, str]]:
    """Return what to do next with a model."""
    folder = out / name
    return [
        {
            "what": "Train it on, to ten times the length",
            "command": _command(["train", given, "--out", folder, "--resume"], request)
            + _training_options(request, 10),
        },
        {
            "what": "Draw 64 pictures",
            "command": shlex.join(
                ["trilemma", "sample", str(folder), "-n", "64", "--out", f"{folder}-pictures"]
            ),
        },
        {
            "what": "Score it again",
            "command": _command(["evaluate", folder, "--n", str(n)], request)
            + (f" --seed {request.seed}" if request.seed else ""),
        },
    ]


def again(
    recipes: Sequence[str], request: Request, n: int, judge_budget: float | None, out: Path
) -> dict[str, str]:
    """Return how to make the same comparison at greater length."""
    words = ["compare", *recipes, *(() if request.equal == "time" else ("--equal", "images"))]
    words += ["--n", str(n)]
    if judge_budget is not None:
        words += ["--judge-budget", "none" if math.isinf(judge_budget) else _span(judge_budget)]
    words += ["--out", f"{out}-longer"]
    options = _training_options(request, 10)
    return {
        "what": "The same comparison, ten times as long",
        "command": _command(words, request) + options,
    }
