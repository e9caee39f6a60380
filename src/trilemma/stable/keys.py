"""Names of weights in single files of Stable Diffusion 1, 2 and XL, and in our networks.

A single file holds all parts under the names of the code that trained them; our networks have the
names of diffusers' folders. Everything here turns the former into the latter: by names, and where
three matrices are kept as one, or a matrix as a convolution of 1 x 1, by views of the same memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
TEXT1 = "cond_stage_model.transformer."
TEXT2 = "cond_stage_model.model."
XL_FIRST, XL_SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER = "conditioner.embedders.0.model."

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
PLACE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""In the vae/ of early folders."""

OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin so, without that beginning."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _swap(name: str, table: Mapping[str, str]) -> str:
    """Replace the beginning of a name, up to a dot or the end, by a table."""
    for theirs, ours in table.items():
        if name == theirs or name.startswith(theirs + "."):
            return ours + name[len(theirs) :]
    return name


def unet_name(name: str, blocks: int) -> str:
    """Return our name of a weight of the U-Net, or of a part of it.

    Args:
        name: in the single file, without `UNET`.
        blocks: residual blocks at each size.
    """
    name = _swap(name, UNET_ENDS)
    match = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)(?:\.(.*)|$)", name)
    if match is None:
        first, _, rest = name.partition(".resnets.")
        i, dot, rest = rest.partition(".")
        return f"{first}.resnets.{i}{dot}{_swap(rest, RESNET)}" if rest else name
    down, index, part, rest = match[1] == "input", int(match[2]), int(match[3]), match[4] or ""
    row = blocks + 1
    level, place = divmod(index - 1, row) if down else divmod(index, row)
    where = f"{'down' if down else 'up'}_blocks.{level}"
    if down and place == blocks:  # the stride of two, `op`
        return f"{where}.downsamplers.0.conv" + rest.removeprefix("op")
    if part == 0:
        return f"{where}.resnets.{place}." + _swap(rest, RESNET)
    if part == 2 or re.match(r"conv(\.|$)", rest):
        return f"{where}.upsamplers.0.{rest}"
    return f"{where}.attentions.{place}.{rest}"


def unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a U-Net's tensors, given without `UNET`, under our names."""
    found = {
        int(m[1]) for name in tensors if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))
    }
    blocks = (
        min(found) if found else len({n.split(".")[1] for n in tensors if "input_b" in n})
    ) - 1
    return {unet_name(name, blocks): tensor for name, tensor in tensors.items()}


def autoencoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an autoencoder's tensors, of a single file or an early folder, under our names."""
    ups = [int(m[1]) for name in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", name))]
    last = max(ups, default=0)
    made = {}
    for name, tensor in tensors.items():
        name = re.sub(
            r"^(encoder|decoder)\.(down|up)\.(\d+)\.(block|downsample|upsample)\.(\d+\.)?",
            lambda m: (
                f"{m[1]}.{m[2]}_blocks.{last - int(m[3]) if m[2] == 'up' else m[3]}."
                + (f"resnets.{m[5]}" if m[4] == "block" else f"{m[4]}rs.0.")
            ),
            name,
        )
        name = re.sub(
            r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name
        )
        name = name.replace(".nin_shortcut.", ".conv_shortcut.")
        name = re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)
        match = re.match(r"(.*)\.mid\.attn_1\.(.*)", name)
        if match:
            name = f"{match[1]}.mid_block.attentions.0.{_swap(match[2], PLACE_ATTENTION)}"
        match = re.match(r"(.*\.mid_block\.attentions\.0\.)(.*)", name)
        if match:
            name = match[1] + _swap(match[2], OLD_ATTENTION)
            if tensor.ndim == 4:  # a convolution of 1 x 1
                tensor = tensor.flatten(1)
        made[name] = tensor
    return made


def open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an OpenCLIP text tower's tensors under the names of `transformers`."""
    made = {}
    for name, tensor in tensors.items():
        match = re.match(r"transformer\.resblocks\.(\d+)\.(.*)", name)
        if name in ("logit_scale", "attn_mask"):
            continue
        if name == "token_embedding.weight":
            made["text_model.embeddings.token_embedding.weight"] = tensor
        elif name == "positional_embedding":
            made["text_model.embeddings.position_embedding.weight"] = tensor
        elif name == "text_projection":
            made["text_projection.weight"] = tensor.T
        elif name.startswith("ln_final."):
            made["text_model.final_layer_norm." + name.removeprefix("ln_final.")] = tensor
        elif match is None:
            made[name] = tensor  # unknown: told when it does not fit
        else:
            layer = f"text_model.encoder.layers.{match[1]}."
            three = re.match(r"attn\.in_proj_(weight|bias)", match[2])
            if three:
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    made[f"{layer}self_attn.{part}_proj.{three[1]}"] = rows
            else:
                made[layer + _swap(match[2], OPEN_CLIP)] = tensor
    return made


def tiny_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return half of a tiny autoencoder, as its own files name it, without the leading `layers.`.

    There the decoder begins with a clamp, which is layer 0 and has no weights.
    """
    numbers = {int(name.split(".")[0]) for name in tensors}
    shift = 0 if 0 in numbers else 1
    made = {}
    for name, tensor in tensors.items():
        number, _, rest = name.partition(".")
        made[f"layers.{int(number) - shift}.{rest}"] = tensor
    return made
