"""The files of a checkpoint: which there are, and the tensors in them.

Only safetensors files are read, and JSON: data that cannot run. Tensors are views of the file,
mapped into memory: nothing is read before it is used, and nothing is held twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trilemma.checkpoint import PICKLES, refuse_pickle
from trilemma.errors import UserError


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, mapped into memory, and its metadata.

    Raises:
        UserError: there is no such file, it is a pickle, cut short or damaged.
    """
    if not path.is_file():
        seen = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {seen}; expected a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        refuse_pickle(path)
        raise UserError(
            f"{path} cannot be read as a safetensors file: {error}; it may be cut short or damaged "
            f"({path.stat().st_size:,} bytes): fetch it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; raises UserError when there is none."""
    if not path.is_file():
        raise UserError(f"{path} is missing: the folder is not complete; fetch it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again")
    return value


def weights(
    folder: Path, stems: Iterable[str] = ("diffusion_pytorch_model", "model")
) -> dict[str, Tensor]:
    """Return all tensors of one part of a diffusers folder: one file, or several with an index.

    Files of float16 (`.fp16.safetensors`) serve where there are no others.

    Raises:
        UserError: there are no safetensors files.
    """
    for stem in stems:
        for variant in ("", ".fp16"):
            path = folder / f"{stem}{variant}.safetensors"
            if path.is_file():
                return read(path)[0]
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                names = read_json(index).get("weight_map", {}).values()
                parts = [_inside(folder, str(name)) for name in sorted(set(names))]
                return {key: tensor for part in parts for key, tensor in read(part)[0].items()}
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix in PICKLES:
            refuse_pickle(path)
    raise UserError(f"{folder} holds no weights; expected {next(iter(stems))}.safetensors there")


def _inside(folder: Path, name: str) -> Path:
    """Return a file that an index names; raises UserError when it would lie elsewhere."""
    if Path(name).name != name:
        raise UserError(f"{folder} has an index that names '{name}', which lies outside it")
    return folder / name


def check_fit(own: Mapping[str, Any], given: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError when tensors are missing, unknown, no weights, or of another shape.

    Args:
        own: the network's tensors by name.
        given: what a file holds, under the network's names.
        where: is told.
    """
    shapes = [
        f"{name} {tuple(given[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    ]
    whole = [n for n in own.keys() & given.keys() if not given[n].is_floating_point()]
    found = {
        "missing": sorted(own.keys() - given.keys()),
        "unknown": sorted(given.keys() - own.keys()),
        "of another shape": sorted(shapes),
        "not of floating point, as if quantised": sorted(whole),
    }
    told = [
        f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in found.items()
        if names
    ]
    if told:
        raise UserError(f"{where} does not fit its network: {'; '.join(told)}")
