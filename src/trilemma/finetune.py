"""Fine-tuning: begin with the weights of a run, and say which of them learn.

A recipe's `[finetune]`, or `--init` and the options beside it, names a run. `carry` copies its
weights by name and shape; what depends on the classes or attributes goes by their names (a new one
begins at the mean of the old), and learned positions are interpolated to another size. `hold` then
lets everything learn, the last layers, or low-rank factors (`networks.lora`); what could not be
carried over as it was always learns. Which weights those are is in the run's recipe, so that a run
goes on, and its model is whole, after the first run is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma import checkpoint, recipe
from trilemma.errors import UserError
from trilemma.model import Frozen, HasPositions, Measures, Model
from trilemma.networks import lora

MODES = ("full", "last", "lora")
LAST = 0.25  # share of a module's weights that "last" lets learn, at most, but one layer at least
NEEDED = 0.5  # share of the smaller model's numbers that must fit, or the run is of another kind
TOLD = 6  # names in a line


@dataclass(frozen=True)
class Tuning:
    """A recipe's `[finetune]`.

    Attributes:
        init: the run to begin with, or its model.safetensors.
        mode: what learns: `full`, everything; `last`, of each module that learns the last layers in
            the order of definition, up to a quarter of its weights; `lora`, low-rank factors.
        targets: of `last` and `lora`: these layers, by name, part of a name, or pattern with `*`.
        rank: of the factors.
        scale: of what they add.
        preserve: pictures drawn from the run at the start and learned from beside the data, so that
            what it could is not forgotten (`preservation`); 0 for none.
        preserve_weight: of the loss on these over that on the data.
    """

    init: str
    mode: str = "full"
    targets: list[str] = field(default_factory=list)
    rank: int = 8
    scale: float = 1.0
    preserve: int = 0
    preserve_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode '{self.mode}' is not one of {', '.join(MODES)}")
        if self.targets and self.mode == "full":
            raise ValueError("targets choose what learns in mode last or lora, and mode is full")
        if self.rank < 1 or self.preserve < 0 or self.preserve_weight <= 0:
            raise ValueError(
                f"rank {self.rank}, preserve {self.preserve} and preserve_weight "
                f"{self.preserve_weight}; expected at least 1, at least 0 and above 0"
            )


def asked(
    spec: recipe.Recipe,
    init: str | Path | None,
    more: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
) -> Tuning | None:
    """Write what is asked for into the recipe's `[finetune]` and return it; None if nothing is.

    Args:
        spec: the recipe, which is changed.
        init: the run to begin with, over the recipe's.
        more: the rest, over the recipe's.
        before: the recipe of the run that goes on, whose fine-tuning goes on if none is asked for.

    Raises:
        UserError: an unknown or impossible option, or no run.
    """
    section = {**spec.get("finetune", {}), **more}
    if init is not None:
        section["init"] = str(init)
    if before is not None and not section:
        section = dict(before.get("finetune", {}))
    if not section:
        return None
    if not section.get("init"):
        raise UserError(
            f"fine-tuning ({', '.join(section)}) begins with a trained run; say which: --init RUN"
        )
    recipe.check_arguments(Tuning, section, "[finetune]")
    try:
        tuning = Tuning(**section)
    except ValueError as error:
        raise UserError(f"[finetune] {error}") from error
    spec["finetune"] = section
    return tuning


def learned(model: nn.Module) -> list[str]:
    """Return the names in the model's state of all but frozen parts, which have their own runs."""
    parts = model.named_modules(remove_duplicate=False)
    held = [f"{name}." for name, part in parts if isinstance(part, Frozen)]
    return [name for name in model.state_dict() if not name.startswith(tuple(held))]


def begin(
    model: Model,
    tuning: Tuning,
    spec: recipe.Recipe,
    facts: Mapping[str, Any],
    names: Mapping[str, Sequence[str]],
    was: dict[str, Any] | None,
) -> tuple[dict[str, Any], list[str]]:
    """Give a model its first weights and hold still what is not to learn.

    Args:
        model: of the recipe, as built.
        tuning: what is asked.
        spec: the recipe before it was resolved.
        facts: of the data, by which it was.
        names: of the data's `classes` and `attributes`.
        was: what is remembered of this, in a run that goes on and has its weights from itself.

    Returns:
        What to remember, and what to tell.

    Raises:
        UserError: as `carry` and `hold`.
    """
    notes = []
    if was is None:
        was, told = carry(model, spec, facts, names, tuning.init)
        notes.append(told)
    return was, [*notes, hold(model, tuning, was["new"])]


def carry(
    model: Model,
    spec: recipe.Recipe,
    facts: Mapping[str, Any],
    names: Mapping[str, Sequence[str]],
    init: str,
) -> tuple[dict[str, Any], str]:
    """Give a model the weights of a run, and return what to remember and what to tell.

    Args:
        model: of the recipe, as built.
        spec: the recipe before it was resolved.
        facts: of the data, by which it was.
        names: of the data's `classes` and `attributes`.
        init: the run.

    Returns:
        `path`, `digest` and `classes` of the run and, as `new`, the names of the weights that are
        not its own; and a line for people.

    Raises:
        UserError: the run is of another kind, or cannot be read.
    """
    given, about = checkpoint.read_model(init)
    state, theirs = model.state_dict(), about["recipe"]["model"]
    old = {
        fact: about["data"][key] if recipe.find(theirs, fact) else []
        for fact, key in (("classes", "label_names"), ("attributes", "attribute_names"))
    }
    moved = {fact: _axes(model, spec, facts, fact) for fact in old if names[fact] != old[fact]}
    taken: dict[str, Tensor] = {}
    changed: list[str] = []
    interpolated: list[str] = []
    for name in learned(model):
        if name not in given:
            continue
        mine, yours = state[name], given[name]
        fact = next((fact for fact, axes in moved.items() if name in axes), None)
        if fact is not None:
            table = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
            rows = _by_name(mine, yours, moved[fact][name], names[fact], old[fact], table)
            if rows is not None:
                taken[name] = rows
                changed.append(name)
        elif mine.shape == yours.shape:
            taken[name] = yours
        elif isinstance(model, HasPositions) and name in model.positions:
            other = recipe.build(theirs)
            there = other.positions[name] if isinstance(other, HasPositions) else ()
            if there[-1:] == model.positions[name][-1:] and mine.shape[1] == yours.shape[1]:
                taken[name] = _interpolated(yours, there, model.positions[name])
                interpolated.append(name)
    anew = [name for name in learned(model) if name not in taken]
    left = sorted(given.keys() - state.keys())
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    fits = sum(size for name, size in sizes.items() if name in taken)
    unlike = [f"{name} {_shapes(state[name], given.get(name))}" for name in anew]
    smaller = min(sum(sizes.values()), sum(tensor.numel() for tensor in given.values()))
    if fits < NEEDED * smaller:
        ours = recipe.resolve(spec, facts)["model"]
        raise UserError(
            f"{init} is a {_kinds(theirs)}; this recipe builds a {_kinds(ours)}, and {fits:,} of "
            f"its {sum(sizes.values()):,} numbers fit ({_listed(unlike)}); "
            "--init needs a run of the same networks, and of the same widths: change the recipe "
            "with --set, or give another run"
        )
    model.load_state_dict(taken, strict=False)
    told = [f"{len(taken)} of {len(state)} weights of {init} carried over"]
    for fact in moved:
        kept = [name for name in names[fact] if name in old[fact]]
        new = [name for name in names[fact] if name not in old[fact]]
        told += [f"{fact} kept: {_listed(kept)}"] if kept and changed else []
        told += [f"new {fact}, from the mean of the old: {_listed(new)}"] if new and changed else []
    told += [f"interpolated: {_listed(interpolated)}"] if interpolated else []
    told += [f"{len(anew)} begin anew: {_listed(unlike)}"] if anew else []
    told += [f"{len(left)} of the run are not used: {_listed(left)}"] if left else []
    remember = {
        "path": init,
        "digest": checkpoint.digest(given),
        "classes": list(old["classes"]),
        "new": [*anew, *changed, *interpolated],
    }
    return remember, "; ".join(told)


def measured(model: nn.Module, new: Sequence[str]) -> bool:
    """Whether all that measures the data has the measures of the first run, by `new`."""
    kept: set[str] = set()
    for name, part in model.named_modules():
        own = dict(part.named_buffers(name, recurse=False))
        if isinstance(part, Measures):
            kept |= own.keys()
    return kept.isdisjoint(new)


def hold(model: Model, tuning: Tuning, new: Sequence[str]) -> str:
    """Hold still what is not to learn, and give factors to what learns by them; say what learns.

    Args:
        model: with the names of its recipe.
        tuning: what is asked.
        new: weights that are not those of the first run, and learn in every mode.

    Raises:
        UserError: targets that name no layer, or a phase in which nothing learns.
    """
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if tuning.mode == "full":
        return f"all {total:,} weights learn"
    try:
        phases = model.phases()
    except ValueError as error:  # something it learns with is missing
        raise UserError(f"this recipe cannot be trained: {error}") from error
    players = list(dict.fromkeys(module for phase in phases for module in phase.modules))
    if tuning.mode == "lora":
        mine = {id(part) for player in players for part in player.modules()}
        able = lora.fitting(model, tuning.rank)
        able = [n for n in able if f"{n}.weight" not in new and id(model.get_submodule(n)) in mine]
        layers = [n for n in able if not tuning.targets or lora.named(n, tuning.targets)]
    else:
        able = _layers(model)
        layers = [n for n in able if lora.named(n, tuning.targets)]
        if not tuning.targets:
            places = {part: name for name, part in model.named_modules()}
            layers = [name for player in players for name in _last(player, places[player])]
    missed = [t for t in tuning.targets if not any(lora.named(n, [t]) for n in layers)]
    if missed or not layers:
        rank = f" --rank {tuning.rank}" if tuning.mode == "lora" else ""
        raise UserError(
            f"{', '.join(missed) or 'the model'}: no layer to tune with --tune {tuning.mode}"
            f"{rank}; it has {_listed(able, 40) or 'none'}"
        )
    can = {name for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in can and name in new)
    if tuning.mode == "last":
        for layer in layers:
            for name, parameter in model.get_submodule(layer).named_parameters(recurse=False):
                parameter.requires_grad_(f"{layer}.{name}" in can)
    else:
        lora.attach(model, layers, tuning.rank, tuning.scale)
    for phase in phases:
        if not any(p.requires_grad for module in phase.modules for p in module.parameters()):
            raise UserError(
                f"nothing learns in phase '{phase.name}'; name some of its layers too, with "
                f"--targets: {_listed(able, 40)}"
            )
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    how = f"factors of rank {tuning.rank} for" if tuning.mode == "lora" else "only"
    return f"{learn:,} weights learn, of {total:,}: {how} {_listed(layers)}"


def _axes(
    model: Model, spec: recipe.Recipe, facts: Mapping[str, Any], fact: str
) -> dict[str, tuple[int, int]]:
    """Return which weights count classes (or attributes): name -> their dimension, rows of each.

    Found by building the model for one more and looking at what has grown.
    """
    if not facts[fact]:
        return {}
    resolved = recipe.resolve(spec, facts)
    more = recipe.resolve(spec, {**facts, fact: facts[fact] + 1}, resolved)
    if more["model"] == resolved["model"]:
        return {}
    with torch.random.fork_rng(devices=[]):
        larger = recipe.build(more["model"]).state_dict()
    found = {}
    for name, tensor in model.state_dict().items():
        if name in larger and larger[name].shape != tensor.shape:
            grown = [b - a for a, b in zip(tensor.shape, larger[name].shape, strict=True)]
            dim = next(i for i, more_rows in enumerate(grown) if more_rows)
            found[name] = (dim, grown[dim])
    return found


def _by_name(
    mine: Tensor,
    yours: Tensor,
    axis: tuple[int, int],
    names: Sequence[str],
    old: Sequence[str],
    table: bool,
) -> Tensor | None:
    """Return a weight whose rows of classes are those of the same name; None if it cannot be.

    Rows beyond those of the classes come after them in a table, which has one for "nothing said",
    and before them in other layers: those of a latent or picture that is read beside the label.
    """
    dim, per = axis
    mine, yours = mine.movedim(dim, 0), yours.movedim(dim, 0)
    extra = len(mine) - per * len(names)
    if mine.shape[1:] != yours.shape[1:] or len(yours) != per * len(old) + extra or not old:
        return None
    first = 0 if table else extra
    blocks = yours[first : first + per * len(old)].unflatten(0, (len(old), per))
    mean = blocks.mean(0)
    rows = [blocks[old.index(name)] if name in old else mean for name in names]
    last = yours[first + per * len(old) :]
    return torch.cat([yours[:first], *rows, last]).movedim(0, dim)


def _interpolated(rows: Tensor, there: Sequence[int], here: Sequence[int]) -> Tensor:
    """Return vectors (H W D, C) on a grid (H, W, D) on another of the same D, bilinearly."""
    height, width, depth = there
    grid = rows.view(1, height, width, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, tuple(here[:2]), mode="bilinear", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(-1, rows.shape[1])


def _layers(model: nn.Module) -> list[str]:
    """Return the names of the modules with weights of their own, in the order of definition."""
    return [
        name
        for name, part in model.named_modules()
        if any(p.requires_grad for p in part.parameters(recurse=False))
    ]


def _last(player: nn.Module, place: str) -> list[str]:
    """Return the last layers of a module, up to LAST of its weights, and one at least."""
    room = LAST * sum(p.numel() for p in player.parameters() if p.requires_grad)
    chosen: list[str] = []
    for name in reversed(_layers(player)):
        part = player.get_submodule(name)
        room -= sum(p.numel() for p in part.parameters(recurse=False) if p.requires_grad)
        if chosen and room < 0:
            break
        chosen.insert(0, ".".join(filter(None, (place, name))))
    return chosen


def _kinds(spec: Mapping[str, Any]) -> str:
    """Return a model's class and those of its networks."""
    found: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, Mapping):
            kind = value.get("type", "")
            if kind.startswith("networks.") and kind not in found:
                found.append(kind)
            for part in value.values():
                look(part)
        elif isinstance(value, list):
            for part in value:
                look(part)

    look(spec)
    return f"{spec['type']} of {', '.join(found)}" if found else str(spec["type"])


def _shapes(mine: Tensor, yours: Tensor | None) -> str:
    there = "is not there" if yours is None else f"was {tuple(yours.shape)}"
    return f"{tuple(mine.shape)} {there}"


def _listed(names: Sequence[str], most: int = TOLD) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
