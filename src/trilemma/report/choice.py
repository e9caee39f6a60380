"""Which model to choose: by how much one leads on each axis, and when the difference is noise.

A score is measured on n drawn pictures and has a standard error; two scores are told apart when
they differ by more than two standard errors of their difference. Speeds within 10 % are level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trilemma.report.scales import number, values

AXES = ("quality", "coverage", "speed")
_LEVEL_SPEED = 1.1
_PHRASES = {
    "quality": ("draws best", "draw best"),
    "coverage": ("covers most", "cover most"),
    "speed": ("is fastest", "are fastest"),
}
_FELL = 0.1  # a loss of coverage while training that is worth a warning


def choose(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return, for each axis, the models to choose and why; and a word on all three together.

    Returns:
        `quality`, `coverage` and `speed`, each `{"models": [names], "sentence": text}`, the first
        model being the best measured; and `overall`, a text.
    """
    models = report["models"]
    return {
        "quality": _quality(models, report["protocol"], report["reference"]["fd"]),
        "coverage": _coverage(models, report["protocol"]),
        "speed": _speed(models),
        "overall": _overall(models),
    }


def headline(choice: Mapping[str, Any], models: Sequence[Mapping[str, Any]], data: str) -> str:
    """Return the report's title: what was found, in a sentence."""
    if len(models) == 1:
        return f"{models[0]['name']} on {data}"
    groups: dict[tuple[str, ...], list[str]] = {}
    for axis in AXES:
        leaders = choice[axis]["models"]
        in_order = tuple(m["name"] for m in models if m["name"] in leaders)
        groups.setdefault(in_order, []).append(axis)
    told = []
    for names, led in groups.items():
        if len(names) == len(models):
            told.append(f"{'both' if len(names) == 2 else 'all'} are level in {_join(led)}")
        elif len(led) == len(AXES):
            told.append(f"{_join(names)} lead{'s' * (len(names) == 1)} in all three")
        else:
            told.append(f"{_join(names)} {_join([_PHRASES[a][len(names) > 1] for a in led])}")
    text = "; ".join(told)
    return text[0].upper() + text[1:] if text.startswith(("both", "all")) else text


def differ(axis: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Say whether two models can be told apart on an axis."""
    place = AXES.index(axis)
    a, b = values(one)[place], values(other)[place]
    if axis == "speed":
        return max(a, b) > _LEVEL_SPEED * min(a, b)
    return abs(a - b) > 2 * _error(axis, one, other)


def _error(axis: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    key = "fd" if axis == "quality" else "coverage"
    return math.hypot(one["noise"][key], other["noise"][key])


def _ranked(models: Sequence[Mapping[str, Any]], axis: str) -> tuple[list, list]:
    """Return the best model with those level with it, and the rest, best first."""
    place = AXES.index(axis)
    best_first = sorted(models, key=lambda m: values(m)[place], reverse=axis != "quality")
    level = [m for m in best_first if m is best_first[0] or not differ(axis, best_first[0], m)]
    return level, [m for m in best_first if m not in level]


def _join(words: Sequence[str]) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def alarms(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return warnings of models whose coverage fell while they trained: mode collapse."""
    told = []
    for model in models:
        seen = [probe["coverage"] for probe in model["probes"]]
        if seen and max(seen) - seen[-1] > _FELL and seen[-1] < 0.8 * max(seen):
            told.append(
                f"The coverage of {model['name']} fell from {100 * max(seen):.0f} % to "
                f"{100 * seen[-1]:.0f} % while it trained: it has begun to leave kinds of pictures "
                f"out. An earlier stop, a lower learning rate or another recipe keeps more of them."
            )
    return told


def _farther(ratio: float) -> str:
    if ratio < 1.15:
        return f"{max(1, round(100 * (ratio - 1)))} % farther"
    return f"{_times(ratio)} times as far"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else number(round(ratio))


def _tie(level: Sequence[Mapping[str, Any]], axis: str, write: Callable[[Any], str]) -> str:
    told = _join([f"{m['name']} ({write(m)})" for m in level])
    return f"{told} are level: the difference is within the noise of the measurement. "


def _quality(models: Sequence[Any], protocol: Mapping[str, Any], floor: float) -> dict[str, Any]:
    level, rest = _ranked(models, "quality")
    best, name = level[0], protocol["distance"]
    fd = best["scores"]["fd"]
    real = f"{_times(fd / floor)} times what real training pictures score ({number(floor)})"
    if fd <= floor:
        real = f"no farther than real training pictures ({number(floor)})"
    if len(level) > 1:
        text = _tie(level, "quality", lambda m: f"{name} {number(m['scores']['fd'])}")
        text += "Let coverage or speed decide between them."
    elif not rest:
        text = f"Its {name} is {number(fd)}, {real}."
    else:
        second = rest[0]
        text = (
            f"Its pictures are the nearest to real ones: {name} {number(fd)}, against "
            f"{number(second['scores']['fd'])} for {second['name']}, which is "
            f"{_farther(second['scores']['fd'] / fd)}. It is {real}."
        )
    return {"models": [m["name"] for m in level], "sentence": text}


def _coverage(models: Sequence[Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    level, rest = _ranked(models, "coverage")
    best = level[0]

    def share(model: Mapping[str, Any]) -> str:
        return f"{100 * model['scores']['coverage']:.0f} %"

    if len(level) > 1:
        text = _tie(level, "coverage", share) + "Let quality or speed decide between them."
    elif not rest:
        text = f"It covers {share(best)} of the real pictures."
    else:
        second = rest[0]
        points = 100 * (best["scores"]["coverage"] - second["scores"]["coverage"])
        noise = 200 * _error("coverage", best, second)
        text = (
            f"It covers {share(best)} of the real pictures, {second['name']} {share(second)}: "
            f"{points:.0f} points fewer (noise: ± {noise:.0f})."
        )
    return {"models": [m["name"] for m in level], "sentence": text}


def _speed(models: Sequence[Any]) -> dict[str, Any]:
    level, rest = _ranked(models, "speed")
    best = level[0]

    def rate(model: Mapping[str, Any]) -> str:
        return f"{number(model['speed']['images_per_second'])} pictures/s"

    if len(level) > 1:
        told = _join([f"{m['name']} ({rate(m)})" for m in level])
        text = f"{told} are within 10 % of each other. Let quality or coverage decide between them."
    elif not rest:
        text = f"It draws {rate(best)} on this machine."
    else:
        second = rest[0]
        ratio = best["speed"]["images_per_second"] / second["speed"]["images_per_second"]
        calls = best["speed"].get("calls")
        how = f", with {calls} network call{'s' if calls != 1 else ''} for each" if calls else ""
        text = (
            f"It draws {rate(best)} on this machine{how}: {_times(ratio)} times as many as "
            f"{second['name']} ({number(second['speed']['images_per_second'])})."
        )
    return {"models": [m["name"] for m in level], "sentence": text}


def _overall(models: Sequence[Any]) -> str:
    if len(models) == 1:
        return "With one model there is nothing to weigh; compare several to see what each costs."
    leaders = [{m["name"] for m in _ranked(models, axis)[0]} for axis in AXES]
    winners = sorted(set.intersection(*leaders))
    if winners:
        return f"{_join(winners)} leads, or shares the lead, in all three: take it."
    beaten = [
        (loser["name"], winner["name"])
        for loser in models
        for winner in models
        if winner is not loser and _beats(winner, loser)
    ]
    first: dict[str, str] = {}
    for loser, winner in beaten:
        first.setdefault(loser, winner)
    text = "No model leads in all three: that is the trilemma."
    for loser, winner in first.items():
        text += f" {loser} is behind {winner} in all three."
    return text


def _beats(winner: Mapping[str, Any], loser: Mapping[str, Any]) -> bool:
    (fd, coverage, speed), (fd_, coverage_, speed_) = values(winner), values(loser)
    better = fd < fd_ and coverage > coverage_ and speed > speed_
    return better and all(differ(axis, winner, loser) for axis in AXES)
