"""The report's figures as inline SVG: text stays text, and colours follow the page's scheme.

Every colour is a CSS class (`m0` to `m7` for the models) that the page's style sheet defines for
light and for dark; every model has a marker and a dash pattern besides, so that nothing rests on
colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from trilemma.report.scales import Axis, duration, number, short

PALETTE = 8
HOLE = 0.08
"""The radius that stands for position 0: a model that is last on every axis keeps a shape."""

_DASHES = ("", "7 4", "2 4", "9 4 2 4", "12 3", "5 2 1 2", "3 3", "14 4 3 4")


def corner(axis: int, position: float) -> tuple[float, float]:
    """Return x (right) and y (up) of a position on axis 0 (top), 1 (left) or 2 (right)."""
    radius = HOLE + (1 - HOLE) * position
    angle = math.radians(90 + 120 * axis)
    return radius * math.cos(angle), radius * math.sin(angle)


def triangle(
    axes: Sequence[Axis],
    scores: Sequence[float] | None,
    others: Sequence[Sequence[float]] = (),
    index: int = 0,
    label: str = "",
) -> str:
    """Draw one model's triangle, the others' outlines behind it, its values at the corners.

    `scores` None draws the key: the empty triangle with its marks written out.
    """

    def at(axis: int, position: float) -> tuple[float, float]:
        x, y = corner(axis, position)
        return 160 + 132 * x, 176 - 132 * y

    def ring(positions: Sequence[float], css: str) -> str:
        points = " ".join("{:.1f},{:.1f}".format(*at(i, p)) for i, p in enumerate(positions))
        return f'<polygon class="{css}" points="{points}"/>'

    parts = [ring((1, 1, 1), "frame")]
    for i, axis in enumerate(axes):
        (x0, y0), (x1, y1) = at(i, 0), at(i, 1)
        parts.append(f'<path class="spoke" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
        for tick in axis.ticks:
            x, y = at(i, axis.position(tick))
            parts.append(f'<circle class="tick" cx="{x:.1f}" cy="{y:.1f}" r="2"/>')
    parts += [ring([a.position(v) for a, v in zip(axes, o, strict=True)], "ghost") for o in others]
    if scores is None:
        written = _tick_labels(axes, at)
    else:
        places = [a.position(v) for a, v in zip(axes, scores, strict=True)]
        parts.append(ring(places, f"shape m{index % PALETTE}"))
        parts += [
            marker(index, *at(i, place), 5.5, f"dot m{index % PALETTE}")
            for i, place in enumerate(places)
        ]
        written = []
    for i, (axis, x, y) in enumerate(zip(axes, (160, 46, 274), (16, 262, 262), strict=True)):
        value = "" if scores is None else axis.write(scores[i])
        written.append(f'<text class="corner" x="{x}" y="{y}">{axis.title}</text>')
        written.append(f'<text class="value" x="{x}" y="{y + 19}">{value}</text>')
    return _svg(320, 286, label, parts + written, "triangle")


def _tick_labels(
    axes: Sequence[Axis], at: Callable[[int, float], tuple[float, float]]
) -> list[str]:
    """Write the marks beside their axes, as many as fit."""
    parts = []
    for i, axis in enumerate(axes):
        shown = [
            (axis.position(tick), text)
            for tick, text in zip(axis.ticks, axis.marks, strict=True)
            if axis.position(tick) > 0.1  # in the middle the marks of all axes meet
        ]
        for place, text in shown[:: max(1, math.ceil(len(shown) / 5))]:
            x, y = at(i, place)
            dx, dy, anchor = ((7, 4, "start"), (-2, -7, "end"), (2, -7, "start"))[i]
            parts.append(
                f'<text class="mark" x="{x + dx:.1f}" y="{y + dy:.1f}" '
                f'text-anchor="{anchor}">{text}</text>'
            )
    return parts


def marker(index: int, x: float, y: float, r: float, css: str) -> str:
    """Draw the marker of model `index` at (x, y): circle, square, triangle, diamond, ..."""
    shape = index % PALETTE
    if shape == 0:
        return f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    sides, turn, inner = (
        (4, 45, 1.0), (3, -90, 1.0), (4, 0, 1.0), (5, -90, 0.45), (3, 90, 1.0), (6, 0, 1.0),
        (4, 45, 0.4),
    )[shape - 1]  # fmt: skip
    points = []
    steps = sides if inner == 1 else 2 * sides
    for k in range(steps):
        radius = r * 1.25 * (inner if inner != 1 and k % 2 else 1)
        angle = math.radians(turn + 360 * k / steps)
        points.append(f"{x + radius * math.cos(angle):.1f},{y + radius * math.sin(angle):.1f}")
    return f'<polygon class="{css}" points="{" ".join(points)}"/>'


@dataclass(frozen=True)
class Series:
    """One model's points (x, y) in a chart."""

    name: str
    index: int
    points: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """One direction of a chart.

    Attributes:
        title: what is shown, with its unit.
        ticks: values to mark.
        low, high: the ends.
        log: logarithmic.
        write: writes a tick.
    """

    title: str
    ticks: list[float]
    low: float
    high: float
    log: bool = False
    write: Callable[[float], str] = number

    def place(self, value: float) -> float:
        """Return where `value` is between low (0) and high (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def log_scale(title: str, values: Sequence[float]) -> Scale:
    """Make a logarithmic scale that holds `values`, with at most six round ticks."""
    low, high = min(values) / 1.15, max(values) * 1.15
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(ticks) <= 6:
            break
    return Scale(title, ticks, low, high, log=True, write=short)


def time_scale(title: str, longest: float) -> Scale:
    """Make a linear scale of seconds from 0 to `longest`."""
    units = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
    step = next((u for u in units if longest / u <= 5), 86400 * math.ceil(longest / 86400 / 5))
    ticks = [float(t) for t in range(0, int(longest) + 1, step)]
    return Scale(title, ticks, 0, max(longest, 1e-9), write=lambda t: duration(t) if t else "0")


def fixed_scale(title: str, ticks: Sequence[float], write: Callable[[float], str]) -> Scale:
    """Make a linear scale from the first to the last of `ticks`."""
    return Scale(title, list(ticks), ticks[0], ticks[-1], write=write)


def lines(
    series: Sequence[Series],
    x: Scale,
    y: Scale,
    label: str,
    reference: tuple[float, str] | None = None,
) -> str:
    """Draw lines with markers, named at their right ends; `reference` is a labelled level."""
    width, height, left, right, top, bottom = 480, 330, 56, 130, 34, 52

    def px(value: float) -> float:
        return left + x.place(value) * (width - left - right)

    def py(value: float) -> float:
        return height - bottom - y.place(value) * (height - top - bottom)

    parts = [f'<text class="axis" x="4" y="16">{escape(y.title)}</text>']
    for tick in y.ticks:
        parts.append(
            f'<path class="grid" d="M{left} {py(tick):.1f}H{width - right}"/><text class="mark" '
            f'x="{left - 8}" y="{py(tick) + 4.5:.1f}" text-anchor="end">{y.write(tick)}</text>'
        )
    for tick in x.ticks:
        parts.append(
            f'<text class="mark" x="{px(tick):.1f}" y="{height - bottom + 21}" '
            f'text-anchor="middle">{x.write(tick)}</text>'
        )
    middle = (left + width - right) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x.title)}</text>"
    )
    ends: list[tuple[float, str, str]] = []
    if reference:
        level, name = reference
        parts.append(f'<path class="level" d="M{left} {py(level):.1f}H{width - right}"/>')
        ends.append((py(level), name, "muted"))
    for s in series:
        css = f"m{s.index % PALETTE}"
        path = "L".join(f"{px(a):.1f} {py(b):.1f}" for a, b in s.points)
        dash = _DASHES[s.index % PALETTE]
        parts.append(f'<path class="line {css}" stroke-dasharray="{dash}" d="M{path}"/>')
        parts += [marker(s.index, px(a), py(b), 4.5, f"dot {css}") for a, b in s.points]
        ends.append((py(s.points[-1][1]), s.name, f"ink {css}"))
    for place, (_, name, css) in zip(
        spread([e[0] for e in ends], 18, top, height - bottom), ends, strict=True
    ):
        shown = name if len(name) <= 15 else name[:12] + "…"
        parts.append(
            f'<text class="end {css}" x="{width - right + 9}" y="{place + 4.5:.1f}">'
            f"{escape(shown)}</text>"
        )
    return _svg(width, height, label, parts, "chart")


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart to at least `gap`, in order, as little as need be, towards [low, high]."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    edge = low - gap
    for i in order:
        moved[i] = edge = max(moved[i], edge + gap)
    edge = max(high, low + gap * (len(places) - 1)) + gap
    for i in reversed(order):
        moved[i] = edge = min(moved[i], edge - gap)
    return moved


def _svg(width: int, height: int, label: str, parts: Sequence[str], css: str) -> str:
    return (
        f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{"".join(parts)}</svg>'
    )
