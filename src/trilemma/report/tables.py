"""The report's tables: every number with its name, its meaning and its noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trilemma.report.scales import duration, number


@dataclass(frozen=True)
class Row:
    """One line of the table of numbers.

    Attributes:
        path: where a model holds the number, as `section.key`.
        title: its name; `{distance}` and `{kernel}` become the names of the scores.
        better: `higher`, `lower` or empty.
        help: what it is, in a sentence.
        write: writes it.
    """

    path: str
    title: str
    better: str
    help: str
    write: Callable[[float], str] = number


def share(value: float) -> str:
    """Write a share as a percentage, to a tenth below 10 %."""
    return f"{100 * value:.1f} %" if 0 < value < 0.0995 else f"{100 * value:.0f} %"


def size(value: float) -> str:
    """Write a number of bytes in MB."""
    return f"{number(value / 1e6)} MB"


def count(value: float) -> str:
    """Write a count: 950, 12.3 k, 4.56 M."""
    for factor, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.0f}"


GROUPS: tuple[tuple[str, tuple[Row, ...]], ...] = (
    (
        "Quality",
        (
            Row("scores.fd", "{distance}", "lower",
                "Fréchet distance between the features of drawn and real pictures, each taken as "
                "a Gaussian: sees blur, artefacts and missing variety together."),
            Row("scores.kd", "{kernel}", "lower",
                "Kernel distance (a maximum mean discrepancy) between the same features: unbiased, "
                "so it can be read at small numbers of pictures."),
            Row("scores.sfd", "spatial distance", "lower",
                "Fréchet distance on an early feature map: sees where things are in the picture."),
            Row("scores.swd", "sliced distance", "lower",
                "Sliced Wasserstein distance between the features, over random directions."),
            Row("scores.inception_score", "class score", "higher",
                "The Inception score's formula on the feature network's classes: sure of each "
                "picture, varied over all."),
            Row("scores.precision", "precision", "higher",
                "Share of drawn pictures that lie among the real ones.", share),
            Row("scores.density", "density", "higher",
                "How many real neighbourhoods hold a drawn picture, on average; real pictures "
                "score near 1."),
        ),
    ),
    (
        "Coverage",
        (
            Row("scores.coverage", "coverage", "higher",
                "Share of real pictures that have a drawn one in their neighbourhood.", share),
            Row("scores.recall", "recall", "higher",
                "Share of real pictures that lie among the drawn ones.", share),
            Row("scores.memorised", "nearer than held-out", "lower",
                "Share of drawn pictures that lie nearer to a training picture than real held-out "
                "pictures usually do: far above that of real pictures, the model copies.", share),
            Row("likelihood.bits_per_dim", "bits per dimension", "lower",
                "What the model needs to tell a held-out picture, per pixel and channel; of a VAE "
                "an upper bound, of a model by class nearly exact. It says nothing of how drawn "
                "pictures look."),
        ),
    ),
    (
        "Speed and cost",
        (
            Row("speed.images_per_second", "pictures per second", "higher",
                "Drawn on this machine, after a warm-up, in batches."),
            Row("speed.calls", "network calls", "lower",
                "Evaluations of the network for each picture."),
            Row("speed.parameters", "parameters", "", "Trained numbers in the model.", count),
            Row("speed.memory", "peak memory", "lower",
                "The most memory that drawing took beyond what was in use before.", size),
        ),
    ),
    (
        "Training",
        (
            Row("training.seconds", "time", "", "Time in the training loop alone.", duration),
            Row("training.images", "pictures seen", "", "Counting repetitions.", count),
            Row("training.steps", "steps", "", "Optimizer steps.", count),
            Row("training.images_per_second", "pictures per second", "",
                "Training pictures taken in per second."),
        ),
    ),
)  # fmt: skip


def find(model: Mapping[str, Any], path: str) -> Any:
    """Return the value at `section.key`, or None."""
    section, key = path.split(".")
    return model.get(section, {}).get(key)


def numbers(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of rows that have a number, each with its cells, real pictures last."""
    names = {"distance": report["protocol"]["distance"], "kernel": report["protocol"]["kernel"]}
    models: Sequence[Mapping[str, Any]] = report["models"]
    columns = [*models, {"scores": report["reference"]}]
    groups = []
    for title, rows in GROUPS:
        shown = []
        for row in rows:
            values = [find(model, row.path) for model in models]
            known = [value for value in values if value is not None]
            if not known:
                continue
            best, worst = min(known), max(known)
            if row.better == "higher":
                best, worst = worst, best
            cells = []
            for column in columns:
                value = find(column, row.path)
                error = column.get("noise", {}).get(row.path.partition(".")[2])
                cells.append(
                    {
                        "text": "–" if value is None else row.write(value),
                        "noise": row.write(2 * error) if error and value is not None else "",
                        "best": bool(row.better)
                        and value == best != worst
                        and column is not columns[-1],
                    }
                )
            shown.append(
                {"title": row.title.format(**names), "better": row.better, "help": row.help,
                 "cells": cells}
            )  # fmt: skip
        if shown:
            groups.append({"title": title, "rows": shown})
    return groups
