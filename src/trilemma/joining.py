"""Trained runs joined to one model: prior, decoder and upsampler of unCLIP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trilemma import checkpoint, recipe
from trilemma.conditioning import source_of
from trilemma.errors import UserError
from trilemma.models.unclip import UnCLIP


def join(
    prior: str | Path, decoder: str | Path, upsampler: str | Path | None, out: str | Path
) -> Path:
    """Write an UnCLIP of trained parts as a run that can be sampled and shared.

    Args:
        prior: a run of unclip-prior or unclip-prior-ar.
        decoder: a run of unclip-decoder, over the same CLIP.
        upsampler: a run of super-resolution that enlarges the decoder's pictures; or None.
        out: the folder of the new run.

    Returns:
        its `model.safetensors`.

    Raises:
        UserError: a run that is not of the kind, over another CLIP, or of other pictures; `out`
            holds a run.
    """
    path = Path(out) / "model.safetensors"
    if path.exists() or Path(out).is_file():
        seen = "is a file" if Path(out).is_file() else "holds a run"
        raise UserError(f"{out} {seen}; choose another --out")
    parts: dict[str, Any] = {"prior": prior, "decoder": decoder, "upsampler": upsampler}
    read = {name: checkpoint.read_model(run) for name, run in parts.items() if run is not None}
    spec: dict[str, Any] = {"type": "models.unclip.UnCLIP"}
    weights: dict[str, torch.Tensor] = {}
    for name, (tensors, facts) in read.items():
        spec[name] = {"type": "model.Frozen", "module": facts["recipe"]["model"]}
        weights |= {f"{name}.module.{key}": tensor for key, tensor in tensors.items()}
    model = recipe.build(spec)
    _check_clip(read["prior"][0], read["decoder"][0], prior, decoder)
    checkpoint.load_weights(model, weights, str(decoder))
    facts = read["decoder"][1]
    drawn = facts["data"]["shape"]
    if upsampler is not None:
        _check_upsampler(model, drawn, upsampler)
        drawn = read["upsampler"][1]["data"]["shape"]
    about = {
        "summary": "Draws by words: a prior, a decoder and an upsampler over CLIP's embeddings",
        "paper": "Ramesh et al. 2022",
        "family": "unclip",
        "needs": [],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    made = {
        "about": about,
        "model": spec,
        "train": {"precision": facts["recipe"]["train"].get("precision", "auto")},
        "sample": {},
        "run": {**facts["recipe"]["run"], "recipe": "unclip"},
    }
    data = {**read["prior"][1]["data"], "shape": drawn}
    told = {"recipe": made, "data": data, "progress": facts["progress"]}
    checkpoint.write(path, model.state_dict(), told)
    return path


def _check_clip(
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    prior: str | Path,
    decoder: str | Path,
) -> None:
    """Raise UserError unless the weights of prior and decoder have one CLIP among them."""
    mark = ".clip.module."
    ours, theirs = (
        {key.partition(mark)[2]: tensor for key, tensor in each.items() if mark in key}
        for each in (ours, theirs)
    )
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
        raise UserError(
            f"{prior} and {decoder} were trained over different CLIPs, so one draws embeddings "
            "that the other does not know; train both with the same clip run"
        )


def _check_upsampler(model: UnCLIP, drawn: list[int], upsampler: str | Path) -> None:
    """Raise UserError unless the upsampler reads pictures as the decoder draws them."""
    assert model.upsampler is not None
    part = source_of(model.upsampler.module)
    if part is None or part.kind != "small" or list(part.shape) != list(drawn):
        reads = "no pictures" if part is None else f"{part.kind} ones of {list(part.shape)}"
        raise UserError(
            f"the decoder draws pictures of {list(drawn)} and {upsampler} reads {reads}; train "
            "super-resolution at a multiple of the decoder's size, with its factor"
        )
