"""The three axes of the trilemma: where on them a model stands, and how their values are written.

The trilemma (Xiao, Kreis, Vahdat 2022, "Tackling the Generative Learning Trilemma with Denoising
Diffusion GANs", figure 1): a generator is to draw pictures of high quality, cover all that the data
holds, and be fast; the known families each have two of the three. Each axis maps a measured value
to a position from 0 (the centre) to 1 (the corner):

    quality    1 - log2(FD / floor) / doublings   floor: what real training pictures score
    coverage   the share of real pictures that have a drawn one among their near neighbours
    speed      log10(images per second), over whole decades

The Fréchet distance and the speed differ by factors between families, so both are logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Axis:
    """One corner of the triangle.

    Attributes:
        key: `quality`, `coverage` or `speed`.
        title: the corner's name.
        unit: what the value is, for people.
        explanation: one sentence: what is measured, what lies at the corner and at the centre.
        position: maps a value to [0, 1], the corner being 1.
        write: writes a value with its unit.
        ticks: values worth marking.
        marks: what is written at the ticks.
    """

    key: str
    title: str
    unit: str
    explanation: str
    position: Callable[[float], float]
    write: Callable[[float], str]
    ticks: list[float]
    marks: list[str]


def number(value: float) -> str:
    """Write three significant digits, with thousands separated: 12,300, 254, 8.21, 0.65."""
    if not math.isfinite(value):
        return "n/a"
    if value == round(value) and abs(value) < 1000:
        return f"{value:.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    if digits == 0:
        step = 10 ** max(0, math.floor(math.log10(abs(value))) - 2)
        return f"{round(value / step) * step:,}"
    return f"{value:.{digits}f}"


def short(value: float) -> str:
    """Write a round value in few characters: 0.5, 200, 1.5k, 2M."""
    for factor, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Write a time span for people: 45 s, 3 min, 1 h 20 min."""
    minutes = seconds / 60
    if minutes < 2 and minutes != 1:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{number(seconds)} s"
    if minutes < 90:
        return (
            f"{minutes:.0f} min" if abs(minutes - round(minutes)) < 0.05 else f"{minutes:.1f} min"
        )
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def axes(report: Mapping[str, Any]) -> tuple[Axis, Axis, Axis]:
    """Return the axes quality, coverage and speed for the models of a report."""
    models = report["models"]
    name = report["protocol"]["distance"]
    return (
        _quality([m["scores"]["fd"] for m in models], report["reference"]["fd"], name),
        _coverage(),
        _speed([m["speed"]["images_per_second"] for m in models]),
    )


def values(model: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return a model's quality (Fréchet distance), coverage and speed."""
    return model["scores"]["fd"], model["scores"]["coverage"], model["speed"]["images_per_second"]


def _quality(distances: Sequence[float], floor: float, name: str) -> Axis:
    worst = max([floor, *distances])
    doublings = min(10, max(4, math.ceil(math.log2(worst / floor))))

    def position(value: float) -> float:
        return _clip(1 - math.log2(max(value, floor) / floor) / doublings)

    return Axis(
        "quality",
        "Quality",
        f"{name}, lower is better",
        f"{name}: the Fréchet distance between the features of drawn and of real pictures. The "
        f"corner is what real training pictures score ({number(floor)}); each mark towards the "
        "centre is twice as far from real.",
        position,
        lambda value: f"{name[:2]} {number(value)}",
        [floor * 2**i for i in range(doublings + 1)],
        [f"real: {number(floor)}", *(f"× {2**i}" for i in range(1, doublings + 1))],
    )


def _coverage() -> Axis:
    return Axis(
        "coverage",
        "Coverage",
        "share of real pictures, higher is better",
        "The share of real pictures that have a drawn picture in their neighbourhood: what it does "
        "not cover, the model never draws. The corner is all of them, the centre none; a mark for "
        "each quarter.",
        _clip,
        lambda value: f"{100 * value:.0f} %",
        [0, 0.25, 0.5, 0.75, 1],
        ["0 %", "25 %", "50 %", "75 %", "100 %"],
    )


def _speed(speeds: Sequence[float]) -> Axis:
    top = math.ceil(math.log10(max(speeds, default=1000)) - 1e-9)
    bottom = math.floor(math.log10(min(speeds, default=1)) + 1e-9)
    bottom = min(bottom, top - 3)
    return Axis(
        "speed",
        "Speed",
        "pictures per second, higher is better",
        "Pictures drawn per second on this machine, in large batches. Each mark is ten times as "
        f"fast as the one before it, from {number(10.0**bottom)} at the centre to "
        f"{number(10.0**top)} at the corner.",
        lambda value: _clip((math.log10(max(value, 1e-9)) - bottom) / (top - bottom)),
        lambda value: f"{number(value)} /s",
        [10.0**i for i in range(bottom, top + 1)],
        [short(10.0**i) for i in range(bottom, top + 1)],
    )


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))
