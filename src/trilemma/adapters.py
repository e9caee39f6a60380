"""LoRA files: what a fine-tuning by low-rank factors has learned, apart from the model.

`lora.safetensors` in a run's folder holds the factors of each layer (`up.LAYER`, `down.LAYER`) and,
whole, the weights that were not those of the first run and what training moves without learning,
such as the means of a batch normalisation (`whole.NAME`). Its metadata tell the hash of the first
run's weights, rank, scale and layers, the recipe and the data's facts. Several can be put on one
model, each with a weight:

    W' = W + sum_i w_i s_i B_i A_i
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilemma import checkpoint, finetune
from trilemma.errors import UserError
from trilemma.networks import lora

log = logging.getLogger(__name__)

FILE = "lora.safetensors"
SAID = {"base", "base_path", "scale", "layers", "weights"}  # in the file's metadata
TOLD = 3  # layers that do not fit are named


def write(folder: Path, model: nn.Module, about: Mapping[str, Any]) -> None:
    """Write what is the model's own beside the first run, into the run's folder; if it has factors.

    Args:
        folder: of the run.
        model: with factors.
        about: what the run's model file says, `recipe` among it.
    """
    factors = {name: part for name, _, part in lora.factors(model)}
    if not factors:
        return
    init, state = about["recipe"]["run"]["init"], lora.merged(model)
    mine = set(finetune.learned(model))
    moved = [name for name, _ in model.named_buffers() if name in mine and name in state]
    whole = [*init["new"], *moved]
    tensors = {f"whole.{name}": state[name] for name in whole}
    for name, part in factors.items():
        tensors |= {f"up.{name}": part.up, f"down.{name}": part.down}
    first = next(iter(factors.values()))
    facts = {
        "base": init["digest"],
        "base_path": init["path"],
        "rank": len(first.down),
        "scale": first.scale,
        "layers": list(factors),
        "weights": list(state),
    }
    checkpoint.write(folder / FILE, tensors, {**about, "lora": facts})


def parse(asked: str) -> tuple[str, float]:
    """Read `a.safetensors:0.8` as a path and a weight, which is 1 if none is given.

    Raises:
        UserError: a weight that is not finite.
    """
    path, colon, weight = asked.rpartition(":")
    try:
        value = float(weight) if colon else 1.0
    except ValueError:
        return asked, 1.0  # the colon is the path's own
    if not math.isfinite(value):
        raise UserError(f"'{asked}': expected a finite weight, such as style.safetensors:0.8")
    return path if colon else asked, value


def put_on(
    tensors: Mapping[str, Tensor], about: Mapping[str, Any], asked: Sequence[str], run: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a model file's tensors and facts with LoRA files merged into them.

    Where a file holds other weights whole, such as those of new classes, they take the place of the
    model's own, and recipe and classes are the file's.

    Args:
        tensors: of the model.
        about: its facts.
        asked: `FILE` or `FILE:WEIGHT`, FILE a LoRA file or the folder of its run.
        run: what the model is called in messages.

    Raises:
        UserError: a file is none of LoRA, is for another network, or two hold different weights
            whole.
    """
    own, whole, facts = checkpoint.digest(tensors), dict[str, Tensor](), dict(about)
    changes, weights = dict[str, Tensor](), list(tensors)
    for path, weight in map(parse, asked):
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(
                f"{file} does not exist; expected the {FILE} of a run trained with "
                "--tune lora, or the run's folder"
            )
        given, theirs = checkpoint.read(file)
        if "lora" not in theirs:
            raise UserError(
                f"{path} is a whole model and no LoRA; expected the {FILE} of a run trained with "
                "--tune lora"
            )
        said = theirs["lora"]
        if not isinstance(said, dict) or SAID - said.keys():
            raise UserError(
                f"{path} does not tell {', '.join(sorted(SAID))}: it is damaged; get it anew, whole"
            )
        _check(given, said["layers"], tensors, path, run)
        if said["base"] != own:
            log.warning(
                "%s was trained on %s, and %s has the same networks with other weights: pictures "
                "may be worse", path, said["base_path"], run,
            )  # fmt: skip
        for name in said["layers"]:
            more = weight * said["scale"] * (given[f"up.{name}"] @ given[f"down.{name}"])
            changes[name] = changes.get(name, torch.zeros(())) + more
        for key in (key for key in given if key.startswith("whole.")):
            name = key.removeprefix("whole.")
            if name in tensors and torch.equal(tensors[name], given[key]):
                continue
            if name in whole and not torch.equal(whole[name], given[key]):
                raise UserError(
                    f"{path} and another LoRA both bring {name}, and not the same; one of several "
                    "may bring classes or layers of its own"
                )
            whole[name] = given[key]
            facts, weights = theirs, said["weights"]
    facts = {key: value for key, value in facts.items() if key not in ("tuned", "lora")}
    facts["recipe"] = {**facts["recipe"], "run": {**facts["recipe"]["run"], "lora": list(asked)}}
    made = {name: value for name, value in {**tensors, **whole}.items() if name in weights}
    for name, change in changes.items():
        made[f"{name}.weight"] = tensors[f"{name}.weight"] + change.view_as(made[f"{name}.weight"])
    return made, facts


def merge(run: str | Path, asked: Sequence[str], out: str | Path) -> Path:
    """Write a run's model with LoRA files merged into it as a model file of its own; return it.

    Raises:
        UserError: as `put_on`; there is none; `out` is there already, or is no .safetensors file.
    """
    out = Path(out)
    if not asked:
        raise UserError("there is nothing to merge; give one --lora FILE or several")
    if out.exists() or out.suffix != ".safetensors":
        raise UserError(f"{out}: expected the name of a new .safetensors file")
    tensors, facts = checkpoint.read_model(run)
    checkpoint.write(out, *put_on(tensors, facts, asked, str(run)))
    return out


def _check(
    given: Mapping[str, Tensor],
    layers: Sequence[str],
    tensors: Mapping[str, Tensor],
    path: str,
    run: str,
) -> None:
    """Raise UserError when factors do not fit a model, naming layers and shapes."""
    wrong = []
    for name in layers:
        up, down = given.get(f"up.{name}"), given.get(f"down.{name}")
        if up is None or down is None or up.shape[1:] != down.shape[:1] or down.ndim != 2:
            raise UserError(
                f"{path} has no factors of {name} that fit each other: it is damaged; get it anew, "
                "whole"
            )
        rows, columns = len(up), down.shape[1]
        weight = tensors.get(f"{name}.weight")
        if weight is None:
            wrong.append(f"{name} ({rows}, {columns}) is not there")
        elif weight.flatten(1).shape != (rows, columns):
            wrong.append(f"{name} ({rows}, {columns}) is {tuple(weight.flatten(1).shape)}")
    if wrong:
        rest = f" and {len(wrong) - TOLD} more" if len(wrong) > TOLD else ""
        raise UserError(
            f"{path} is a LoRA for another network than {run}: of its {len(layers)} layers "
            f"{', '.join(wrong[:TOLD])}{rest}; give the run it was trained on"
        )
