"""The trilemma picture as a PNG, for slides and READMEs: the report's triangles by matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trilemma.report.figures import PALETTE, corner
from trilemma.report.scales import Axis, axes, values

COLOURS = (
    "#0b6fb8", "#c8500a", "#00805c", "#a8478f", "#8a6a00", "#5b50c4", "#007f96", "#666666",
)  # fmt: skip
"""Those of the page's light scheme; told apart by the colour-blind, and 4.5:1 against white."""
_INK, _MUTED, _FRAME, _PAPER = "#1d1f23", "#5c6068", "#c9c5bb", "#fbfaf7"


def save(report: Mapping[str, Any], path: Path) -> None:
    """Draw one triangle for each model of the report, in a row or two, and save it."""
    models = report["models"]
    columns = min(4, len(models)) if len(models) != 5 else 3
    rows = math.ceil(len(models) / columns)
    figure = Figure(figsize=(max(6.4, 3.9 * columns), 4.1 * rows + 1.0), dpi=160, facecolor=_PAPER)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    scales = axes(report)
    for panel in panels:
        panel.axis("off")
    for index, model in enumerate(models):
        others = [m for m in models if m is not model]
        _triangle(panels[index], scales, model, others, index)
    title = textwrap.fill(report["title"], max(44, 32 * columns))
    figure.suptitle(title, x=0.5, y=1 - 0.22 / figure.get_figheight(), va="top",
                    fontsize=15, color=_INK, family="serif")  # fmt: skip
    floor = report["reference"]["fd"]
    figure.text(
        0.5, 0.14 / figure.get_figheight(),
        f"Farther out is better. {report['protocol']['distance']} (n = {report['protocol']['n']:,})"
        f" and speed on log scales; the quality corner is what real pictures score ({floor:.0f}).",
        ha="center", va="bottom", fontsize=8.5, color=_MUTED,
    )  # fmt: skip
    top = 1 - (0.75 + 0.25 * title.count("\n")) / figure.get_figheight()
    bottom = 0.45 / figure.get_figheight()
    figure.subplots_adjust(left=0.02, right=0.98, wspace=0.05, hspace=0.12, top=top, bottom=bottom)
    figure.savefig(path, facecolor=_PAPER, metadata={"Title": report["title"]})


def _triangle(
    panel: Axes, scales: tuple[Axis, Axis, Axis], model: Any, others: list[Any], index: int
) -> None:
    def ring(positions: Any) -> tuple[list[float], list[float]]:
        points = [corner(i, position) for i, position in enumerate(positions)]
        return [x for x, _ in points], [y for _, y in points]

    colour = COLOURS[index % PALETTE]
    panel.set_xlim(-1.2, 1.2)
    panel.set_ylim(-0.85, 1.38)
    panel.set_aspect("equal")
    panel.fill(*ring((1, 1, 1)), facecolor="white", edgecolor=_FRAME, linewidth=1)
    for i, axis in enumerate(scales):
        (x0, y0), (x1, y1) = corner(i, 0), corner(i, 1)
        panel.plot([x0, x1], [y0, y1], color=_FRAME, linewidth=0.8)
        marks = [corner(i, axis.position(tick)) for tick in axis.ticks]
        panel.plot(*zip(*marks, strict=True), "o", color=_FRAME, markersize=2.5)
    for other in others:
        places = [a.position(v) for a, v in zip(scales, values(other), strict=True)]
        panel.fill(*ring(places), fill=False, edgecolor=_MUTED, linewidth=0.8, alpha=0.45)
    places = [a.position(v) for a, v in zip(scales, values(model), strict=True)]
    panel.fill(*ring(places), facecolor=colour, alpha=0.22)
    panel.fill(*ring(places), fill=False, edgecolor=colour, linewidth=2.2)
    panel.plot(*ring(places), "o", color=colour, markersize=6)
    spots = ((0, 1.24), (-0.87, -0.6), (0.87, -0.6))
    for axis, value, (x, y) in zip(scales, values(model), spots, strict=True):
        written = axis.write(value)
        panel.text(x, y, axis.title, ha="center", va="center", fontsize=9.5, color=_MUTED)
        panel.text(x, y - 0.13, written, ha="center", va="center", fontsize=11.5,
                   fontweight="bold", color=_INK)  # fmt: skip
    name = textwrap.shorten(model["name"], 26, placeholder="…")
    panel.set_title(
        name if name != "…" else model["name"][:25] + "…",
        fontsize=13,
        fontweight="bold",
        color=colour,
        pad=2,
    )
