"""LoRA files of Stable Diffusion 3 and FLUX.1, in the layouts that `lora` tells of.

Diffusers names the layers of its folders after `transformer.`; kohya's layout those of original
files after `lora_unet_`, where queries, keys and values are one matrix: its rows are changed in the
three layers that they are here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilemma.errors import UserError
from trilemma.stable import files, flux, lora, sd3
from trilemma.stable.places import Place, find
from trilemma.stable.rectified import Rectified, StableDiffusion3

Target = tuple[nn.Linear | nn.Conv2d, Place]


def add(model: Rectified, asked: str) -> None:
    """Add a LoRA file to a checkpoint, in place.

    Args:
        model: the checkpoint.
        asked: FILE or FILE:WEIGHT.

    Raises:
        UserError: the file cannot be read, or has parts that fit no weight.
    """
    path, weight = lora.split(asked)
    tensors, facts = files.read(path)
    targets, told, unknown = _targets(model), lora._adapter(facts), []
    for name, part in lora._parts(path, tensors).items():
        found = targets.get(_flat(name))
        if found is None or "down" not in part or "up" not in part:
            unknown.append(name)
            continue
        rank = len(part["down"])
        alpha = float(part["alpha"]) if "alpha" in part else lora._alpha(told, name, rank)
        change = part["up"].float().flatten(1) @ part["down"].float().flatten(1)
        rows = sum(len(layer.weight) for layer, _ in found)
        if change.shape != (rows, found[0][0].weight[0].numel()):
            raise UserError(
                f"{path}: {name} changes a matrix of {tuple(change.shape)}, and the weight is "
                f"{(rows, found[0][0].weight[0].numel())}: it was made for another model"
            )
        for layer, place in found:
            _change(layer, place.take(change) * (weight * alpha / rank))
    if unknown:
        raise UserError(
            f"{path} changes {len(unknown)} parts that this checkpoint's transformer lacks or that "
            f"are of a kind not known, such as {unknown[0]}: it was made for another model"
        )


@torch.no_grad()
def _change(layer: nn.Linear | nn.Conv2d, change: Tensor) -> None:
    """Give a layer a changed weight of its own."""
    own = layer.weight
    changed = own.float() + change.view(own.shape).to(own.device)
    layer.weight = nn.Parameter(changed.to(own.dtype), requires_grad=False)


def _targets(model: Rectified) -> dict[str, list[Target]]:
    """Return the layers behind each name of a layer in either layout, with `_` for dots."""
    original = sd3 if isinstance(model, StableDiffusion3) else flux
    state = model.network.state_dict()
    layouts = {
        "transformer_": model.diffusers_places(),
        "lora_unet_": find(state, original.original_rules()),
    }
    found: dict[str, list[Target]] = {}
    for prefix, places in layouts.items():
        for name, place in places.items():
            layer = model.network.get_submodule(name.rpartition(".")[0])
            if name.endswith(".weight") and isinstance(layer, nn.Linear | nn.Conv2d):
                flat = prefix + place.name.removesuffix(".weight").replace(".", "_")
                found.setdefault(flat, []).append((layer, place))
    return found


def _flat(name: str) -> str:
    """Return the name of a changed layer with `_` for dots, and one beginning for each layout."""
    name = name.removeprefix("base_model.model.").replace(".", "_")
    for other, ours in (("diffusion_model_", "lora_unet_"), ("lora_transformer_", "transformer_")):
        if name.startswith(other):
            name = ours + name.removeprefix(other)
    return name
