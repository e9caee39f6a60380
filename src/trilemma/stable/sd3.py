"""Stable Diffusion 3 and 3.5: what their files say of `networks.mmdit`, in both layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trilemma.errors import UserError
from trilemma.stable.places import Place, Rule

Shapes = Mapping[str, Sequence[int]]
"""Name of each tensor in a file -> its shape."""


def _attention(ours: str, theirs: str, added: bool = False) -> list[Rule]:
    """Return diffusers' names of one attention; `added` are those of the words in it."""
    q, k, v, norm, out = (
        ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added", "to_add_out")
        if added
        else ("to_q", "to_k", "to_v", "norm", "to_out.0")
    )
    pairs = {"q": q, "k": k, "v": v, "norm_q": f"{norm}_q", "norm_k": f"{norm}_k", "out": out}
    return [(f"{ours}.{own}", Place(f"{theirs}.{name}")) for own, name in pairs.items()]


def joint_block(ours: str, theirs: str) -> list[Rule]:
    """Return diffusers' names of a block of two streams; FLUX's are the same."""
    return [
        (f"{ours}.image.modulation.linear", Place(f"{theirs}.norm1.linear")),
        (f"{ours}.text.modulation.linear", Place(f"{theirs}.norm1_context.linear")),
        *_attention(f"{ours}.image.attention", f"{theirs}.attn"),
        *_attention(f"{ours}.image.alone", f"{theirs}.attn2"),
        *_attention(f"{ours}.text.attention", f"{theirs}.attn", added=True),
        (f"{ours}.image.up", Place(f"{theirs}.ff.net.0.proj")),
        (f"{ours}.image.down", Place(f"{theirs}.ff.net.2")),
        (f"{ours}.text.up", Place(f"{theirs}.ff_context.net.0.proj")),
        (f"{ours}.text.down", Place(f"{theirs}.ff_context.net.2")),
    ]


COMMON: list[Rule] = [
    ("time.up", Place("time_text_embed.timestep_embedder.linear_1")),
    ("time.down", Place("time_text_embed.timestep_embedder.linear_2")),
    ("guidance.up", Place("time_text_embed.guidance_embedder.linear_1")),
    ("guidance.down", Place("time_text_embed.guidance_embedder.linear_2")),
    ("pooled.up", Place("time_text_embed.text_embedder.linear_1")),
    ("pooled.down", Place("time_text_embed.text_embedder.linear_2")),
    ("text", Place("context_embedder")),
    ("modulation.linear", Place("norm_out.linear", swapped=True)),
    ("leave", Place("proj_out")),
]
"""Diffusers' names outside the blocks that SD3 and FLUX have alike."""


def diffusers_rules(config: Mapping[str, Any]) -> list[Rule]:
    """Return where our weights stand in a folder's `transformer`.

    Args:
        config: arguments of `MMDiT`.
    """
    last = config["depth"] - 1
    ends = f"transformer_blocks.{last}.norm1_context.linear"
    return [
        ("positions", Place("pos_embed.pos_embed")),
        ("enter", Place("pos_embed.proj")),
        *COMMON,
        (f"blocks.{last}.text.modulation.linear", Place(ends, swapped=True)),
        *joint_block("blocks.{i}", "transformer_blocks.{i}"),
    ]


def original_rules() -> list[Rule]:
    """Return where our weights stand in a file of the original layout."""
    rules: list[Rule] = [
        ("positions", Place("pos_embed")),
        ("enter", Place("x_embedder.proj")),
        ("time.up", Place("t_embedder.mlp.0")),
        ("time.down", Place("t_embedder.mlp.2")),
        ("pooled.up", Place("y_embedder.mlp.0")),
        ("pooled.down", Place("y_embedder.mlp.2")),
        ("text", Place("context_embedder")),
        ("modulation.linear", Place("final_layer.adaLN_modulation.1")),
        ("leave", Place("final_layer.linear")),
    ]
    for own, block in (("image", "x_block"), ("text", "context_block")):
        ours, theirs = f"blocks.{{i}}.{own}", f"joint_blocks.{{i}}.{block}"
        rules += [
            (f"{ours}.modulation.linear", Place(f"{theirs}.adaLN_modulation.1")),
            (f"{ours}.up", Place(f"{theirs}.mlp.fc1")),
            (f"{ours}.down", Place(f"{theirs}.mlp.fc2")),
        ]
        for attention, name in (("attention", "attn"), ("alone", "attn2")):
            at = f"{theirs}.{name}"
            rules += [
                (f"{ours}.{attention}.{each}", Place(f"{at}.qkv", i, i + 1, 3))
                for i, each in enumerate("qkv")
            ]
            rules += [
                (f"{ours}.{attention}.norm_q", Place(f"{at}.ln_q")),
                (f"{ours}.{attention}.norm_k", Place(f"{at}.ln_k")),
                (f"{ours}.{attention}.out", Place(f"{at}.proj")),
            ]
    return rules


def from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the arguments of `MMDiT` that a folder's `transformer/config.json` says.

    Raises:
        UserError: it asks for what our network is not.
    """
    heads = config["num_attention_heads"]
    width = heads * config["attention_head_dim"]
    norm = config.get("qk_norm")
    channels, made = config["in_channels"], config.get("out_channels")
    for what, seen, expected in (
        ("caption_projection_dim", config["caption_projection_dim"], [width]),
        ("qk_norm", norm, [None, "rms_norm"]),
        ("out_channels", made, [None, channels]),
    ):
        if seen not in expected:
            listed = " or ".join(repr(each) for each in expected)
            raise UserError(
                f"{where} has {what} {seen!r}; Stable Diffusion 3 and 3.5 have {listed}"
            )
    return {
        "channels": channels,
        "patch": config["patch_size"],
        "width": width,
        "depth": config["num_layers"],
        "heads": heads,
        "text_dim": config["joint_attention_dim"],
        "pooled_dim": config["pooled_projection_dim"],
        "table": config["pos_embed_max_size"],
        "size": config["sample_size"],
        "qk_norm": norm is not None,
        "twice": tuple(config.get("dual_attention_layers") or ()),
    }


def to_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return diffusers' `config.json` of arguments of `MMDiT`: `from_config` undone."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "in_channels": config["channels"],
        "out_channels": config["channels"],
        "patch_size": config["patch"],
        "num_layers": config["depth"],
        "num_attention_heads": config["heads"],
        "attention_head_dim": config["width"] // config["heads"],
        "caption_projection_dim": config["width"],
        "joint_attention_dim": config["text_dim"],
        "pooled_projection_dim": config["pooled_dim"],
        "pos_embed_max_size": config["table"],
        "sample_size": config["size"],
        "qk_norm": "rms_norm" if config["qk_norm"] else None,
        "dual_attention_layers": list(config["twice"]),
    }


def from_shapes(shapes: Shapes, heads: int | None = None) -> dict[str, Any]:
    """Return the arguments of `MMDiT` that the shapes in an original file say.

    Args:
        shapes: of the tensors of the transformer, without what stands before all names.
        heads: of the attention. With no normalisation of queries and keys the shapes do not tell
            them: as many as blocks then, which is so in every published model, if None.
    """
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    blocks = numbers(shapes, r"joint_blocks\.(\d+)\.")
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    if heads is None:
        heads = width // norm[0] if norm is not None else len(blocks)
    return {
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": len(blocks),
        "heads": heads,
        "text_dim": shapes["context_embedder.weight"][1],
        "pooled_dim": shapes["y_embedder.mlp.0.weight"][1],
        "table": round(shapes["pos_embed"][1] ** 0.5),
        "size": 128,
        "qk_norm": norm is not None,
        "twice": tuple(numbers(shapes, r"joint_blocks\.(\d+)\.x_block\.attn2\.qkv\.weight$")),
    }


def numbers(shapes: Shapes, pattern: str) -> list[int]:
    """Return, in order, the numbers of the blocks whose names match."""
    return sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})
