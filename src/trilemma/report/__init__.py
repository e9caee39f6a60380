"""The report of a comparison: a dictionary of numbers to one page that opens anywhere.

`render` is a pure function of the report and the image files it names. The page has no script and
asks nothing of the network: pictures are data URIs, charts are inline SVG, fonts are the system's.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from trilemma.report import figures, picture
from trilemma.report.choice import AXES, alarms
from trilemma.report.scales import Axis, axes, duration, number, values
from trilemma.report.tables import numbers, share

SCHEMA = 1
FEW = 2000  # pictures below which scores are said to be rough
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><path d="M16 4 29 27H3Z" '
    'fill="none" stroke="#0b6fb8" stroke-width="3.5" stroke-linejoin="round"/></svg>'
)


def write(report: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `report.json`, `trilemma.png` and `report.html` into `folder`; return the page's path.

    `folder` already holds the images that the report names.
    """
    folder = Path(folder)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", "utf-8")
    if report["models"]:
        picture.save(report, folder / "trilemma.png")
    page = folder / "report.html"
    page.write_text(render(report, folder), "utf-8")
    return page


def render(report: Mapping[str, Any], folder: str | Path) -> str:
    """Return the page of a report whose images lie in `folder`.

    Raises:
        ValueError: the report is of another schema.
    """
    if report["schema"] != SCHEMA:
        raise ValueError(f"the report has schema {report['schema']}; this version reads {SCHEMA}")
    files = resources.files("trilemma.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files / "report.html").read_text("utf-8"))
    scene = _judged(report, Path(folder)) if report["models"] else {}
    machine = report["machine"]
    told = f"on {machine['processor']} with {machine['threads']} threads, torch {machine['torch']}"
    return template.render(
        report=report,
        style=Markup((files / "style.css").read_text("utf-8")),
        icon=quote(_ICON),
        lede=_lede(report),
        facts=_facts(report),
        machine=told,
        **scene,
    )


def _lede(report: Mapping[str, Any]) -> str:
    data, request, n = report["data"], report["request"], report["protocol"]["n"]
    count = len(report["models"])
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight")
    generators = f"{words[count] if count < 9 else count} generator{'' if count == 1 else 's'}"
    length = (
        f"for {duration(request['budget'])}"
        if request["equal"] == "time"
        else f"on {request['images']:,} pictures"
    )
    each = "" if count == 1 else " each"
    return (
        f"{generators},{each} trained {length} with {data['count']:,} pictures of {data['name']}, "
        f"then judged by {n:,} drawn pictures against {data['test_count']:,} real ones that were "
        f"held out."
    )


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, request = report["data"], report["request"]
    channels, height, width = data["shape"]
    budget = (
        duration(request["budget"])
        if request["equal"] == "time"
        else f"{request['images']:,} pictures"
    )
    return [
        ("Data", data["name"]),
        ("Pictures", f"{width} × {height}, {'grey' if channels == 1 else 'colour'}"),
        ("Classes", str(len(data["label_names"]) or "none")),
        ("Training", f"{budget} each"),
        ("Seed", str(request["seed"])),
        ("Device", report["machine"]["device"]),
    ]


def _judged(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what the template shows of the models."""
    scales = axes(report)
    models = [_model(report, scales, index) for index in range(len(report["models"]))]
    by_name = {m["name"]: m for m in models}
    choices = [
        {
            "axis": axis,
            "models": [by_name[name] for name in report["choice"][axis]["models"]],
            "sentence": report["choice"][axis]["sentence"],
        }
        for axis in AXES
    ]
    data = report["data"]
    columns = data["columns"]
    sheets = [
        {"name": "real pictures", "css": "", "columns": columns, **_image(folder, data["sheet"])}
    ]
    sheets += [
        {
            "name": m["name"],
            "css": f"m{m['index']}",
            "columns": columns if m["conditional"] else [],
            **_image(folder, m["sheet"]),
        }
        for m in models
    ]
    neighbours = [
        {
            "name": m["name"],
            "css": f"m{m['index']}",
            "note": m["neighbours"]["note"],
            **_image(folder, m["neighbours"]),
        }
        for m in models
        if m.get("neighbours")
    ]
    return {
        "models": models,
        "axes": scales,
        "key_triangle": Markup(figures.triangle(scales, None, label=_key_text(scales))),
        "n": f"{report['protocol']['n']:,}",
        "fewer": report["judging"]["note"],
        "choices": choices,
        "sheets": sheets,
        "sheet_note": data["sheet_note"],
        "neighbours": neighbours,
        "neighbour_note": report["protocol"]["neighbour_note"],
        "charts": _charts(report),
        "alarms": alarms(report["models"]),
        "few": min(report["protocol"]["n"], data["test_count"]) < FEW,
        "probe_n": f"{report['request']['probe_n']:,}",
        **_steps(report),
        "table": numbers(report),
        "protocols": _protocols(report),
    }


def _model(report: Mapping[str, Any], scales: Sequence[Axis], index: int) -> dict[str, Any]:
    model = report["models"][index]
    badges = [
        ("joint " if len(report["choice"][axis]["models"]) > 1 else "")
        + {"quality": "best quality", "coverage": "best coverage", "speed": "fastest"}[axis]
        for axis in AXES
        if len(report["models"]) > 1 and model["name"] in report["choice"][axis]["models"]
    ]
    others = [values(m) for m in report["models"] if m is not model]
    told = ", ".join(
        f"{a.title.lower()} {a.write(v)}" for a, v in zip(scales, values(model), strict=True)
    )
    drawing = figures.triangle(
        scales, values(model), others, index, f"{model['name']}: {told} (farther out is better)"
    )
    css = index % figures.PALETTE
    return {**model, "index": css, "badges": badges, "triangle": Markup(drawing)}


def _key_text(scales: Sequence[Axis]) -> str:
    return "An empty triangle with the marks of each axis: " + "; ".join(
        f"{a.title.lower()} {a.write(a.ticks[0])} to {a.write(a.ticks[-1])}" for a in scales
    )


def _charts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return distance and coverage against training time, for the models that were probed."""
    probed = [(i, m) for i, m in enumerate(report["models"]) if m["probes"]]
    if not probed:
        return []
    distance = report["protocol"]["distance"]
    floor = report["reference"]["probe"]["fd"]
    longest = max(m["probes"][-1]["seconds"] for _, m in probed)
    distances = [p["fd"] for _, m in probed for p in m["probes"]]
    panels = (
        ("fd", "Quality while training", f"{distance}, lower is better", (floor, "real pictures"),
         figures.log_scale(f"{distance} (lower is better)", [floor, *distances])),
        ("coverage", "Coverage while training", "coverage, higher is better",
         (report["reference"]["probe"]["coverage"], "real pictures"),
         figures.fixed_scale("coverage (higher is better)", [0, 0.25, 0.5, 0.75, 1], share)),
    )  # fmt: skip
    charts = []
    for key, title, told, level, scale in panels:
        series = [
            figures.Series(m["name"], i, [(p["seconds"], p[key]) for p in m["probes"]])
            for i, m in probed
        ]
        ends = "; ".join(f"{s.name} ends at {number(s.points[-1][1])}" for s in series)
        drawing = figures.lines(
            series, figures.time_scale("training time", longest), scale,
            f"{title}: {told}; {ends}", level,
        )  # fmt: skip
        charts.append({"title": title, "svg": Markup(drawing)})
    return charts


def _steps(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chart and the rows of steps against quality."""
    stepped = [(i, m) for i, m in enumerate(report["models"]) if m["steps"]]
    if not stepped:
        return {"steps": [], "steps_chart": "", "steps_n": ""}
    distance = report["protocol"]["distance"]
    floor = report["reference"]["probe"]["fd"]
    series = [
        figures.Series(m["name"], i, [(s["calls"], s["fd"]) for s in m["steps"]])
        for i, m in stepped
    ]
    calls = [x for s in series for x, _ in s.points]
    ticks = sorted(set(calls))
    x = figures.Scale(
        "network calls", ticks if len(ticks) <= 8 else ticks[::2], min(calls) / 1.1,
        max(calls) * 1.1, log=True,
    )  # fmt: skip
    y = figures.log_scale(f"{distance} (lower is better)", [floor] + [
        fd for s in series for _, fd in s.points
    ])  # fmt: skip
    label = "Distance against network calls: " + "; ".join(
        f"{s.name} from {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in series
    )
    rows = [
        {
            "name": m["name"],
            "index": i % figures.PALETTE,
            "steps": s["steps"],
            "calls": s["calls"],
            "fd": number(s["fd"]),
            "coverage": share(s["coverage"]),
            "speed": number(s["images_per_second"]),
        }
        for i, m in stepped
        for s in m["steps"]
    ]
    drawing = figures.lines(series, x, y, label, (floor, "real pictures"))
    return {
        "steps": rows,
        "steps_chart": Markup(drawing),
        "steps_n": f"{report['request']['probe_n']:,}",
    }


def _protocols(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    shared = [(k, _plain(v)) for k, v in report["protocol"]["shared"].items()]
    return [{"title": "All models", "css": "", "rows": shared}] + [
        {
            "title": model["name"],
            "css": f"m{index % figures.PALETTE}",
            "rows": [(k, _plain(v)) for k, v in model["protocol"].items()],
        }
        for index, model in enumerate(report["models"])
    ]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    return number(value) if isinstance(value, float) else str(value)


def _image(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / entry["path"]
    with Image.open(path) as image:
        width, height = image.size
    encoded = base64.b64encode(path.read_bytes()).decode()
    return {
        "src": Markup(f"data:image/png;base64,{encoded}"),
        "width": width,
        "height": height,
        "alt": entry["alt"],
    }
