"""LoRA files of Stable Diffusion 3 and FLUX.1, in the layouts that `lora` tells of.

Diffusers names the layers of its folders after `transformer.`; kohya's layout those of original
files after `lora_unet_`, where queries, keys and values are one matrix: its rows are changed in the
three layers that they are here.
"""

from __future__ import annotations

from torch import nn

from trilemma.stable import flux, lora, sd3
from trilemma.stable.lora import Target
from trilemma.stable.places import find
from trilemma.stable.rectified import Rectified, StableDiffusion3


def add(model: Rectified, asked: str) -> None:
    """Add a LoRA file to a checkpoint, in place.

    Args:
        model: the checkpoint.
        asked: FILE or FILE:WEIGHT.

    Raises:
        UserError: as `lora.change`.
    """
    lora.change(asked, _targets(model), _flat)


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
