"""LoRA files: changes of low rank, added to a checkpoint's weights.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models": W + weight alpha / r B A. The
layouts in use name the same parts differently:

    kohya      lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha; lora_te_,
               lora_te1_ and lora_te2_ for text encoders; U-Net parts also as single files name them
    diffusers  unet.down_blocks.0....to_q.lora_A.weight, .lora_B.weight (peft), or
               .lora.down.weight, .lora.up.weight, or processor.to_q_lora.down.weight;
               text_encoder., text_encoder_2.

A changed weight is one of its own: the file that the others are views of is never written to.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trilemma.errors import UserError
from trilemma.stable import files, keys
from trilemma.stable.places import Place

if TYPE_CHECKING:
    from trilemma.stable.pipeline import StableDiffusion

Target = tuple[nn.Linear | nn.Conv2d, Place]

DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight")
UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight", "_lora.up.weight")
ALPHA = (".alpha",)
UNIT = torch.ones(())
ORIGINAL = {theirs.replace(".", "_"): ours for theirs, ours in keys.RESNET.items()}


def split(asked: str) -> tuple[Path, float]:
    """Read FILE or FILE:WEIGHT; raises UserError when the weight is no number."""
    name, colon, weight = asked.rpartition(":")
    if not colon or Path(asked).exists():
        return Path(asked), 1.0
    try:
        if math.isfinite(value := float(weight)):
            return Path(name), value
    except ValueError:
        pass
    raise UserError(f"'{asked}': expected FILE or FILE:WEIGHT, such as style.safetensors:0.8")


def add(stable: StableDiffusion, asked: str) -> None:
    """Add a LoRA file to a checkpoint, in place.

    Args:
        stable: the checkpoint.
        asked: FILE or FILE:WEIGHT.

    Raises:
        UserError: as `change`.
    """
    targets = {name: [(layer, Place(name))] for name, layer in _layers(stable).items()}
    change(asked, targets, lambda name: _flat(name, stable.unet.blocks))


def change(asked: str, targets: Mapping[str, Sequence[Target]], flat: Callable[[str], str]) -> None:
    """Change layers by a LoRA file.

    Args:
        asked: FILE or FILE:WEIGHT.
        targets: the layers behind each name, and which rows of the change are theirs.
        flat: a name in the file -> that among the targets.

    Raises:
        UserError: the file cannot be read, or has parts that fit no weight.
    """
    path, weight = split(asked)
    tensors, facts = files.read(path)
    told, unknown, parts = _adapter(facts), [], _parts(path, tensors)
    if not parts:
        raise UserError(f"{path} holds nothing: it is no LoRA, or damaged; fetch it again")
    for name, part in parts.items():
        found = targets.get(flat(name))
        if found is None or "down" not in part or "up" not in part:
            unknown.append(name)
            continue
        shapes = [tuple(part[side].shape) for side in ("up", "down")]
        rank = shapes[1][0] if min(map(len, shapes)) > 1 else 0
        if not rank or part["up"][0].numel() != rank or part.get("alpha", UNIT).numel() != 1:
            raise UserError(
                f"{path}: the factors of {name} are {shapes[0]} and {shapes[1]}, which do not fit "
                "each other or their alpha: it is damaged; fetch it again"
            )
        alpha = float(part["alpha"]) if "alpha" in part else _alpha(told, name, rank)
        product = part["up"].float().flatten(1) @ part["down"].float().flatten(1)
        own = sum(len(layer.weight) for layer, _ in found), found[0][0].weight[0].numel()
        if product.shape != own:
            raise UserError(
                f"{path}: {name} changes a matrix of {tuple(product.shape)}, and the weight is "
                f"{own}: it was made for another model"
            )
        for layer, place in found:
            more = place.take(product).view(layer.weight.shape) * (weight * alpha / rank)
            changed = layer.weight.float() + more.to(layer.weight.device)
            layer.weight = nn.Parameter(changed.to(layer.weight.dtype), requires_grad=False)
    if unknown:
        raise UserError(
            f"{path} changes {len(unknown)} parts that this checkpoint lacks or that are of a kind "
            f"not known, such as {unknown[0]}: it was made for another model"
        )


def _layers(stable: StableDiffusion) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return every layer that a LoRA may change, under the name of kohya's layout."""
    parts: dict[str, nn.Module] = {"lora_unet": stable.unet}
    towers = stable.reader.towers
    names = ["lora_te"] if len(towers) == 1 else ["lora_te1", "lora_te2"]
    parts |= {name: tower.encoder for name, tower in zip(names, towers, strict=True)}
    found = {}
    for prefix, network in parts.items():
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if prefix != "lora_unet" and name.startswith(("encoder.", "embeddings.")):
                    name = f"text_model.{name}"
                found[f"{prefix}_{name.replace('.', '_')}"] = module
    if len(towers) == 1:
        found |= {k.replace("lora_te_", "lora_te1_", 1): v for k, v in found.items()}
    return found


def _parts(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each changed layer: down, up and perhaps alpha."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        for part, ends in (("down", DOWN), ("up", UP), ("alpha", ALPHA)):
            end = next((end for end in ends if key.endswith(end)), None)
            if end is not None:
                parts.setdefault(key[: -len(end)], {})[part] = tensor
                break
        else:
            raise UserError(
                f"{path} holds {key}, which belongs to no LoRA in a layout known: expected names "
                f"that end in {', '.join((*DOWN, *UP, *ALPHA))}"
            )
    return parts


def _flat(name: str, blocks: int) -> str:
    """Return the name of a changed layer in kohya's layout, by the names of our networks."""
    name = name.replace(".processor.", ".").removeprefix("base_model.model.")
    for theirs, ours in (("unet.", "lora_unet_"), ("text_encoder_2.", "lora_te2_")):
        if name.startswith(theirs):
            name = ours + name[len(theirs) :]
    name = re.sub(r"^text_encoder\.", "lora_te1_", name)
    name = name.replace(".", "_")
    name = re.sub(r"_to_out$", "_to_out_0", name)
    name = re.sub(r"^(lora_te\d?)_encoder_", r"\1_text_model_encoder_", name)
    match = re.match(r"lora_unet_(input|output)_blocks_(\d+)_(\d+)_(.*)", name)
    if match:
        rest = ORIGINAL.get(match[4], match[4])
        place = keys.unet_name(f"{match[1]}_blocks.{match[2]}.{match[3]}.{rest}", blocks)
        return "lora_unet_" + place.replace(".", "_")
    match = re.match(r"lora_unet_middle_block_([012])_(.*)", name)
    if match:
        place = keys.UNET_ENDS[f"middle_block.{match[1]}"].replace(".", "_")
        return f"lora_unet_{place}_{ORIGINAL.get(match[2], match[2])}"
    return name


def _alpha(told: Mapping[str, Any], name: str, rank: int) -> float:
    """Return the alpha of a layer by peft's metadata: by a pattern, else one for all, else r."""
    part, _, layer = name.partition(".")
    for pattern, alpha in (told.get(f"{part}.alpha_pattern") or {}).items():
        if layer.endswith(pattern):
            return float(alpha)
    alpha = told.get(f"{part}.lora_alpha")
    return float(rank if alpha is None else alpha)


def _adapter(facts: Mapping[str, str]) -> dict[str, Any]:
    """Return peft's metadata of a file, if there is any."""
    try:
        told = json.loads(facts.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
