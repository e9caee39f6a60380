"""Checkpoints from elsewhere: `trilemma finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli.shared import Data, Device, Json, Seed, Size, app, say, screen


@app.command()
def finetune(
    path: Annotated[
        Path,
        typer.Argument(
            help="Stable Diffusion 1, 2, XL or 3, or FLUX.1: a diffusers folder, or one "
            ".safetensors file."
        ),
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder for the result.", show_default=False)],
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA's factors.")] = 16,
    full: Annotated[
        bool, typer.Option("--full", help="Let all weights of the network learn, and write them.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimizer.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a step.")] = 1,
    rate: Annotated[
        float | None,
        typer.Option(help="Learning rate.", show_default="1e-4 of a LoRA, 1e-5 of all weights"),
    ] = None,
    dropout: Annotated[float, typer.Option(help="Share of captions left out.")] = 0.1,
    size: Size = None,
    buckets: Annotated[
        bool,
        typer.Option(
            "--buckets", help="Keep pictures near their proportions; else cut squares out of them."
        ),
    ] = False,
    parts: Annotated[
        Path | None, typer.Option(help="A diffusers folder, for what a single file lacks.")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    recompute: Annotated[
        bool, typer.Option(help="Keep only blocks' inputs: less memory, a third more time.")
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the fine-tuning in --out.")
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a checkpoint on captioned pictures: a LoRA that diffusers loads, or all weights."""
    from rich.progress import track

    from trilemma.stable.finetune import LORA_FILE, Tuning, tune

    tuning = Tuning(
        steps=steps,
        batch=batch,
        rate=rate,
        rank=None if full else rank,
        dropout=dropout,
        seed=seed,
        recompute=recompute,
    )
    told = tune(
        path,
        data,
        out,
        tuning,
        size=size,
        buckets=buckets,
        device_name=device,
        precision=precision,
        parts=parts,
        resume=resume,
    )
    shown = track(told, "learning", total=steps, console=screen, transient=True)
    losses = [loss for _, loss in shown]
    result = out if full else out / LORA_FILE
    if as_json:
        say({"result": str(result), "loss": losses[-1] if losses else None})
    else:
        asked = f"{out}" if full else f"{path} --lora {result}"
        screen.print(f'next: trilemma sample {asked} --text "..." --out pictures', soft_wrap=True)
