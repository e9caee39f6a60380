"""Recipes: nested data that names classes and their arguments.

A recipe is a TOML file. Wherever a table has a `type`, that is a path inside this package
(`type = "networks.unet.UNet"`) and the rest of the table are the constructor's arguments: the
constructor's signature is the schema. Only classes defined under `BUILDABLE` are ever built, so a
recipe, and a checkpoint that carries one, holds data and never code.

Strings that begin with `@` are facts of the data, filled in by `resolve`: `@shape` (C, H, W),
`@channels`, `@size`, `@classes` (0 when unlabelled), `@attributes`, `@count`; and sums and products
of them and of whole numbers, `@channels * 2 + 1`.

`{ type = "trained", path = "runs/vqvae" }` is the model of that run, held still while another
learns to use it. `resolve` puts the run's own model spec in its place, inside a `model.Frozen`, so
that the checkpoint needs the run no more; its weights are read when training begins. A run that
goes on takes the spec from itself.

Sections: `[about]` what the recipe is; `[data]` what it asks of the data; `[model]` the family and
its networks; `[train]` the loop's settings; `[finetune]` a run to begin with and what learns then;
`[sample]` the defaults of sampling. A run adds `[run]`.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from trilemma.errors import UserError

BUILDABLE = ("models", "networks", "diffusion", "codecs", "conditioning", "model")
SECTIONS = ("about", "data", "model", "train", "finetune", "sample")

WRONG = (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError)
"""What a class raises when it cannot be built of what a recipe says."""

Recipe = dict[str, Any]


def names() -> list[str]:
    """Return the names of the packaged recipes."""
    folder = resources.files("trilemma") / "recipes"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml"))


def load(name: str | Path) -> Recipe:
    """Read a packaged recipe by name, or a recipe file by path.

    Raises:
        UserError: there is no such recipe, or it is not a valid one.
    """
    packaged = resources.files("trilemma") / "recipes" / f"{name}.toml"
    if packaged.is_file():
        text = packaged.read_text("utf-8")
    elif str(name).endswith(".toml") and Path(name).is_file():
        text = Path(name).read_text("utf-8")
    else:
        raise UserError(
            f"there is no recipe '{name}'{suggest(str(name), names())}; "
            f"packaged: {', '.join(names())}; or give the path of a .toml file"
        )
    try:
        recipe = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {name} is not valid TOML: {error}") from error
    if "type" not in recipe.get("model", {}):
        raise UserError(f"recipe {name} names no model: a [model] table with a `type` is needed")
    return recipe


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" when a known word is near, else an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """Return the recipe with `section.key=value` assignments applied.

    A value is read as TOML (`8`, `0.1`, `true`, `[1, 2]`, `"text"`); what is not TOML is a string.

    Raises:
        UserError: an assignment is not of that form, or names no section of a recipe.
    """
    recipe = copy.deepcopy(recipe)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        *path, last = key.strip().split(".")
        if not equals or not path or path[0] not in SECTIONS:
            raise UserError(
                f"--set {assignment}: expected section.key=value with a section of "
                f"{', '.join(SECTIONS)}, for example --set train.batch=64"
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table = recipe
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {assignment}: '{part}' is a value, not a table")
        last_value = table.get(last)
        if isinstance(last_value, dict) and not isinstance(value, dict):
            raise UserError(
                f"--set {assignment}: '{last}' is a table with {', '.join(last_value)}; "
                f"set one of these, for example --set {key.strip()}.{next(iter(last_value))}=..."
            )
        table[last] = value
    return recipe


def resolve(
    recipe: Recipe, facts: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> Recipe:
    """Return the recipe with every `@name` replaced by `facts[name]`, and trained runs by specs.

    Args:
        recipe: to resolve.
        facts: of the data.
        before: the same recipe as it was resolved before, whose trained runs are not read again:
            they may be gone, or trained further.

    Raises:
        UserError: a recipe asks for a fact that there is not, or for a run that cannot be used.
    """

    def fill(value: Any, was: Any, path: str) -> Any:
        if isinstance(value, dict) and value.get("type") == "trained":
            same = isinstance(was, dict) and was.get("path") == value.get("path")
            return was if same else _frozen(value, facts, path)
        if isinstance(value, dict):
            old = was if isinstance(was, dict) else {}
            return {key: fill(item, old.get(key), f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [fill(item, None, path) for item in value]
        if isinstance(value, str) and value.startswith("@"):
            return _value(value, facts)
        return value

    return fill(copy.deepcopy(recipe), before, "")


def _value(text: str, facts: Mapping[str, Any]) -> Any:
    """Return a fact, or a sum of products of facts and whole numbers."""
    terms = [
        [_fact(factor.strip(), facts) for factor in term.split("*")] for term in text.split("+")
    ]
    if terms == [terms[0][:1]]:
        return terms[0][0]
    if not all(isinstance(factor, int) for term in terms for factor in term):
        raise UserError(f"the recipe asks for {text}; only numbers can be added and multiplied")
    return sum(math.prod(term) for term in terms)


def _fact(name: str, facts: Mapping[str, Any]) -> Any:
    if name.isdigit():
        return int(name)
    if not name.startswith("@") or name[1:] not in facts:
        raise UserError(f"the recipe asks for {name}; the data tell {', '.join(facts)}")
    return facts[name[1:]]


def _frozen(asked: Recipe, facts: Mapping[str, Any], path: str) -> Recipe:
    """Return the spec of a trained run's model, held still; `path` is where it is asked for."""
    from trilemma import checkpoint  # brings torch with it, which listing recipes does not need

    run = asked.get("path")
    if not isinstance(run, str) or asked.keys() != {"type", "path"}:
        raise UserError(f'type "trained" needs the path of a run and nothing else; got {asked}')
    if not Path(run).exists():
        raise UserError(
            f"{run} is not there, and the recipe uses the model trained in it; train it first "
            f"({_training(run)}), or name another run (--set {path[1:]}.path=RUN)"
        )
    _, about = checkpoint.read_model(run)
    theirs, ours = about["data"]["shape"], facts["shape"]
    if theirs != ours:
        raise UserError(
            f"{run} was trained on pictures of shape {theirs} and these are {ours}; "
            f"train at --size {theirs[1]}, or give a run at this size"
        )
    return {"type": "model.Frozen", "path": run, "module": about["recipe"]["model"]}


def _training(run: str) -> str:
    """Return the command that trains a run; a run bears its recipe's name if nothing is said."""
    name, given = Path(run).name, names()
    where = "" if Path(run) == Path("runs") / name and name in given else f" --out {run}"
    return f"trilemma train {name if name in given else 'RECIPE'} --data ...{where}"


def build(spec: Any) -> Any:
    """Build what a resolved spec describes, innermost first.

    Raises:
        UserError: `type` is not a class of this package, or an argument is unknown or missing.
    """
    if isinstance(spec, list):
        return [build(item) for item in spec]
    if not isinstance(spec, dict):
        return spec
    arguments = {key: build(value) for key, value in spec.items() if key != "type"}
    if "type" not in spec:
        return arguments
    cls = lookup(spec["type"])
    check_arguments(cls, arguments, spec["type"])
    try:
        return cls(**arguments)
    except WRONG as error:
        raise UserError(f"{spec['type']}: {error}") from error


def lookup(path: str) -> type:
    """Return the class that a recipe's `type` names.

    Raises:
        UserError: it is none of those of this package that can be built.
    """
    module_name, _, class_name = str(path).rpartition(".")
    where = f"a path inside {', '.join(BUILDABLE)}, such as networks.unet.UNet"
    if module_name.split(".")[0] not in BUILDABLE:
        raise UserError(f"type '{path}' cannot be built: expected {where}")
    try:
        module = importlib.import_module(f"trilemma.{module_name}")
    except ModuleNotFoundError as error:
        raise UserError(f"type '{path}' was not found: expected {where}") from error
    cls = getattr(module, class_name, None)
    if not inspect.isclass(cls) or not _at_home(cls, module):
        known = [n for n, c in inspect.getmembers(module, inspect.isclass) if _at_home(c, module)]
        raise UserError(f"type '{path}' was not found; {module_name} has {', '.join(known)}")
    return cls


def _at_home(cls: type, module: ModuleType) -> bool:
    """Whether a class is defined in a module, or in one of a package's."""
    return f"{cls.__module__}.".startswith(f"{module.__name__}.")


def check_arguments(function: Any, given: Mapping[str, Any], name: str) -> None:
    """Check `given` against a signature.

    Raises:
        UserError: naming the accepted arguments when one is unknown, or the missing one.
    """
    parameters = inspect.signature(function).parameters
    for key in given:
        if key not in parameters:
            raise UserError(
                f"{name} has no option '{key}'{suggest(key, parameters)}; "
                f"it has {', '.join(parameters) or 'none'}"
            )
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in given:
            raise UserError(f"{name} needs the option '{key}'")


def find(spec: Any, key: str) -> Any:
    """Return the first value under `key` anywhere in a nested spec, or None."""
    children = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ()
    if isinstance(spec, dict) and key in spec:
        return spec[key]
    return next((found for child in children if (found := find(child, key)) is not None), None)
