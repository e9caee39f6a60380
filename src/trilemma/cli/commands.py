"""Every command but the verbs of `edit`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from trilemma.cli.shared import (
    Changes,
    Data,
    Device,
    Features,
    Grid,
    Guidance,
    Json,
    Option,
    OutFolder,
    Pictures,
    Run,
    Seed,
    Size,
    Solver,
    Steps,
    app,
    data_app,
    duration,
    number,
    numbers,
    options,
    pixels,
    read,
    say,
    screen,
    track,
    wrote,
)
from trilemma.errors import UserError


@app.command()
def models(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="Only these.", show_default="all")
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Count parameters, operations and memory of the networks."),
    ] = False,
    size: Annotated[
        int | None,
        typer.Option(min=4, help="Of the pictures to profile.", show_default="the recipe's own"),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the packaged recipes: what each is, what data it needs, what it is for."""
    from trilemma import recipe

    chosen = recipes or recipe.names()
    if profile:
        _profile(chosen, size, as_json)
        return
    rows = [{"name": name, **recipe.load(name)["about"]} for name in chosen]
    if as_json:
        say(rows)
        return
    from rich.table import Table

    from trilemma.log import count

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("recipe", "family", "weights", "needs", "what it is for, and its paper"):
        table.add_column(title, no_wrap=title in ("recipe", "family"))
    for row in rows:
        needs = ", ".join(row["needs"]) or "pictures"
        told = f"{row['summary']}\n[dim]{row['paper']}[/]"
        table.add_row(row["name"], row["family"], count(row["parameters"]), needs, told)
    Console(highlight=False).print(table)


def _profile(recipes: list[str], size: int | None, as_json: bool) -> None:
    """Show what the networks of recipes take; of several, those that cannot be built say why."""
    from trilemma.profile import profile

    rows = []
    for name in track(recipes):
        try:
            rows.append(profile(name, size))
        except UserError as error:
            if len(recipes) == 1:
                raise
            screen.print(f"left out: {name}: {error}", markup=False)
    if as_json:
        say(rows)
        return
    from rich.table import Table

    from trilemma.log import count

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("recipe", "pixels", "network", "parameters", "FLOPs", "activations"):
        table.add_column(title, no_wrap=True, justify="left" if title == "recipe" else "right")
    for row in rows:
        place, step = (row["recipe"], f"{row['size']}"), row["step"]
        parts = [(f"{part['name']}: {part['type']}", part) for part in row["networks"]]
        parts += [("training step", {"parameters": row["parameters"], **step})]
        for told, part in parts:
            taken = [count(part[key]) for key in ("parameters", "flops", "activations")]
            table.add_row(*place, told, *taken, end_section=part is parts[-1][1])
            place = "", ""
    Console(highlight=False).print(table)
    screen.print(
        "For one picture of 3 channels; a multiply-add is 2 FLOPs, activations are float32 bytes."
    )


@data_app.command("check")
def data_check(
    path: Annotated[str, typer.Argument(help="A folder or zip of pictures, or a named set.")],
    as_json: Json = False,
) -> None:
    """Say what a folder holds: its layout, sizes, classes, captions, duplicates and bad files."""
    from trilemma import data

    report = data.check(path)
    if as_json:
        say(report)
    else:
        print(data.describe(report))  # file names may hold what rich takes for markup


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (see `models`) or .toml file.")],
    data: Data,
    size: Size = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/RECIPE")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Train for this long: 90s, 10m, 1h30m.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="Or for so many images: 500k, 2M.")] = None,
    steps: Annotated[str | None, typer.Option(help="Or for so many steps: 20000.")] = None,
    seed: Seed = 0,
    changes: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    init: Annotated[Path | None, typer.Option(help="Start from the weights of this run.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a recipe on pictures."""
    from trilemma.training import train as run

    trained = run(
        recipe,
        data,
        out=out,
        size=size,
        budget=None if budget is None else duration(budget),
        images=None if images is None else number(images),
        steps=None if steps is None else number(steps),
        seed=seed,
        overrides=changes or (),
        resume=resume,
        init=init,
        device_name=device,
    )
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks for all
        return
    if as_json:
        say({"run": str(trained.path), "recipe": trained.name, **trained.progress})
    else:
        asked = f"sample {trained.path} -n 64"
        if trained.translates:
            asked = f"translate {trained.path} PICTURES"
        elif trained.enlarges:
            asked = f"upscale {trained.path} PICTURES"
        elif trained.repairs:
            asked = f"edit repair {trained.path} PICTURES"
        elif trained.classifies:
            asked = f"sample DIFFUSION_RUN --classifier {trained.path}"
        elif not trained.draws:
            asked = f"edit reconstruct {trained.path} PICTURES"
        screen.print(f"next: trilemma {asked} --out {trained.path}/pictures", soft_wrap=True)


@app.command()
def sample(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run folder, or its model.safetensors; or Stable Diffusion 1, 2 or XL: a "
            "diffusers folder, or one .safetensors file."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder for the pictures.", show_default=False)],
    n: Annotated[
        int | None,
        typer.Option(
            "-n", "--n", min=1, help="How many.", show_default="64; 1 of Stable Diffusion"
        ),
    ] = None,
    seed: Seed = 0,
    label: Annotated[
        str | None, typer.Option(help="A class, by name or index.", show_default="each in turn")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="What to draw, of Stable Diffusion; several: in turn.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to begin from.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="0 to 1: how far it is given up.", show_default="0.8; 1 with a mask"),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A picture, white where to draw, black where to keep.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE:WEIGHT", help="A LoRA to add; several: all.")
    ] = None,
    picture_size: Annotated[
        str | None,
        typer.Option(
            "--size", metavar="WIDTHxHEIGHT", help="In pixels.", show_default="the checkpoint's own"
        ),
    ] = None,
    attributes: Annotated[
        str | None,
        typer.Option(
            help="Attributes to have, no others: Smiling,Male.", show_default="as in the data"
        ),
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
    guide_with: Annotated[
        str | None, typer.Option(metavar="RUN", help="Guide by the difference to a weaker model.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(metavar="RUN", help="Guide by a run of the recipe classifier.")
    ] = None,
    classifier_scale: Annotated[
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
    option: Option = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pictures drawn at once.", show_default="128; 1 of Stable Diffusion"
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
        **options(option or []),
    }
    from rich.progress import track

    from trilemma import sampling
    from trilemma.stable import load as checkpoints

    of_text: dict[str, Any] = {"text": text, "negative": negative, "size": picture_size}
    of_text |= {"image": image, "strength": strength, "mask": mask, "lora": lora}
    if checkpoints.recognises(run):
        n = n or 1
        chosen |= {"label": label, "attributes": attributes, **of_text}
        paths = _checkpoint(run, out, n, seed, batch or 1, device, chosen)
    else:
        n = n or 64
        for name, value in of_text.items():
            if value:
                raise UserError(f"{run} is a run, which --{name} says nothing to; leave it out")
        trained = sampling.load(run, device)
        if attributes is not None:
            chosen["attributes"] = [name.strip() for name in attributes.split(",") if name.strip()]
        paths = sampling.save(trained, n, out, seed=seed, label=label, batch=batch or 128, **chosen)
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
    }
    if "guidance_rescale" in given:
        given["rescale"] = given.pop("guidance_rescale")
    told = {"lora": asked["loras"], "prediction": asked["prediction"]}
    tiny, size, texts = given.pop("preview", None), given.pop("size", None), given.pop("text", [])
    plain = ("image", "mask", "negative", "strength", "steps", "solver", "guidance", "rescale")
    options = {key: given.pop(key) for key in plain if key in given}
    if given:
        raise UserError(
            f"{path} cannot be sampled with {', '.join(given)}; a checkpoint takes text, size, "
            f"lora, {', '.join(plain)}, and the options preview, precision and prediction"
        )
    stable = load.load(path, device, **asked)
    preview = None if tiny is None else load.tiny(tiny, stable)
    options |= {"size": None if size is None else pixels(size), "preview": preview, "told": told}
    return drawing.save(stable, path, texts, out, n=n, seed=seed, batch=batch, **options)


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


@app.command("tune-steps")
def tune_steps(
    run: Run,
    calls: Annotated[int, typer.Option(min=1, help="Network calls for each picture.")] = 10,
    solver: Solver = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Noises to fit to.")] = 64,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the times at which few steps come closest to many, and keep them in the run."""
    from trilemma import tuning

    with screen.status("tuning"):
        told = tuning.tune_steps(run, calls, solver=solver, n=n, seed=seed, device_name=device)
    if as_json:
        say(told)
        return
    print(f"{told['solver']}, {told['steps']} steps: distance from {tuning.REFERENCE} steps")
    for name, distance in told["distances"].items():
        print(f"  {name:14}{distance:.5f}{' (its own)' * (name == told['own'])}")
    asked = f"trilemma sample {run} --solver {told['solver']} --steps {told['steps']}"
    if told["kept"]:
        screen.print(f"kept in the run: {asked} now uses the tuned grid")
    else:
        screen.print("no better than the best of those named: not kept")


@app.command()
def translate(
    run: Run,
    pictures: Pictures,
    out: OutFolder,
    direction: Annotated[str, typer.Option(help="a-to-b (of trainA and trainB) or b-to-a.")] = (
        "a-to-b"
    ),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Translate pictures into the other domain. The sheet shows each beside its translation."""
    import torch

    from trilemma import edit, sampling, translation

    trained = sampling.load(run, device)
    names, images = read(trained, pictures)
    made = translation.translate(trained, images, direction)
    facts = {"translate": direction, "pictures": names}
    paths = edit.save(trained, made, out, facts, columns=8)
    pairs = torch.stack([images, made], 1).flatten(0, 1)
    sampling.grid(pairs[:128], 8).save(paths[-1])
    wrote(paths, as_json)


@app.command()
def upscale(
    run: Run, pictures: Pictures, out: OutFolder, device: Device = None, as_json: Json = False
) -> None:
    """Enlarge pictures of any size by the model's factor, under their own names."""
    from trilemma import sampling
    from trilemma import upscale as upscaling

    paths, skipped = upscaling.upscale(sampling.load(run, device), pictures, out)
    for name, reason in skipped.items():
        screen.print(f"left out: {name}: {reason}", markup=False)
    if as_json:
        say({"images": [str(path) for path in paths]})
    else:
        screen.print(f"{len(paths)} pictures in {out}")


@app.command()
def score(run: Run, pictures: Pictures, device: Device = None, as_json: Json = False) -> None:
    """Say which pictures the model finds strange, the strangest first: anomaly detection."""
    from trilemma import edit, sampling

    trained = sampling.load(run, device)
    names, images = read(trained, pictures)
    scores, measure = edit.score(trained, images, track)
    rows = sorted(zip(scores.tolist(), names, strict=True), reverse=True)
    if as_json:
        listed = [{"picture": name, "score": value} for value, name in rows]
        say({"measure": measure, "scores": listed})
        return
    print(f"{measure}, highest is strangest")
    for value, name in rows:
        print(f"{value:10.3f}  {name}")


@app.command()
def evaluate(
    what: Annotated[Path, typer.Argument(help="A run, a folder or zip of pictures, or an .npz.")],
    data: Data,
    n: Annotated[int, typer.Option("-n", "--n", min=2, help="Pictures to draw.")] = 5000,
    split: Annotated[str, typer.Option(help="The part of the data to compare with.")] = "test",
    features: Features = "lite0",
    seed: Seed = 0,
    steps: Steps = None,
    solver: Solver = None,
    guidance: Guidance = None,
    option: Option = None,
    likelihood: Annotated[
        bool, typer.Option("--likelihood", help="Bits per dimension of diffusion models too: slow.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure quality, coverage, memorisation and speed against real pictures."""
    from trilemma import evaluation, sampling

    chosen = {"steps": steps, "solver": solver, "guidance": guidance, **options(option or [])}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    subject: Any = what
    if what.name == "model.safetensors" or (what / "model.safetensors").exists():
        subject = sampling.load(what, device)
    result = evaluation.evaluate(
        subject,
        data,
        n=n,
        split=split,
        features=features,
        seed=seed,
        bits=likelihood,
        **chosen,
    )
    if as_json:
        say(result)
    else:
        Console(highlight=False).print(evaluation.describe(result))


@app.command()
def compare(
    recipes: Annotated[list[str], typer.Argument(help="Recipes to hold against each other.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder for runs and report.", show_default=False)],
    budget: Annotated[str | None, typer.Option(help="Training time of each: 10m.")] = None,
    equal: Annotated[str, typer.Option(help="What is equal: time, or images.")] = "time",
    images: Annotated[
        str | None, typer.Option(help="With --equal images: training images of each.")
    ] = None,
    size: Size = None,
    seed: Seed = 0,
    n: Annotated[int, typer.Option("-n", "--n", min=50, help="Pictures each is judged by.")] = 2000,
    probes: Annotated[int, typer.Option(min=0, help="Quick scores while a model trains.")] = 4,
    features: Features = "lite0",
    changes: Changes = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train several recipes under one budget; report quality, coverage and speed side by side."""
    from trilemma.comparison import compare as run

    report = run(
        recipes,
        data,
        out=out,
        budget=None if budget is None else duration(budget),
        equal=equal,
        images=None if images is None else number(images),
        size=size,
        seed=seed,
        n=n,
        probes=probes,
        features=features,
        overrides=changes or (),
        device_name=device,
    )
    if as_json:
        say(report)
