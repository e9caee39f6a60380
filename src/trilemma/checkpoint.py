"""Files of a run: one safetensors file to share, one to go on from.

`model.safetensors`   averaged weights, with the recipe and the data's facts in its metadata.
`training/state.safetensors`   everything needed to go on bit for bit.
`trained/NAME.safetensors`, in the package: models to draw from at once, by name.

A run's are written to a temporary name, flushed to the disk and renamed, so that a kill at any
moment leaves the last good file. There is no pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trilemma.errors import UserError

FORMAT = 1
PACKAGED = Path(__file__).parent / "trained"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
TOLD = {
    "recipe": ("model", "train", "run"),
    "data": ("shape", "label_names", "attribute_names"),
    "progress": (),
}
"""What the file of a model must tell."""


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON-serialisable facts to `path`, all or nothing.

    What one tensor is under several names, as a part that two modules share, is written once.
    """
    plain, shared = {}, {}
    names: dict[Any, str] = {}
    for name, tensor in tensors.items():
        memory = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        first = names.setdefault(memory, name)
        if first == name:
            plain[name] = tensor.detach().cpu().contiguous()
        else:
            shared[name] = first
    told = {"format": FORMAT, "shared": shared, **facts}
    put(path, plain, {"trilemma": json.dumps(told)})


def put(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, contiguous and on the CPU, to a safetensors file, all or nothing.

    Raises:
        OSError: it cannot be written, for want of room, say; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        replace(temporary, path)
    except SafetensorError as error:  # what its writer makes of the system's errors
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(text.encode())
    replace(temporary, path)


def replace(temporary: Path, path: Path) -> None:
    """Flush `temporary` to the disk and give it its final name."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the rename itself must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def refuse_pickle(path: Path) -> None:
    """Raise UserError when a file is a pickle, by its name or by how it begins."""
    with open(path, "rb") as file:
        start = file.read(4)
    # A zip archive, or protocol 2 to 5 of pickle itself: the two forms of torch.save.
    if (
        path.suffix in PICKLES
        or (start[:2] == b"PK" and path.suffix != ".zip")
        or (start[:1] == b"\x80" and start[1:2] < b"\6")
    ):
        raise UserError(
            f"{path} is a pickle, which can run any program when it is opened: it is not; look for "
            "the same weights as .safetensors, or convert the file where it can do no harm"
        )


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote: tensors on the CPU, and the facts.

    Raises:
        UserError: the file is missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a run folder that `trilemma train` made")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("trilemma", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        refuse_pickle(path)
        raise UserError(
            f"{path} cannot be read as a safetensors file: {error}; it may be cut short or damaged "
            f"({path.stat().st_size:,} bytes): get it anew, whole"
        ) from error
    if facts is None:
        raise UserError(
            f"{path} is a safetensors file, but not one that Trilemma wrote; expected a run folder "
            "or its model.safetensors; `trilemma sample` and `trilemma finetune` take checkpoints "
            "from elsewhere"
        )
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise UserError(f"{path} does not tell its format: it is damaged; get it anew, whole")
    if facts["format"] > FORMAT:
        raise UserError(f"{path} is of a newer Trilemma (format {facts['format']}); please upgrade")
    shared = facts.pop("shared", {})
    if lost := sorted(set(shared.values()) - tensors.keys()):
        raise UserError(f"{path} lacks {lost[0]}: it is damaged; get it anew, whole")
    tensors |= {name: tensors[other] for name, other in shared.items()}
    return tensors, facts


def model_file(run: str | Path) -> Path:
    """Return the file of a trained model: a run folder's, itself, or the packaged one of that name.

    What there is on the disk goes before a packaged model of the same name.
    """
    path = Path(run)
    if path.is_file():
        return path
    packaged = PACKAGED / f"{run}.safetensors"
    inside = path / "model.safetensors"
    if str(run) in packaged_models() and not inside.is_file():
        return packaged
    return inside if path.is_dir() else path


def packaged_models() -> list[str]:
    """Return the names of the trained models that come with the package."""
    return sorted(path.stem for path in PACKAGED.glob("*.safetensors"))


def read_model(run: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the trained model of a run folder, a file or a CLIP's folder, or a packaged one.

    Returns as `read`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if (Path(run) / "config.json").is_file():  # of the Hugging Face hub
        from trilemma.models import clip_keys

        return clip_keys.read_folder(Path(run))
    path = model_file(run)
    if (Path(run) / "model_index.json").is_file():
        raise UserError(
            f"{run} is a checkpoint from elsewhere, a diffusers folder, and this needs a run that "
            "`trilemma train` made; `trilemma sample` and `trilemma finetune` take checkpoints"
        )
    if not path.exists() and os.sep not in str(run):
        raise UserError(
            f"{run} does not exist; expected a run folder that `trilemma train` made, or one of "
            f"the packaged models: {', '.join(packaged_models())}"
        )
    tensors, facts = read(path)
    if "lora" in facts:
        raise UserError(
            f"{run} is a LoRA, which changes a model and is none; give the run it was trained on: "
            f"trilemma sample {facts['lora']['base_path']} --lora {run} --out DIR"
        )
    for part, names in TOLD.items():
        table = facts.get(part)
        known = table if isinstance(table, dict) else {}
        if part == "recipe":
            known = {name: each for name, each in known.items() if isinstance(each, dict)}
        if known != table or any(name not in known for name in names):
            wanted = f", with {', '.join(names)}" if names else ""
            raise UserError(
                f"{path} does not tell its {part}{wanted}: it is damaged; get it anew, whole"
            )
    return tensors, facts


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, types, shapes and values, whatever else is in the file."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def flatten(prefix: str, tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested state into `tensors`; return its JSON-serialisable rest.

    Dictionary keys may be integers (an optimizer's are); `unflatten` restores them.
    """
    if isinstance(tree, Tensor):
        tensors[prefix] = tree
        return {"tensor": prefix}
    if isinstance(tree, dict):
        items = [[key, flatten(f"{prefix}.{key}", item, tensors)] for key, item in tree.items()]
        return {"dict": items}
    if isinstance(tree, list | tuple):
        return {"list": [flatten(f"{prefix}.{i}", v, tensors) for i, v in enumerate(tree)]}
    return {"value": tree}


def unflatten(rest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Invert `flatten`."""
    kind, value = next(iter(rest.items()))
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in value}
    if kind == "list":
        return [unflatten(item, tensors) for item in value]
    return value


def load_weights(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        UserError: naming the first weights that are missing, superfluous or of another shape.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if missing or extra or shapes:
        told = [
            f"{what}: {', '.join(found[:3])}{' ...' if len(found) > 3 else ''}"
            for what, found in (("missing", missing), ("unknown", extra), ("shape", sorted(shapes)))
            if found
        ]
        raise UserError(f"{where} does not fit this model: {'; '.join(told)}")
    module.load_state_dict(dict(tensors))
