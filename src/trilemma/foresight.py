"""How many pictures the models of a comparison are judged by: equally many, in the time allowed.

Distances and coverage depend on the number of pictures, so models are only held against each other
at one number. Where the slowest would draw its pictures for longer than is allowed, all are judged
by fewer. A model that could not even draw `FEWEST` is left out, lest it make all scores rough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trilemma.report.scales import duration, number

FEWEST = 500  # pictures to be judged by at least, where so many were asked for
LEAST = 300.0  # seconds of drawing that are allowed after however short a training


@dataclass(frozen=True)
class Plan:
    """What is foreseen, and what is done about it.

    Attributes:
        n: pictures that each model is judged by.
        asked: pictures that were asked for.
        bound: seconds that drawing a model's pictures may take; infinity for no bound.
        foreseen: seconds that each model would take for all that were asked for.
        note: why there are fewer than were asked for, in a sentence; or empty.
        left_out: why a model is not judged, in a sentence, by its name.
    """

    n: int
    asked: int
    bound: float
    foreseen: dict[str, float]
    note: str
    left_out: dict[str, str]

    def told(self) -> dict[str, Any]:
        """Return what the report tells of it; no bound is None."""
        bound = None if math.isinf(self.bound) else self.bound
        return {"asked": self.asked, "bound": bound, "foreseen": self.foreseen, "note": self.note}


def plan(rates: Mapping[str, float], asked: int, bound: float) -> Plan:
    """Foresee how long models draw, and settle by how many pictures all are judged.

    Args:
        rates: measured pictures per second, by the model's name.
        asked: pictures to be judged by.
        bound: seconds that drawing a model's pictures may take.
    """
    foreseen = {name: asked / rate for name, rate in rates.items()}
    if math.isinf(bound):
        return Plan(asked, asked, bound, foreseen, "", {})
    fewest = min(FEWEST, asked)
    allowed = f"{duration(bound)} are allowed (--judge-budget)"
    left_out = {
        name: _too_slow(rate, fewest, asked, allowed)
        for name, rate in rates.items()
        if fewest / rate > bound
    }
    within = {name: rate for name, rate in rates.items() if name not in left_out}
    slowest = min(within, key=lambda name: within[name], default="")
    if not within or foreseen[slowest] <= bound:
        return Plan(asked, asked, bound, foreseen, "", left_out)
    n = _rounded(math.floor(bound * within[slowest]))
    note = (
        f"Every model is judged by {n:,} pictures, not the {asked:,} asked for: {slowest} draws "
        f"{number(within[slowest])} a second, {asked:,} would take it "
        f"{duration(foreseen[slowest])}, and {allowed}."
    )
    return Plan(n, asked, bound, foreseen, note, left_out)


def _too_slow(rate: float, fewest: int, asked: int, allowed: str) -> str:
    offers = [
        f"{math.ceil(n / rate / 60)}m to judge every model by {n:,} pictures"
        for n in sorted({fewest, asked})
    ]
    return (
        f"trained, but not judged: it draws {number(rate)} pictures a second, {fewest:,} would "
        f"take it {duration(fewest / rate)}, and {allowed}; call again with --judge-budget "
        f"{', or '.join(offers)}; what is trained is kept"
    )


def _rounded(count: int) -> int:
    """Round down to two digits, so that a speed measured a little differently changes nothing."""
    step = 10 ** max(0, len(str(count)) - 2)
    return count // step * step
