"""What trains, and what makes one run of others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli.shared import (
    Changes,
    Data,
    Device,
    Json,
    Lora,
    Run,
    Seed,
    Size,
    Solver,
    app,
    duration,
    number,
    say,
    screen,
)


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
    captions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEMPLATE",
            help="Write captions from what is known of each picture: --captions '{name} emoji'. "
            "Several are told in turn.",
        ),
    ] = None,
    buckets: Annotated[
        bool,
        typer.Option(
            "--buckets",
            help="Keep pictures near their proportions, for diffusion models; else cut squares "
            "out of them.",
        ),
    ] = False,
    changes: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    init: Annotated[
        Path | None, typer.Option(help="Fine-tune: begin with the weights of this run.")
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(help="With --init, what learns: full, last or lora.", show_default="full"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of the factors of --tune lora.", show_default="8")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Layers for --tune last or lora: up,conv_out.",
            show_default="the last quarter, or all",
        ),
    ] = None,
    preserve: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --init: learn from so many pictures drawn from it too.",
            show_default="none",
        ),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a recipe on pictures."""
    from trilemma.training import train as run

    asked_of_data = [f"data.captions={json.dumps(captions)}"] if captions else []
    asked_of_data += ["data.buckets=true"] * buckets
    tuning = {
        "mode": tune,
        "rank": rank,
        "targets": targets and [name.strip() for name in targets.split(",")],
        "preserve": preserve,
    }
    trained = run(
        recipe,
        data,
        out=out,
        size=size,
        budget=None if budget is None else duration(budget),
        images=None if images is None else number(images),
        steps=None if steps is None else number(steps),
        seed=seed,
        overrides=[*(changes or []), *asked_of_data],
        resume=resume,
        init=init,
        tune={key: value for key, value in tuning.items() if value is not None},
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
        elif trained.matches:
            asked = f"search {trained.path} PICTURES --text WORDS"
        elif not trained.draws:
            asked = f"edit reconstruct {trained.path} PICTURES"
        where = "sheet.png" if trained.matches else "pictures"
        screen.print(f"next: trilemma {asked} --out {trained.path}/{where}", soft_wrap=True)


@app.command()
def distill(
    run: Run,
    to: Annotated[int, typer.Option(help="Steps of the student, each a network call.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="adversarial, consistency, progressive or reflow.",
            show_default="progressive from --to 4 on, else adversarial",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Pictures to train on.", show_default="the teacher's")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The student's folder.", show_default="RUN-METHOD-TO")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="That the student learns to draw with.", show_default="the teacher's"),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Train for this long: 90s, 10m, 1h30m.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Or for so many images.", show_default="half the teacher's"),
    ] = None,
    seed: Seed = 0,
    changes: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a student that draws in a few steps what a diffusion model draws in many."""
    from trilemma import distilling

    trained = distilling.distill(
        run,
        to,
        method=method,
        guidance=guidance,
        data=data,
        out=out,
        budget=None if budget is None else duration(budget),
        images=None if images is None else number(images),
        seed=seed,
        overrides=tuple(changes or ()),
        resume=resume,
        device_name=device,
    )
    if as_json:
        say({"run": str(trained.path), "recipe": trained.name, **trained.progress})
    else:
        screen.print(
            f"next: trilemma sample {trained.path} -n 64 --out {trained.path}/pictures",
            soft_wrap=True,
        )


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
def merge(
    run: Run,
    lora: Lora,
    out: Annotated[Path, typer.Option(help="The new .safetensors file.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Write a run's model with LoRA files merged into it, for every other command to use."""
    from trilemma import adapters

    path = adapters.merge(run, lora or (), out)
    if as_json:
        say({"model": str(path)})
    else:
        screen.print(f"next: trilemma sample {path} -n 64 --out pictures", soft_wrap=True)


@app.command()
def join(
    prior: Annotated[Path, typer.Option(help="A run of unclip-prior.", show_default=False)],
    decoder: Annotated[Path, typer.Option(help="A run of unclip-decoder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder of the new run.", show_default=False)],
    upsampler: Annotated[Path | None, typer.Option(help="A run of super-resolution.")] = None,
    as_json: Json = False,
) -> None:
    """Join prior, decoder and upsampler to one model that draws by words."""
    from trilemma import joining

    path = joining.join(prior, decoder, upsampler, out)
    if as_json:
        say({"run": str(path.parent)})
    else:
        screen.print(f"next: trilemma sample {out} --text WORDS --out {out}/pictures")
