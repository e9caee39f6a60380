"""FLUX.1: what its files say of `networks.flux`, in both layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trilemma.errors import UserError
from trilemma.stable.places import Place, Rule
from trilemma.stable.sd3 import COMMON, Shapes, joint_block, numbers

PATCH = 2
"""Pixels of a token; diffusers' configuration counts the channels of a token."""


def diffusers_rules() -> list[Rule]:
    """Return where our weights stand in a folder's `transformer`."""
    ours, theirs = "singles.{i}", "single_transformer_blocks.{i}"
    return [
        ("enter", Place("x_embedder")),
        *COMMON,
        *joint_block("doubles.{i}", "transformer_blocks.{i}"),
        (f"{ours}.modulation.linear", Place(f"{theirs}.norm.linear")),
        *((f"{ours}.attention.{each}", Place(f"{theirs}.attn.to_{each}")) for each in "qkv"),
        (f"{ours}.attention.norm_q", Place(f"{theirs}.attn.norm_q")),
        (f"{ours}.attention.norm_k", Place(f"{theirs}.attn.norm_k")),
        (f"{ours}.up", Place(f"{theirs}.proj_mlp")),
        (f"{ours}.down", Place(f"{theirs}.proj_out")),
    ]


def original_rules() -> list[Rule]:
    """Return where our weights stand in a file of the original layout."""
    rules: list[Rule] = [
        ("enter", Place("img_in")),
        ("text", Place("txt_in")),
        ("modulation.linear", Place("final_layer.adaLN_modulation.1")),
        ("leave", Place("final_layer.linear")),
    ]
    for own, name in (("time", "time_in"), ("guidance", "guidance_in"), ("pooled", "vector_in")):
        rules += [
            (f"{own}.up", Place(f"{name}.in_layer")),
            (f"{own}.down", Place(f"{name}.out_layer")),
        ]
    for own, name in (("image", "img"), ("text", "txt")):
        ours, theirs = f"doubles.{{i}}.{own}", f"double_blocks.{{i}}.{name}"
        rules += [(f"{ours}.modulation.linear", Place(f"{theirs}_mod.lin"))]
        rules += [
            (f"{ours}.attention.{each}", Place(f"{theirs}_attn.qkv", i, i + 1, 3))
            for i, each in enumerate("qkv")
        ]
        rules += _norms(f"{ours}.attention", f"{theirs}_attn.norm")
        rules += [
            (f"{ours}.attention.out", Place(f"{theirs}_attn.proj")),
            (f"{ours}.up", Place(f"{theirs}_mlp.0")),
            (f"{ours}.down", Place(f"{theirs}_mlp.2")),
        ]
    ours, theirs = "singles.{i}", "single_blocks.{i}"
    rules += [(f"{ours}.modulation.linear", Place(f"{theirs}.modulation.lin"))]
    rules += [
        (f"{ours}.attention.{each}", Place(f"{theirs}.linear1", i, i + 1, 7))
        for i, each in enumerate("qkv")
    ]
    rules += _norms(f"{ours}.attention", f"{theirs}.norm")
    rules += [
        (f"{ours}.up", Place(f"{theirs}.linear1", 3, 7, 7)),
        (f"{ours}.down", Place(f"{theirs}.linear2")),
    ]
    return rules


def _norms(ours: str, theirs: str) -> list[Rule]:
    return [
        (f"{ours}.norm_q.weight", Place(f"{theirs}.query_norm.scale")),
        (f"{ours}.norm_k.weight", Place(f"{theirs}.key_norm.scale")),
    ]


def from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the arguments of `Flux` that a folder's `transformer/config.json` says.

    Raises:
        UserError: it asks for what our network is not.
    """
    channels, made = config["in_channels"], config.get("out_channels")
    for what, seen, expected in (
        ("out_channels", made, [None, channels]),
        ("patch_size", config.get("patch_size", 1), [1]),
    ):
        if seen not in expected:
            listed = " or ".join(repr(each) for each in expected)
            raise UserError(
                f"{where} has {what} {seen!r}; expected {listed}. Of FLUX.1 dev, schnell and what "
                "is made of them are supported, not Fill, Canny or Depth"
            )
    heads = config["num_attention_heads"]
    return {
        "channels": channels // PATCH**2,
        "patch": PATCH,
        "width": heads * config["attention_head_dim"],
        "depth": config["num_layers"],
        "singles": config["num_single_layers"],
        "heads": heads,
        "text_dim": config["joint_attention_dim"],
        "pooled_dim": config["pooled_projection_dim"],
        "axes": tuple(config.get("axes_dims_rope") or (16, 56, 56)),
        "guided": bool(config.get("guidance_embeds")),
    }


def to_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return diffusers' `config.json` of arguments of `Flux`: `from_config` undone."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config["channels"] * config["patch"] ** 2,
        "num_layers": config["depth"],
        "num_single_layers": config["singles"],
        "num_attention_heads": config["heads"],
        "attention_head_dim": config["width"] // config["heads"],
        "joint_attention_dim": config["text_dim"],
        "pooled_projection_dim": config["pooled_dim"],
        "axes_dims_rope": list(config["axes"]),
        "guidance_embeds": config["guided"],
    }


def from_shapes(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of `Flux` that the shapes in an original file say.

    The shares of t, y and x in a head's dimensions are not among them: an eighth is for t, as in
    every published model, and half of the rest for each of y and x.

    Args:
        shapes: of the tensors of the transformer, without what stands before all names.

    Raises:
        UserError: it takes in more channels than it gives out.
    """
    width, taken = shapes["img_in.weight"]
    made = shapes["final_layer.linear.weight"][0]
    if taken != made:
        raise UserError(
            f"img_in takes {taken} channels and final_layer gives {made}; of FLUX.1 dev, schnell "
            "and what is made of them are supported, not Fill, Canny or Depth"
        )
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    return {
        "channels": taken // PATCH**2,
        "patch": PATCH,
        "width": width,
        "depth": len(numbers(shapes, r"double_blocks\.(\d+)\.")),
        "singles": len(numbers(shapes, r"single_blocks\.(\d+)\.")),
        "heads": width // head,
        "text_dim": shapes["txt_in.weight"][1],
        "pooled_dim": shapes["vector_in.in_layer.weight"][1],
        "axes": (head // 8, head * 7 // 16, head * 7 // 16),
        "guided": "guidance_in.in_layer.weight" in shapes,
    }
