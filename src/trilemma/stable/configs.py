"""What a checkpoint's networks are: said by a folder's config.json, or told by a file's shapes.

Both give the arguments of our networks. What a config asks for that these do not have is refused by
its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trilemma.errors import UserError

PLAIN_UNET: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
}
"""What the config of a U-Net may say of these, or leave out."""


def _plain(config: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{where} has {key} {config[key]!r}; expected {value!r}: this architecture is not "
                "known, only those of Stable Diffusion 1, 2 and XL are"
            )


def _kind(config: Mapping[str, Any], expected: str, where: str) -> None:
    kind = config.get("_class_name", expected)
    if kind != expected:
        raise UserError(f"{where} is of a {kind}; expected a {expected}")


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count


def unet(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the arguments of SpatialUNet by a unet/config.json; raises UserError."""
    _kind(config, "UNet2DConditionModel", where)
    _plain(config, PLAIN_UNET, where)
    channels = list(config.get("block_out_channels", (320, 640, 1280, 1280)))
    count = len(channels)
    downs = config.get("down_block_types", ["CrossAttnDownBlock2D"] * (count - 1) + ["DownBlock2D"])
    ups = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (count - 1))
    known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    known |= {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
    for name in (*downs, *ups):
        if name not in known:
            raise UserError(f"{where} has a block {name}; expected one of {', '.join(known)}")
    crossed = [known[name] for name in downs]
    if [known[name] for name in reversed(ups)] != crossed:
        raise UserError(f"{where} has transformers at other sizes on the way up than down")
    blocks = _each(config.get("layers_per_block", 2), count)
    dims = _each(config.get("cross_attention_dim", 1280), count)
    if len({*blocks}) > 1 or len({*dims}) > 1:
        raise UserError(f"{where} has other layers_per_block or cross_attention_dim at each size")
    depths = _each(config.get("transformer_layers_per_block", 1), count)
    told: dict[str, Any] = {
        "in_channels": config.get("in_channels", 4),
        "out_channels": config.get("out_channels", 4),
        "channels": channels,
        "blocks": blocks[0],
        "transformers": [
            depth if cross else 0 for depth, cross in zip(depths, crossed, strict=True)
        ],
        "middle": depths[-1],
        # The heads' number, though the key says their width: a mistake that every file keeps.
        "heads": _each(
            config.get("num_attention_heads") or config.get("attention_head_dim", 8), count
        ),
        "text_dim": dims[0],
        "linear": config.get("use_linear_projection", False),
        "groups": config.get("norm_num_groups", 32),
    }
    added = config.get("addition_embed_type")
    if added == "text_time":
        told["number_dim"] = config["addition_time_embed_dim"]
        # How many numbers go with the vector is said by the pipeline, not here: see `numbers`.
        told["added"] = config["projection_class_embeddings_input_dim"]
    elif added is not None:
        raise UserError(f"{where} has addition_embed_type {added!r}; expected none or 'text_time'")
    return told


def split_added(told: dict[str, Any], vector_dim: int) -> dict[str, Any]:
    """Say how much of a U-Net's added width is the text's vector, and how many numbers the rest."""
    told = dict(told)
    added = told.pop("added", 0)
    if added:
        numbers, rest = divmod(added - vector_dim, told["number_dim"])
        if rest or numbers < 1:
            raise UserError(
                f"the U-Net is told {added} numbers besides the tokens, and the text encoder's "
                f"vector has {vector_dim}: the parts do not belong together"
            )
        told |= {"vector_dim": vector_dim, "numbers": numbers}
    return told


def autoencoder(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the arguments of KLAutoencoder by a vae/config.json; raises UserError."""
    _kind(config, "AutoencoderKL", where)
    _plain(config, {"act_fn": "silu", "in_channels": 3, "out_channels": 3}, where)
    outer = config.get("use_quant_conv", True)
    _plain(config, {"use_post_quant_conv": outer}, where)
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    return {
        "channels": list(config.get("block_out_channels", (64,))),
        "blocks": config.get("layers_per_block", 1),
        "latent": config.get("latent_channels", 4),
        "scale": 1.0 if scale is None else scale,
        "shift": shift or 0.0,
        "outer": outer,
        "attention": config.get("mid_block_add_attention", True),
        "groups": config.get("norm_num_groups", 32),
    }


def tiny(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the arguments of TinyAutoencoder by its config.json; raises UserError."""
    _kind(config, "AutoencoderTiny", where)
    _plain(config, {"act_fn": "relu", "upsample_fn": "nearest", "in_channels": 3}, where)
    widths = {
        *config.get("encoder_block_out_channels", (64,)),
        *config.get("decoder_block_out_channels", (64,)),
    }
    if len(widths) > 1:
        raise UserError(f"{where} has widths {sorted(widths)}; expected one for all sizes")
    return {
        "channels": widths.pop(),
        "encoder": list(config.get("num_encoder_blocks", (1, 3, 3, 3))),
        "decoder": list(config.get("num_decoder_blocks", (3, 3, 3, 1))),
        "latent": config.get("latent_channels", 4),
        "scale": config.get("scaling_factor", 1.0),
    }


def _count(keys: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the greatest number that a pattern finds at the start of keys."""
    found = [int(match[1]) for key in keys if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def unet_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return SpatialUNet's arguments by the shapes of weights under its own names.

    Heads are 64 wide where the projections are matrices (versions 2 and XL), else there are 8.
    """
    count = _count(weights, r"down_blocks\.(\d+)\.")
    blocks = _count(weights, r"down_blocks\.0\.resnets\.(\d+)\.")
    names = "attn2.to_k.weight", "proj_in.weight", "add_embedding.linear_1.weight"
    channels = [weights[f"down_blocks.{i}.resnets.0.conv2.weight"].shape[0] for i in range(count)]
    middle = weights[f"mid_block.attentions.0.transformer_blocks.0.{names[0]}"]
    linear = weights[f"mid_block.attentions.0.{names[1]}"].ndim == 2
    told: dict[str, Any] = {
        "in_channels": weights["conv_in.weight"].shape[1],
        "out_channels": weights["conv_out.weight"].shape[0],
        "channels": channels,
        "blocks": blocks,
        "transformers": [
            _count(weights, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\.")
            for i in range(count)
        ],
        "middle": _count(weights, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\."),
        "heads": [max(width // 64, 1) if linear else 8 for width in channels],
        "text_dim": middle.shape[1],
        "linear": linear,
    }
    if names[2] in weights:
        told |= {"number_dim": 256, "added": weights[names[2]].shape[1]}
    return told


def autoencoder_of(weights: Mapping[str, Tensor], scale: float) -> dict[str, Any]:
    """Return KLAutoencoder's arguments by the shapes of weights under its own names."""
    count = _count(weights, r"encoder\.down_blocks\.(\d+)\.")
    return {
        "channels": [
            weights[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"].shape[0]
            for i in range(count)
        ],
        "blocks": _count(weights, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent": weights["decoder.conv_in.weight"].shape[1],
        "scale": scale,
        "outer": "quant_conv.weight" in weights,
        "attention": "encoder.mid_block.attentions.0.to_q.weight" in weights,
    }


def clip_of(weights: Mapping[str, Tensor], act: str) -> dict[str, Any]:
    """Return the config of a CLIP text encoder of `transformers` by its weights' shapes."""
    tokens = weights["text_model.embeddings.token_embedding.weight"]
    width = tokens.shape[1]
    told = {
        "vocab_size": tokens.shape[0],
        "hidden_size": width,
        "intermediate_size": weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(weights, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": weights["text_model.embeddings.position_embedding.weight"].shape[
            0
        ],
        "hidden_act": act,
        "projection_dim": width,
        "bos_token_id": tokens.shape[0] - 2,
        "eos_token_id": tokens.shape[0] - 1,
        "pad_token_id": 1,
    }
    if "text_projection.weight" in weights:
        told["projection_dim"] = weights["text_projection.weight"].shape[0]
    return told
