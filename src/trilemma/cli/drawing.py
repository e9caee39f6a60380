"""What draws pictures of nothing but words, labels and seeds; and hands a model on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from trilemma.cli.shared import (
    Device,
    Grid,
    Guidance,
    Json,
    Lora,
    Option,
    Run,
    Seed,
    Solver,
    Steps,
    app,
    lines,
    numbers,
    options,
    pixels,
    say,
    screen,
)
from trilemma.errors import UserError


@app.command()
def sample(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run folder, its model.safetensors, or a packaged model; or Stable Diffusion 1, "
            "2, XL or 3, or FLUX.1: a diffusers folder, or one .safetensors file."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder for the pictures.", show_default=False)],
    n: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--n",
            min=1,
            help="How many.",
            show_default="64; 16 of a text, 1 of each of several; 1 of Stable Diffusion",
        ),
    ] = None,
    seed: Seed = 0,
    label: Annotated[
        str | None, typer.Option(help="A class, by name or index.", show_default="each in turn")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to begin from.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="0 to 1: how far it is given up.", show_default="0.8; 1 with a mask"),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A picture, white where to draw, black where to keep.")
    ] = None,
    picture_size: Annotated[
        str | None,
        typer.Option(
            "--size", metavar="WIDTHxHEIGHT", help="In pixels.", show_default="as it was trained on"
        ),
    ] = None,
    attributes: Annotated[
        str | None,
        typer.Option(
            help="Attributes to have, no others: Smiling,Male.", show_default="as in the data"
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="What to draw, of a model that reads words; several: in turn."),
    ] = None,
    text_file: Annotated[
        Path | None, typer.Option(help="The same from a file, one text a line.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What not to draw; with a guidance above 1.")
    ] = None,
    steps: Steps = None,
    solver: Solver = None,
    grid: Grid = None,
    guidance: Guidance = None,
    guidance_interval: Annotated[
        str | None,
        typer.Option(metavar="LOW,HIGH", help="Guide only where sigma / alpha is between: 0.2,3."),
    ] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="0 to 1: take back the contrast that guidance adds.")
    ] = None,
    reuse_blocks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of a checkpoint: compute its deep blocks in one step of so many only."
        ),
    ] = None,
    merge_tokens: Annotated[
        float | None,
        typer.Option(
            help="Of Stable Diffusion 1, 2 and XL: 0 to 0.75, the share of the tokens merged for "
            "the largest attentions."
        ),
    ] = None,
    guide_with: Annotated[
        str | None, typer.Option(metavar="RUN", help="Guide by the difference to a weaker model.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(metavar="RUN", help="Guide by a run of the recipe classifier.")
    ] = None,
    classifier_scale: Annotated[
        float | None, typer.Option(help="Strength of that.", show_default="1")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Guide towards --text by a run of the recipe clip."),
    ] = None,
    clip_scale: Annotated[
        float | None, typer.Option(help="Strength of that.", show_default="1")
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Guide by any differentiable function of pictures: trilemma.guides:symmetry.",
        ),
    ] = None,
    guide_scale: Annotated[
        float | None, typer.Option(help="Strength of that.", show_default="1")
    ] = None,
    lora: Lora = None,
    option: Option = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pictures drawn at once.",
            show_default="128, or what memory has room for; 1 of Stable Diffusion",
        ),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw pictures from a trained model, as numbered PNGs and a grid."""
    chosen: dict[str, Any] = {
        "steps": steps,
        "solver": solver,
        "grid": grid,
        "guidance": guidance,
        "guidance_interval": guidance_interval and numbers(guidance_interval),
        "guidance_rescale": guidance_rescale,
        "guide_with": guide_with,
        "classifier": classifier,
        "classifier_scale": classifier_scale,
        "guide": guide,
        "guide_scale": guide_scale,
        "negative": negative,
        "clip": clip,
        "clip_scale": clip_scale,
        **options(option),
    }
    from rich.progress import track

    from trilemma import drawing, sampling
    from trilemma.stable import load as checkpoints

    texts = [*(text or []), *(lines(text_file) if text_file else [])]
    of_checkpoints = {"image": image, "strength": strength, "mask": mask}
    of_checkpoints |= {"reuse_blocks": reuse_blocks, "merge_tokens": merge_tokens}
    if checkpoints.recognises(run):
        n = n or 1
        chosen |= {"label": label, "attributes": attributes, "lora": lora, **of_checkpoints}
        chosen["size"] = picture_size
        chosen["text"] = texts
        paths = _checkpoint(run, out, n, seed, batch or 1, device, chosen)
    else:
        for name, value in of_checkpoints.items():
            if value is not None:
                option_name = name.replace("_", "-")
                raise UserError(
                    f"{run} is a run, which --{option_name} says nothing to; leave it out"
                )
        trained = sampling.load(run, device, lora or ())
        if picture_size is not None:
            chosen["size"] = list(pixels(picture_size)[::-1])  # height and width
        if attributes is not None:
            chosen["attributes"] = [name.strip() for name in attributes.split(",") if name.strip()]
        if texts or text_file is not None:
            chosen["text"] = texts
        n = n or (64 if not texts else 16 if len(texts) == 1 else len(texts))
        paths = drawing.save(trained, n, out, seed=seed, label=label, batch=batch, **chosen)
    drawn = list(track(paths, "drawing", total=n + 1, console=screen, transient=True))
    if as_json:
        say({"images": [str(path) for path in drawn[:-1]], "grid": str(drawn[-1])})
    else:
        screen.print(f"{n} pictures in {out}, all on one sheet in {drawn[-1]}")


def _checkpoint(
    path: Path,
    out: Path,
    n: int,
    seed: int,
    batch: int,
    device: str | None,
    chosen: dict[str, Any],
) -> Iterator[Path]:
    """Draw from a Stable Diffusion checkpoint; yield the pictures' paths.

    Raises:
        UserError: an option that says nothing to a checkpoint.
    """
    from trilemma.stable import drawing, load

    given = {key: value for key, value in chosen.items() if value is not None}
    asked = {
        "loras": given.pop("lora", []),
        "precision": given.pop("precision", "auto"),
        "prediction": given.pop("prediction", None),
        "parts": given.pop("parts", None),
    }
    told = {"lora": asked["loras"], "prediction": asked["prediction"]}
    tiny, size, texts = given.pop("preview", None), given.pop("size", None), given.pop("text", [])
    stable = load.load(path, device, **asked)
    takes = drawing.takes(stable)
    if unknown := given.keys() - takes:
        raise UserError(
            f"{path} cannot be sampled with {', '.join(sorted(unknown))}; this checkpoint takes "
            f"text, size, lora, {', '.join(takes)}, and the options preview, precision, prediction "
            "and parts"
        )
    preview = None if tiny is None else load.tiny(tiny, stable)
    given |= {"size": None if size is None else pixels(size), "preview": preview, "told": told}
    return drawing.save(stable, path, texts, out, n=n, seed=seed, batch=batch, **given)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    to: Annotated[str, typer.Option(help="The form: diffusers.")] = "diffusers",
    as_json: Json = False,
) -> None:
    """Write a trained diffusion model as another library loads it."""
    if to != "diffusers":
        raise typer.BadParameter(f"'{to}' is not known; expected diffusers", param_hint="--to")
    from trilemma import sampling
    from trilemma.export import to_diffusers

    made = to_diffusers(sampling.load(run, "cpu"), out)
    if as_json:
        say({"folder": str(made)})
    else:
        screen.print(f"written to {made}: diffusers.DiffusionPipeline.from_pretrained('{made}')")
