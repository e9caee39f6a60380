"""The verbs of `trilemma edit` that draw pictures anew: by a diffusion model, or by unCLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trilemma.cli.shared import (
    Device,
    Guidance,
    Json,
    Option,
    OutFolder,
    Pictures,
    Run,
    Seed,
    Solver,
    Steps,
    edit_app,
    options,
    read,
    save_rows,
    track,
    wrote,
)
from trilemma.errors import UserError

Each = Annotated[int, typer.Option("-n", "--n", min=1, help="Pictures drawn of each.")]
Label = Annotated[str | None, typer.Option(help="A class.", show_default="nothing is said")]
Text = Annotated[
    list[str] | None,
    typer.Option(help="What to draw, of a model that reads words; several: in turn."),
]
Negative = Annotated[str | None, typer.Option(help="What not to draw; with a guidance above 1.")]
Resample = Annotated[
    int | None, typer.Option(min=1, help="How often each step is taken.", show_default="10")
]


def _loaded(run: Path, device: str | None) -> Any:
    """Load a run; raises UserError for a checkpoint from elsewhere, with the command for that."""
    from trilemma import sampling
    from trilemma.stable import load

    if load.recognises(run):
        raise UserError(
            f"{run} is a checkpoint from elsewhere, which changes pictures in trilemma sample: "
            f'trilemma sample {run} --image PICTURE --strength 0.8 --text "..." --out DIR, with '
            "--mask MASK for a part of it"
        )
    return sampling.load(run, device)


@edit_app.command("vary")
def edit_vary(
    run: Run,
    pictures: Pictures,
    out: OutFolder,
    strength: Annotated[float, typer.Option(help="Above 0; 1 keeps nothing of the picture.")] = 0.6,
    n: Each = 4,
    seed: Seed = 0,
    label: Label = None,
    text: Text = None,
    negative: Negative = None,
    steps: Steps = None,
    solver: Solver = None,
    guidance: Guidance = None,
    option: Option = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw pictures that are like the given ones; with --label, of another class.

    A row of the sheet is the picture and its variations.
    """
    from trilemma import redraw

    trained = _loaded(run, device)
    names, images = read(trained, pictures)
    chosen = options(option, steps=steps, solver=solver, guidance=guidance, negative=negative)
    said: dict[str, Any] = {"label": label, "text": text or None}
    made = redraw.vary(trained, images, strength, n, seed=seed, **said, track=track, **chosen)
    facts: dict[str, Any] = {"edit": "vary", "pictures": names, "strength": strength, "seed": seed}
    facts |= {**said, "sample": redraw.told(trained, chosen, **said)}
    save_rows(trained, made, out, facts, as_json, before=images)


@edit_app.command("inpaint")
def edit_inpaint(
    run: Run,
    pictures: Pictures,
    out: OutFolder,
    mask: Annotated[
        Path,
        typer.Option(
            help="A picture of the same proportions, white (or, if it has transparency, "
            "transparent) where to draw.",
            show_default=False,
        ),
    ],
    n: Each = 4,
    seed: Seed = 0,
    label: Label = None,
    text: Text = None,
    negative: Negative = None,
    steps: Steps = None,
    resample: Resample = None,
    guidance: Guidance = None,
    option: Option = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw what a mask hides; the rest stays as it is.

    A row of the sheet is what is given, what was drawn, and the original.
    """
    import torch

    from trilemma import redraw

    trained = _loaded(run, device)
    names, images = read(trained, pictures)
    hidden = redraw.read_mask(mask, pictures, images.shape[2])
    chosen = options(option, steps=steps, resample=resample, guidance=guidance, negative=negative)
    said: dict[str, Any] = {"label": label, "text": text or None}
    made = redraw.inpaint(trained, images, hidden, n, seed=seed, **said, track=track, **chosen)
    facts: dict[str, Any] = {"edit": "inpaint", "pictures": names, "mask": str(mask), "seed": seed}
    facts |= {**said, "sample": redraw.told(trained, chosen, **said, verb="inpaint")}
    given = torch.where(hidden, 128, images)
    save_rows(trained, made, out, facts, as_json, before=given, after=images)


@edit_app.command("outpaint")
def edit_outpaint(
    run: Run,
    pictures: Pictures,
    out: OutFolder,
    top: Annotated[int, typer.Option(min=0, help="Pixels to add, of the model's size.")] = 0,
    bottom: Annotated[int, typer.Option(min=0)] = 0,
    left: Annotated[int, typer.Option(min=0)] = 0,
    right: Annotated[int, typer.Option(min=0)] = 0,
    n: Each = 1,
    seed: Seed = 0,
    label: Label = None,
    text: Text = None,
    negative: Negative = None,
    steps: Steps = None,
    resample: Resample = None,
    guidance: Guidance = None,
    option: Option = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Extend the canvas: draw what is beyond the borders."""
    from trilemma import edit, redraw

    trained = _loaded(run, device)
    names, images = read(trained, pictures)
    chosen = options(option, steps=steps, resample=resample, guidance=guidance, negative=negative)
    said: dict[str, Any] = {"label": label, "text": text or None}
    margins = (top, bottom, left, right)
    made = redraw.outpaint(trained, images, margins, n, seed=seed, **said, track=track, **chosen)
    facts: dict[str, Any] = {"edit": "outpaint", "pictures": names, "margins": margins}
    facts |= {"seed": seed, **said, "sample": redraw.told(trained, chosen, **said, verb="inpaint")}
    wrote(edit.save(trained, made.flatten(0, 1), out, facts, columns=max(n, 4)), as_json)


@edit_app.command("repair")
def edit_repair(
    run: Run,
    pictures: Pictures,
    out: OutFolder,
    n: Each = 1,
    seed: Seed = 0,
    label: Label = None,
    text: Text = None,
    negative: Negative = None,
    steps: Steps = None,
    solver: Solver = None,
    guidance: Guidance = None,
    option: Option = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw what pictures lack, by a model trained to: colours of grey ones, detail of small ones.

    A row of the sheet is what is given and what was drawn.
    """
    import torch
    import torch.nn.functional as F

    from trilemma import edit, redraw, sampling

    trained = sampling.load(run, device)
    part = redraw.source(trained)
    names, sources = read(trained, pictures, part.shape)
    chosen = options(option, steps=steps, solver=solver, guidance=guidance, negative=negative)
    said: dict[str, Any] = {"label": label, "text": text or None}
    made = redraw.repair(trained, sources, n, seed=seed, **said, track=track, **chosen)
    facts: dict[str, Any] = {"edit": "repair", "pictures": names, "source": part.kind}
    facts |= {"seed": seed, **said, "sample": redraw.told(trained, chosen, **said)}
    given = F.interpolate(sources, made.shape[3:]).expand(-1, made.shape[2], -1, -1)
    sheet = torch.cat([given[:, None], made], 1)[:64].flatten(0, 1)
    columns = (n + 1) * max(1, 8 // (n + 1))
    wrote(edit.save(trained, made.flatten(0, 1), out, facts, columns, sheet), as_json)


@edit_app.command("variations")
def edit_variations(
    run: Run,
    pictures: Pictures,
    out: OutFolder,
    n: Each = 4,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    option: Option = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw pictures that mean the same to CLIP, by unCLIP or its decoder.

    A row of the sheet is the picture and its variations.
    """
    from trilemma import sampling, variation

    trained = sampling.load(run, device)
    names, images = read(trained, pictures)
    chosen = options(option, steps=steps, guidance=guidance)
    made = variation.variations(trained, images, n, seed=seed, track=track, **chosen)
    facts: dict[str, Any] = {"edit": "variations", "pictures": names, "seed": seed}
    save_rows(trained, made, out, facts, as_json, before=images)


@edit_app.command("blend")
def edit_blend(
    run: Run,
    first: Annotated[str, typer.Argument(help="A picture, or a folder or zip of them.")],
    second: Annotated[str, typer.Argument(help="As many pictures, to which the ways lead.")],
    out: OutFolder,
    n: Annotated[int, typer.Option("-n", "--n", min=2, help="Pictures on each way.")] = 8,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    option: Option = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Walk from each picture to another in CLIP's space, by unCLIP; a row of the sheet each."""
    from trilemma import sampling, variation

    trained = sampling.load(run, device)
    (names, images), (others, targets) = read(trained, first), read(trained, second)
    chosen = options(option, steps=steps, guidance=guidance)
    made = variation.blend(trained, images, targets, n, seed=seed, track=track, **chosen)
    facts = {"edit": "blend", "first": names, "second": others, "seed": seed}
    save_rows(trained, made, out, facts, as_json)


@edit_app.command("change")
def edit_change(
    run: Run,
    pictures: Pictures,
    out: OutFolder,
    before: Annotated[str, typer.Option("--from", help="What they are: 'a red heart'.")],
    after: Annotated[str, typer.Option("--to", help="What they shall be: 'a blue heart'.")],
    n: Annotated[int, typer.Option("-n", "--n", min=2, help="Pictures on each way.")] = 5,
    strength: Annotated[float, typer.Option(help="How far, above 0 and at most 1.")] = 0.5,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    option: Option = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Change pictures by words, by unCLIP; a row of the sheet is the way from none to most."""
    from trilemma import sampling, variation

    trained = sampling.load(run, device)
    names, images = read(trained, pictures)
    chosen = options(option, steps=steps, guidance=guidance)
    made = variation.change(
        trained, images, before, after, n, strength, seed=seed, track=track, **chosen
    )
    facts: dict[str, Any] = {"edit": "change", "pictures": names, "from": before, "to": after}
    facts |= {"strength": strength, "seed": seed}
    save_rows(trained, made, out, facts, as_json)
