"""CLIP's weights by the names that others give them, both ways.

`transformers` names in the folders of the Hugging Face hub (`config.json`, `model.safetensors`);
OpenCLIP's names are also OpenAI's own. Both keep the same numbers: OpenCLIP the projections turned
around and the position of queries, keys and values as ours, one matrix of the three;
`transformers` these apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trilemma.errors import UserError
from trilemma.models.clip import CLIP
from trilemma.networks.layers import TransformerBlock
from trilemma.networks.text import TextTransformer
from trilemma.networks.vit import VisionTransformer

MEAN = [0.48145466, 0.4578275, 0.40821073]  # of the pixels that OpenAI trained on
STD = [0.26862954, 0.26130258, 0.27577711]

# Ours -> theirs, outside the blocks. A norm or projection has a weight, a norm a bias too.
_TRANSFORMERS = {
    "image.enter.weight": "vision_model.embeddings.patch_embedding.weight",
    "image.first": "vision_model.embeddings.class_embedding",
    "image.position": "vision_model.embeddings.position_embedding.weight",
    "image.norm_before": "vision_model.pre_layrnorm",
    "image.norm": "vision_model.post_layernorm",
    "text.token.weight": "text_model.embeddings.token_embedding.weight",
    "text.position": "text_model.embeddings.position_embedding.weight",
    "text.norm": "text_model.final_layer_norm",
    "join.image.weight": "visual_projection.weight",
    "join.text.weight": "text_projection.weight",
    "join.log_scale": "logit_scale",
}
_OPEN_CLIP = {
    "image.enter.weight": "visual.conv1.weight",
    "image.first": "visual.class_embedding",
    "image.position": "visual.positional_embedding",
    "image.norm_before": "visual.ln_pre",
    "image.norm": "visual.ln_post",
    "text.token.weight": "token_embedding.weight",
    "text.position": "positional_embedding",
    "text.norm": "ln_final",
    "join.image.weight": "visual.proj",
    "join.text.weight": "text_projection",
    "join.log_scale": "logit_scale",
}
_TURNED = ("visual.proj", "text_projection")
_BLOCKS = {
    "transformers": {
        "image.blocks": "vision_model.encoder.layers",
        "text.blocks": "text_model.encoder.layers",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "out": "self_attn.out_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    "open_clip": {
        "image.blocks": "visual.transformer.resblocks",
        "text.blocks": "transformer.resblocks",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "out": "attn.out_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
}


def to_transformers(model: CLIP) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return `config.json` and the weights of `transformers`' CLIPModel for a model.

    Raises:
        UserError: its towers are not those of CLIP.
    """
    image, text = _towers(model)
    parts: list[dict[str, Any]] = []
    for tower in (image, text):
        block = tower.blocks[0]
        assert isinstance(block, TransformerBlock)
        parts.append(
            {
                "hidden_size": tower.width,
                "intermediate_size": block.up.out_features,
                "num_hidden_layers": len(tower.blocks),
                "num_attention_heads": block.heads,
                "hidden_act": block.activation.replace("-", "_"),
                "projection_dim": model.join.text.out_features,
            }
        )
    channels, size, _ = image.shape
    parts[0] |= {"image_size": size, "patch_size": image.patch, "num_channels": channels}
    parts[1] |= {
        "vocab_size": text.token.num_embeddings,
        "max_position_embeddings": text.context,
        "bos_token_id": text.end - 1,
        "eos_token_id": text.end,
        "pad_token_id": text.end,
    }
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.join.text.out_features,
        "vision_config": parts[0],
        "text_config": parts[1],
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        for theirs, value in _apart(name, tensor):
            weights[theirs] = value
    return config, weights


def from_transformers(
    config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a CLIP's spec, as recipes have it, and its weights, of `transformers`' CLIPModel's.

    Values that `config.json` leaves out are `transformers`' defaults: those of ViT-B/32.
    """
    image, text = config.get("vision_config") or {}, config.get("text_config") or {}
    size, channels = image.get("image_size", 224), image.get("num_channels", 3)
    end = text.get("eos_token_id", 49_407)
    vocabulary = text.get("vocab_size", 49_408)
    spec = _spec(
        {
            "shape": [channels, size, size],
            "patch": image.get("patch_size", 32),
            **_sizes(image, 768, 3072, 12),
        },
        {
            # 2 was written by old versions, which took the largest number for the end instead.
            "end": vocabulary - 1 if end == 2 else end,
            "vocabulary": vocabulary,
            "context": text.get("max_position_embeddings", 77),
            **_sizes(text, 512, 2048, 8),
        },
        config.get("projection_dim", 512),
    )
    return spec, _renamed(weights, "transformers")


def to_open_clip(model: CLIP) -> dict[str, Tensor]:
    """Return the weights under OpenCLIP's names.

    Raises:
        UserError: its towers are not those of CLIP.
    """
    _towers(model)
    weights = {}
    for name, tensor in model.state_dict().items():
        theirs = _named(name, _OPEN_CLIP, _BLOCKS["open_clip"])
        theirs = theirs.replace(".qkv.", ".attn.in_proj_")
        weights[theirs] = tensor.T.contiguous() if theirs in _TURNED else tensor
    return weights


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return OpenCLIP's weights under our names."""
    return _renamed(weights, "open_clip")


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a CLIP of the Hugging Face hub as if it were a run of ours: weights and facts.

    Raises:
        UserError: a file is missing or damaged, there are only pickled weights, or it is no CLIP.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "clip":
        raise UserError(f"{folder} holds a model of type {kind!r}; of these only 'clip' is known")
    file = folder / "model.safetensors"
    if not file.is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        told = (
            f"it holds {', '.join(others)}, which could run code and are not read" if others else ""
        )
        raise UserError(f"{folder} holds no model.safetensors{'; ' if told else ''}{told}")
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as a safetensors file: {error}") from None
    spec, weights = from_transformers(config, {k: v.float() for k, v in weights.items()})
    facts = {
        "recipe": {"model": spec, "train": {}, "run": {"recipe": folder.name}},
        "data": {
            "name": folder.name,
            "shape": spec["image"]["shape"],
            "label_names": [],
            "attribute_names": [],
        },
        "progress": {"step": 0, "seen": 0, "elapsed": 0.0},
    }
    return weights, facts


def _sizes(part: Mapping[str, Any], width: int, inner: int, heads: int) -> dict[str, Any]:
    """Return what both towers' configurations say, with the defaults of this one."""
    act = part.get("hidden_act", "quick_gelu")
    if act not in ("gelu", "quick_gelu"):
        raise UserError(f"hidden_act {act!r} is not known; expected gelu or quick_gelu")
    width = part.get("hidden_size", width)
    return {
        "width": width,
        "depth": part.get("num_hidden_layers", 12),
        "heads": part.get("num_attention_heads", heads),
        "expand": part.get("intermediate_size", inner) / width,
        "activation": act.replace("_", "-"),
    }


def _spec(image: dict[str, Any], text: dict[str, Any], dim: int) -> dict[str, Any]:
    return {
        "type": "models.clip.CLIP",
        "dim": dim,
        "mean": MEAN if image["shape"][0] == 3 else 0.5,
        "std": STD if image["shape"][0] == 3 else 0.5,
        "image": {"type": "networks.vit.VisionTransformer", **image},
        "text": {"type": "networks.text.TextTransformer", **text},
    }


def _towers(model: CLIP) -> tuple[VisionTransformer, TextTransformer]:
    image, text = model.image, model.text
    if not isinstance(image, VisionTransformer) or not isinstance(text, TextTransformer):
        kinds = f"{type(image).__name__} and {type(text).__name__}"
        raise UserError(
            f"a CLIP of {kinds} has no form elsewhere; expected a VisionTransformer and a "
            "TextTransformer"
        )
    if text.widen is not None:
        raise UserError(
            "a CLIP with a factorised token embedding has no form elsewhere; train one with "
            "--set model.text.embedding=0"
        )
    return image, text


def _named(name: str, outside: Mapping[str, str], inside: Mapping[str, str]) -> str:
    """Return the other name of one of our weights; queries, keys and values stay `qkv`."""
    if name in outside:
        return outside[name]
    tower, dot, rest = name.partition(".blocks.")
    if dot:
        number, part, kind = rest.split(".")
        return f"{inside[f'{tower}.blocks']}.{number}.{inside.get(part, part)}.{kind}"
    layer, _, kind = name.rpartition(".")
    return f"{outside[layer]}.{kind}"


def _apart(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Return a weight of ours as `transformers` has it: one, or queries, keys and values apart."""
    theirs = _named(name, _TRANSFORMERS, _BLOCKS["transformers"])
    if ".qkv." not in theirs:
        return [(theirs, tensor)]
    return [
        (theirs.replace(".qkv.", f".self_attn.{letter}_proj."), part.contiguous())
        for letter, part in zip("qkv", tensor.chunk(3), strict=True)
    ]


def _renamed(weights: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return weights of the other kind under our names; names that are not known stay."""
    outside = _TRANSFORMERS if kind == "transformers" else _OPEN_CLIP
    back = {theirs: ours for ours, theirs in outside.items()}
    inside = {theirs: ours for ours, theirs in _BLOCKS[kind].items()}
    made: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith("position_ids") or name == "attn_mask":
            continue  # a table that old versions kept: 0, 1, 2, ...
        value = tensor.T.contiguous() if name in _TURNED else tensor
        made[_ours(name, back, inside)] = value
    for name in [name for name in made if ".q_proj." in name]:
        three = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if all(part in made for part in three):
            made[name.replace(".q_proj.", ".qkv.")] = torch.cat([made.pop(part) for part in three])
    return made


def _ours(name: str, back: Mapping[str, str], inside: Mapping[str, str]) -> str:
    if name in back:
        return back[name]
    for theirs, ours in inside.items():
        if ours.endswith(".blocks") and name.startswith(f"{theirs}."):
            number, _, rest = name[len(theirs) + 1 :].partition(".")
            if ".in_proj_" in rest:
                return f"{ours}.{number}.qkv.{rest.rpartition('_')[2]}"
            layer, _, kind = rest.rpartition(".")
            layer = inside.get(layer, layer.removeprefix("self_attn."))
            return f"{ours}.{number}.{layer}.{kind}"
    layer, _, kind = name.rpartition(".")
    return f"{back[layer]}.{kind}" if layer in back else name
