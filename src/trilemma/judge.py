"""Scores the models of a comparison alike, and looks at the real pictures only once.

Everything is a score of `trilemma.metrics` on the features of one extractor. What is added here:

- a floor: real training pictures, scored as if a model had drawn them;
- noise: the standard error of a score, from the scatter s of the scores of five equal parts of the
  drawn pictures, s / sqrt(5). A part's Fréchet distance is larger than the whole's, but scatters
  as the whole's does, by the root of the count;
- quick scores on few pictures, while a model trains and for several numbers of steps, always on
  equally many drawn and real pictures, so that they can be put beside each other.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from trilemma.data import Dataset
from trilemma.errors import UserError
from trilemma.evaluation import likelihood, score, title
from trilemma.memory import peak_memory
from trilemma.metrics import reference as references
from trilemma.metrics.features import Features, extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.metrics.neighbours import memorised, nearest
from trilemma.metrics.prdc import density_coverage, precision_recall
from trilemma.metrics.reference import Reference
from trilemma.metrics.speed import foresee, network_calls, speed
from trilemma.model import Generator
from trilemma.report import sheets
from trilemma.report.tables import share
from trilemma.sampling import Trained

PROBE_N = 500
PARTS = 5
PATIENCE = 60.0  # seconds that drawing for one quick score may take
LONGEST = 30.0  # seconds that drawing one batch may take when speed is measured
BATCH = 128
ROWS = 6  # of a sample sheet
PAIRS, NEAR = 5, 4  # drawn pictures with their nearest training pictures
_MOST_COLUMNS = 12


class Judge:
    """One way of judging, and the real pictures to judge by.

    Args:
        training: the pictures that the models learn from.
        held_out: the pictures that they are judged by.
        folder: where sheets of pictures are put, under `images/`.
        n: pictures each model draws; it can be made smaller (`foresight`), not below `probe_n`.
        features: names the extractor.
        seed: of the first drawn picture; picture i has seed + i.
        steps: numbers of steps to score a model at that draws in steps.
        device_name: where the extractor runs.
        screen: where progress is shown.

    Raises:
        UserError: too few pictures to judge by.
    """

    def __init__(
        self,
        training: Dataset,
        held_out: Dataset,
        folder: Path,
        *,
        n: int,
        features: str,
        seed: int,
        steps: Sequence[int],
        device_name: str | None,
        screen: Console,
    ) -> None:
        if n < 50:
            raise UserError(f"n is {n}; models are judged by at least 50 pictures each")
        if len(held_out) < 10:
            raise UserError(
                f"{held_out.name} holds out {len(held_out)} pictures for judging; at least 10 are "
                f"needed: add pictures, or put some into a folder test/ beside train/"
            )
        self.training, self.held_out, self.folder = training, held_out, folder
        self.n, self.seed, self.steps, self.screen = n, seed, list(steps), screen
        self.probe_n = min(PROBE_N, n, len(held_out))
        self.see = extractor(features, device_name)

    @property
    def protocol(self) -> dict[str, Any]:
        """What a model's scores depend on, but for the model."""
        return {
            **self.see.protocol,
            "training": self.training.fingerprint,
            "held_out": self.held_out.fingerprint,
            "n": self.n,
            "probe_n": self.probe_n,
            "steps": self.steps,
            "seed": self.seed,
        }

    @cached_property
    def _real(self) -> Reference:
        return references.of_dataset(self.held_out, self.see, limit=50_000, pooled_only=False)

    @cached_property
    def _known(self) -> Tensor:
        """The features (T, D) of all training pictures."""
        known = references.of_dataset(
            self.training, self.see, limit=len(self.training), pooled_only=True
        )
        return _given(known.pooled)

    @cached_property
    def _few_real(self) -> Reference:
        """As many held-out pictures as a quick score draws."""
        rows = references.thinned(len(self.held_out), self.probe_n)
        return references.of_features(Features(_given(self._real.pooled)[rows]), {})

    def probe(self, trained: Trained) -> dict[str, Any]:
        """Return quick scores, or `skipped` and why when drawing would take too long."""
        where = trained.where
        once, each = foresee(lambda size: trained.sample(size, seed=self.seed), where, PATIENCE)
        needed = math.ceil(self.probe_n / BATCH) * once + self.probe_n * each
        if needed > PATIENCE:
            return {"skipped": f"drawing {self.probe_n} pictures would take {needed:.0f} s"}
        drawn = trained.sample(self.probe_n, seed=self.seed)
        return self._quick(self.see(drawn, pooled_only=True).pooled)

    def _quick(self, drawn: Tensor) -> dict[str, float]:
        few = self._few_real
        real = _given(few.pooled)
        _, recall = precision_recall(real, drawn)
        _, coverage = density_coverage(real, drawn)
        distance = frechet_distance(statistics(drawn), few.statistics)
        return {"fd": distance, "recall": recall, "coverage": coverage}

    def speed(self, trained: Trained) -> dict[str, Any]:
        """Measure what drawing costs (`metrics.speed.speed`), of slow models in smaller batches."""

        def draw(size: int) -> Tensor:
            return trained.sample(size, seed=self.seed, batch=size)

        return speed(trained.model, draw, sorted({1, min(BATCH, self.n)}), LONGEST)

    def full(self, trained: Trained, cost: dict[str, Any]) -> dict[str, Any]:
        """Return all that the report tells of a model but its training.

        `cost` is what drawing costs by `speed`.
        """
        name = trained.name
        drawn, cost = self._drawn(trained, cost)
        seen = self.see(drawn)
        quick = self._quick(seen.pooled[: self.probe_n])
        scores = score(seen, self._real)
        unseen = references.thinned(len(self.held_out), 2000)
        scores["memorised"] = memorised(seen.pooled, _given(self._real.pooled)[unseen], self._known)
        columns = self._columns
        sheet, near = f"images/{name}.png", f"images/{name}-neighbours.png"
        sheets.save(drawn[: columns * ROWS], columns, self.folder / sheet)
        self._save_neighbours(drawn, seen.pooled, self.folder / near)
        labels = "each class in turn" if trained.conditional else "none"
        return {
            "scores": scores,
            "noise": self._noise(seen.pooled),
            "speed": cost,
            "likelihood": likelihood(trained, self.held_out) or {},
            "quick": quick,
            "steps": self._steps(trained, quick, cost),
            "sheet": {
                "path": sheet,
                "alt": f"{min(columns * ROWS, self.n)} pictures drawn by {name}",
            },
            "neighbours": {
                "path": near,
                "alt": f"{PAIRS} pictures drawn by {name}, each with its {NEAR} nearest training "
                f"pictures",
                "note": f"{share(scores['memorised'])} of its pictures lie closer to a training "
                f"picture than all but 5 % of unseen real ones do.",
            },
            "protocol": {
                "drawn": f"{self.n:,} pictures",
                "seeds": f"{self.seed} to {self.seed + self.n - 1}",
                "labels": labels,
                **trained.options({}),
                "timed in": f"batches of {cost['batch']}",
                "weights": f"averaged, after {trained.progress['seen']:,} pictures",
            },
        }

    def _drawn(self, trained: Trained, cost: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Draw the pictures to judge by; return them, and what drawing costs.

        Of a model so slow that its speed was measured in smaller batches, these are timed.
        """
        size = self._batch(cost)
        batches = iter(
            track(
                trained.batches(self.n, seed=self.seed, batch=size),
                "drawing",
                total=-(-self.n // size),
                console=self.screen,
                transient=True,
                disable=not self.screen.is_terminal,
            )
        )
        if cost["batch"] >= size:
            return torch.cat(list(batches)), cost
        parts: list[Tensor] = []
        start = time.perf_counter()
        memory = peak_memory(lambda: parts.append(next(batches)), trained.where)
        parts += islice(batches, self.n // size - 1)  # what is left is no whole batch
        rate = size * len(parts) / (time.perf_counter() - start)
        by_batch = {**cost["by_batch"], str(size): rate}
        timed = {"images_per_second": rate, "batch": size, "by_batch": by_batch, "memory": memory}
        return torch.cat([*parts, *batches]), {**cost, **timed}

    def _batch(self, cost: dict[str, Any]) -> int:
        """Return how many pictures are drawn at a time: as many as there is memory for."""
        return min(BATCH, self.n, cost["room"] or BATCH)

    def _noise(self, drawn: Tensor) -> dict[str, float]:
        """Return the standard errors of the scores that a choice rests on."""
        real = _given(self._real.pooled)
        found: dict[str, list[float]] = {"fd": [], "coverage": [], "recall": [], "precision": []}
        size = len(drawn) // PARTS
        # Consecutive pictures: each part holds all classes, for these are drawn in turn.
        for part in drawn[: size * PARTS].split(size):
            some = real[references.thinned(len(real), size)]
            precision, recall = precision_recall(some, part)
            found["fd"].append(frechet_distance(statistics(part), self._real.statistics))
            found["coverage"].append(density_coverage(some, part)[1])
            found["recall"].append(recall)
            found["precision"].append(precision)
        return {key: float(np.std(values, ddof=1) / PARTS**0.5) for key, values in found.items()}

    def _steps(
        self, trained: Trained, quick: dict[str, float], cost: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Return quick scores for several numbers of steps, if the model draws in steps."""
        generator = cast(Generator, trained.model)
        parameters = inspect.signature(generator.sample).parameters
        if "steps" not in parameters or not self.steps:
            return []
        own = trained.options({}).get("steps", parameters["steps"].default)
        rate = cost["images_per_second"]
        rows = []
        for steps in sorted({*self.steps, own}):
            if steps == own:
                rows.append(
                    {"steps": own, "calls": cost["calls"], "images_per_second": rate, **quick}
                )
                continue
            if self.probe_n / (rate * own / steps) > PATIENCE:
                continue
            with network_calls(trained.model) as calls:
                trained.sample(1, seed=self.seed, steps=steps)
            start = time.perf_counter()
            few = trained.sample(self.probe_n, seed=self.seed, batch=self._batch(cost), steps=steps)
            row = {
                "steps": steps,
                "calls": max(calls.values(), default=0),
                "images_per_second": self.probe_n / (time.perf_counter() - start),
            }
            rows.append(row | self._quick(self.see(few, pooled_only=True).pooled))
        return rows

    def _save_neighbours(self, drawn: Tensor, seen: Tensor, path: Path) -> None:
        near, _ = nearest(seen[:PAIRS], self._known, min(NEAR, len(self._known)))
        rows = [torch.cat([drawn[i : i + 1], self.training.tensor(near[i])]) for i in range(PAIRS)]
        sheets.save(torch.cat(rows), rows[0].shape[0], path, lead=True)

    @property
    def _columns(self) -> int:
        """The columns of a sample sheet: one for each class, when these are few."""
        classes = len(self.training.label_names)
        return classes if 2 <= classes <= _MOST_COLUMNS else 8

    def reference(self) -> dict[str, Any]:
        """Return the scores of real training pictures."""
        shuffled = np.random.default_rng(self.seed).permutation(len(self.training))
        rows = np.sort(shuffled[: self.n])
        seen = self.see(self.training.tensor(rows))
        few = np.sort(shuffled[: self.probe_n])
        quick = self._quick(self.see(self.training.tensor(few), pooled_only=True).pooled)
        return {**score(seen, self._real), "n": len(rows), "probe": quick}

    def data(self) -> dict[str, Any]:
        """Return what the report tells of the pictures, and save a sheet of them."""
        training, columns = self.training, self._columns
        classes = len(training.label_names)
        labelled = columns == classes and training.label is not None
        if labelled and training.label is not None:
            by_class = [np.flatnonzero(training.label == c)[:ROWS] for c in range(classes)]
            fewest = min(len(rows) for rows in by_class)
            chosen = np.stack([rows[:fewest] for rows in by_class], axis=1).reshape(-1)
        if not labelled or not len(chosen):
            chosen = references.thinned(len(training), columns * ROWS)
            labelled = False
        sheets.save(training.tensor(chosen), columns, self.folder / "images" / "real.png")
        return {
            "name": training.name,
            "fingerprint": training.fingerprint,
            "shape": list(training.shape),
            "count": len(training),
            "test_count": len(self.held_out),
            "label_names": training.label_names,
            "columns": training.label_names if labelled else [],
            "sheet": {"path": "images/real.png", "alt": f"{len(chosen)} real training pictures"},
            "sheet_note": f"the first {columns * ROWS} seeds, the same for every model"
            + (", a column for each class." if labelled else "."),
        }

    def told(self) -> dict[str, Any]:
        """Return the protocol that all scores share, in words."""
        facts = self._real.protocol
        return {
            "distance": _written(title("fd", self.see.name)),
            "kernel": _written(title("kd", self.see.name)),
            "n": self.n,
            "neighbour_note": f"Near means in the features of {self.see.name}, among all "
            f"{len(self.training):,} training pictures.",
            "shared": {
                "features": self.see.name,
                "weights": self.see.weights or "unknown",
                "resize": self.see.resize,
                "precision": "float32",
                "drawn": self.n,
                "real, held out": facts["reference_n"],
                "real, floor": min(self.n, len(self.training)),
                "data": self.held_out.name,
                "fingerprint": self.held_out.fingerprint[:16],
                "noise": f"two standard errors, from {PARTS} parts of the drawn pictures",
                "while training": f"{self.probe_n} drawn against {self.probe_n} held-out pictures",
            },
        }


def _given(features: Tensor | None) -> Tensor:
    """Return features that are known to be there."""
    assert features is not None
    return features


def _written(name: str) -> str:
    """Write `fd-lite0` as FD-Lite0."""
    head, dash, tail = name.partition("-")
    return f"{head.upper()}{dash}{tail.capitalize()}"
