"""What there is, and what it is worth: recipes, data, scores, comparisons."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from trilemma.cli.shared import (
    Changes,
    Data,
    Device,
    Features,
    Guidance,
    Json,
    Option,
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
    options,
    read,
    say,
    screen,
    track,
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

    from trilemma import checkpoint
    from trilemma.log import count

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("recipe", "family", "weights", "needs", "what it is for, and its paper"):
        table.add_column(title, no_wrap=title in ("recipe", "family"))
    for row in rows:
        needs = ", ".join(row["needs"]) or "pictures"
        told = f"{row['summary']}\n[dim]{row['paper']}[/]"
        table.add_row(row["name"], row["family"], count(row["parameters"]), needs, told)
    Console(highlight=False).print(table)
    if recipes is None:
        ready = ", ".join(f"trilemma sample {name}" for name in checkpoint.packaged_models())
        screen.print(f"Trained and packaged, to draw from at once: {ready}")


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
    from trilemma.stable import load as checkpoints

    own = ["n", "seed", "steps", "solver", "guidance"]  # a label, say, has none here
    chosen = options(option, own, steps=steps, solver=solver, guidance=guidance)
    chosen = {key: value for key, value in chosen.items() if value is not None}
    subject: Any = what
    if checkpoints.recognises(what):
        raise UserError(
            f"{what} is a checkpoint from elsewhere; draw from it with trilemma sample {what}, and "
            "evaluate the folder of its pictures"
        )
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
    judge_budget: Annotated[
        str | None,
        typer.Option(
            help="Longest that a model may draw for that: 10m, or none. If the slowest would take "
            "longer, all are judged by fewer pictures, and the report says so.",
            show_default="as long as training, 5m at least",
        ),
    ] = None,
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
        judge_budget=_judge_budget(judge_budget),
        probes=probes,
        features=features,
        overrides=changes or (),
        device_name=device,
    )
    if as_json:
        say(report)


def _judge_budget(text: str | None) -> float | None:
    """Read a length of time, or `none` as one without end."""
    if text is None:
        return None
    return math.inf if text == "none" else duration(text)
