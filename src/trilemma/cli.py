"""The command line: one thin command for each thing the package does.

Nothing heavy is imported until a command needs it, so that `--help` is immediate. Results for
machines go to stdout (`--json`), everything for people to stderr. Exit codes: 0 success, 1 failure,
2 wrong use.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from trilemma.errors import Interrupted, UserError

app = typer.Typer(
    help="Train any image generator on your own pictures, and see what each costs in quality, "
    "coverage and speed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at pictures before training on them.", no_args_is_help=True)
app.add_typer(data_app, name="data")
edit_app = typer.Typer(
    help="Change pictures with a trained model: the same verbs for every family that can.",
    no_args_is_help=True,
)
app.add_typer(edit_app, name="edit")
screen = Console(stderr=True, highlight=False)


def duration(text: str) -> float:
    """Read `90`, `90s`, `10m` or `1h30m` as seconds."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text)
    if not text or match is None:
        raise typer.BadParameter(f"'{text}' is no length of time; write 90s, 10m or 1h30m")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def number(text: str) -> int:
    """Read `20000`, `500k` or `2M` as a whole number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text)
    if match is None:
        raise typer.BadParameter(f"'{text}' is no number; write 20000, 500k or 2M")
    return int(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]])


def numbers(text: str) -> list[float]:
    """Read `0.2,3` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}': expected numbers such as 0.2,3") from None


def upper_part(text: str) -> float:
    """Read `top`, or a share of the height such as `0.5`."""
    try:
        share = {"top": 0.5}.get(text) or float(text)
    except ValueError:
        raise typer.BadParameter(
            f"'{text}' cannot be kept: models draw row after row from the top, so what is given "
            "must be above; write top, or a share of the height such as 0.5"
        ) from None
    return share


def options(assignments: list[str]) -> dict[str, Any]:
    """Read `key=value` pairs, values as TOML."""
    chosen = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"'{text}': expected key=value")
        try:
            chosen[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            chosen[key] = value
    return chosen


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="A folder or zip of pictures, or a named set: fashion, emoji, fashion-mnist, mnist, "
        "cifar10, celeba, hf:OWNER/NAME.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or mps.", show_default="the fastest there is")
]
Seed = Annotated[int, typer.Option(min=0, help="The seed of everything random.")]
Size = Annotated[
    int | None,
    typer.Option(min=4, help="Height and width in pixels.", show_default="the pictures' own"),
]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Any other option of the family's sampler."),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: --set train.batch=64."),
]
Features = Annotated[
    str, typer.Option(help="lite0, pixels, or inception:FILE (weights of the original FID).")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of a solver.")]
Solver = Annotated[str | None, typer.Option(help="ddpm, ddim, euler, heun, dpmpp_2m ...")]
Grid = Annotated[
    str | None,
    typer.Option(
        help="Where the steps lie: even_time, trailing, even_share, even_log_snr or karras.",
        show_default="tuned, or the solver's own",
    ),
]
Guidance = Annotated[float | None, typer.Option(help="Strength of classifier-free guidance.")]


Run = Annotated[Path, typer.Argument(help="A run folder, or its model.safetensors.")]
Pictures = Annotated[str, typer.Argument(help="A picture, or a folder or zip of them.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder for pictures.", show_default=False)]


def _say(result: Any) -> None:
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


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
        _say(rows)
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
    for name in _track(recipes):
        try:
            rows.append(profile(name, size))
        except UserError as error:
            if len(recipes) == 1:
                raise
            screen.print(f"left out: {name}: {error}", markup=False)
    if as_json:
        _say(rows)
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
        _say(report)
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
        _say({"run": str(trained.path), "recipe": trained.name, **trained.progress})
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
    run: Annotated[Path, typer.Argument(help="A run folder, or its model.safetensors.")],
    out: Annotated[Path, typer.Option(help="The folder for the pictures.", show_default=False)],
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="How many pictures.")] = 64,
    seed: Seed = 0,
    label: Annotated[
        str | None, typer.Option(help="A class, by name or index.", show_default="each in turn")
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
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 128,
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

    trained = sampling.load(run, device)
    if attributes is not None:
        chosen["attributes"] = [name.strip() for name in attributes.split(",") if name.strip()]
    paths = sampling.save(trained, n, out, seed=seed, label=label, batch=batch, **chosen)
    drawn = list(track(paths, "drawing", total=n + 1, console=screen, transient=True))
    if as_json:
        _say({"images": [str(path) for path in drawn[:-1]], "grid": str(drawn[-1])})
    else:
        screen.print(f"{n} pictures in {out}, all on one sheet in {drawn[-1]}")


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
        _say(told)
        return
    print(f"{told['solver']}, {told['steps']} steps: distance from {tuning.REFERENCE} steps")
    for name, distance in told["distances"].items():
        print(f"  {name:14}{distance:.5f}{' (its own)' * (name == told['own'])}")
    asked = f"trilemma sample {run} --solver {told['solver']} --steps {told['steps']}"
    if told["kept"]:
        screen.print(f"kept in the run: {asked} now uses the tuned grid")
    else:
        screen.print("no better than the best of those named: not kept")


def _read(trained: Any, source: str, shape: Any = None) -> tuple[list[str], Any]:
    """Read pictures as a model wants them, or of a shape, and tell of those that cannot be used."""
    from trilemma import data

    names, images, skipped = data.pictures(source, shape or trained.data["shape"])
    for name, reason in skipped.items():
        screen.print(f"left out: {name}: {reason}", markup=False)
    return names, images


def _track(parts: Any) -> Any:
    """Show how far the work on a sequence of batches has come, while it lasts."""
    from rich.progress import track

    return track(parts, "working", console=screen, transient=True)


def _wrote(paths: list[Path], as_json: bool, **told: float) -> None:
    if as_json:
        _say({"images": [str(path) for path in paths[:-1]], "grid": str(paths[-1]), **told})
    else:
        screen.print(f"{len(paths) - 1} pictures, all on one sheet in {paths[-1]}")


@edit_app.command("reconstruct")
def edit_reconstruct(
    run: Run, pictures: Pictures, out: OutFolder, device: Device = None, as_json: Json = False
) -> None:
    """Encode pictures and decode them: what the model keeps. The sheet shows both, side by side."""
    import torch

    from trilemma import edit, sampling

    trained = sampling.load(run, device)
    names, images = _read(trained, pictures)
    made = edit.reconstruct(trained, images, _track)
    facts = {"edit": "reconstruct", "pictures": names}
    paths = edit.save(trained, made, out, facts, columns=8)
    pairs = torch.stack([images, made], 1).flatten(0, 1)
    sampling.grid(pairs[:128], 8).save(paths[-1])
    _wrote(paths, as_json)


@edit_app.command("interpolate")
def edit_interpolate(
    run: Run,
    first: Annotated[str, typer.Argument(help="A picture, or a folder or zip of them.")],
    second: Annotated[str, typer.Argument(help="As many pictures, to which the ways lead.")],
    out: OutFolder,
    steps: Annotated[int, typer.Option(min=2, help="Pictures on each way, with its ends.")] = 8,
    path: Annotated[str, typer.Option(help="spherical or linear.")] = "spherical",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Walk from each picture to another through the latent space; a row of the sheet each."""
    from trilemma import edit, sampling

    trained = sampling.load(run, device)
    (names, images), (others, targets) = _read(trained, first), _read(trained, second)
    made = edit.interpolate(trained, images, targets, steps, path, _track)
    facts = {"edit": "interpolate", "path": path, "first": names, "second": others}
    _wrote(edit.save(trained, made.flatten(0, 1), out, facts, columns=steps), as_json)


@edit_app.command("arithmetic")
def edit_arithmetic(
    run: Run,
    pictures: Pictures,
    plus: Annotated[str, typer.Option(help="Pictures that have what is to be added.")],
    minus: Annotated[str, typer.Option(help="Pictures that lack it.")],
    out: OutFolder,
    strength: Annotated[float, typer.Option(help="How much is added; below 0 takes away.")] = 1.0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Move pictures along the mean difference of two groups: with glasses minus without, say."""
    from trilemma import edit, sampling

    trained = sampling.load(run, device)
    names, images = _read(trained, pictures)
    groups = _read(trained, plus)[1], _read(trained, minus)[1]
    made = edit.arithmetic(trained, images, *groups, strength, _track)
    facts: dict[str, Any] = {"edit": "arithmetic", "pictures": names, "strength": strength}
    facts |= {"plus": plus, "minus": minus}
    _wrote(edit.save(trained, made, out, facts, columns=8), as_json)


@edit_app.command("complete")
def edit_complete(
    run: Run,
    pictures: Pictures,
    out: OutFolder,
    keep: Annotated[
        str, typer.Option(help="What is given: top (the upper half), or a share such as 0.3.")
    ] = "top",
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Completions of each.")] = 4,
    seed: Seed = 0,
    label: Annotated[
        str | None, typer.Option(help="A class.", show_default="as the given part tells")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1: likelier values.")] = None,
    option: Option = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw the rest of pictures whose upper part is given, several times each.

    A row of the sheet is the given part, its completions, and the original.
    """
    import torch

    from trilemma import edit, sampling

    share = upper_part(keep)
    trained = sampling.load(run, device)
    names, images = _read(trained, pictures)
    chosen = {"temperature": temperature, **options(option or [])}
    made = edit.complete(trained, images, share, n, seed=seed, label=label, track=_track, **chosen)
    facts: dict[str, Any] = {"edit": "complete", "pictures": names, "keep": share, "seed": seed}
    facts |= {"label": label, "sample": trained.options(chosen)}
    paths = edit.save(trained, made.flatten(0, 1), out, facts, columns=n)
    given = images.clone()
    given[:, :, round(share * images.shape[2]) :] = 128
    rows = torch.cat([given[:, None], made, images[:, None]], 1)[:16]
    sampling.grid(rows.flatten(0, 1), n + 2).save(paths[-1])
    _wrote(paths, as_json)


@edit_app.command("denoise")
def edit_denoise(
    run: Run,
    pictures: Pictures,
    out: OutFolder,
    noise: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Put so much noise on the pictures first, for show: a deviation, black being -1 "
            "and white 1.",
            show_default="none: they are noisy",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Remove Gaussian noise. The sheet shows each picture with its noise and without."""
    import torch

    from trilemma import edit, sampling
    from trilemma.metrics.restoration import psnr

    trained = sampling.load(run, device)
    names, images = _read(trained, pictures)
    noisy = images if noise is None else edit.add_noise(images, noise, seed)
    made = edit.denoise(trained, noisy, noise, _track)
    facts = {"edit": "denoise", "pictures": names, "noise": noise, "seed": seed}
    paths = edit.save(trained, made, out, facts, columns=8)
    shown = [noisy, made] if noise is None else [images, noisy, made]
    sheet = torch.stack(shown, 1).flatten(0, 1)
    sampling.grid(sheet[: 16 * 3 * len(shown)], 3 * len(shown)).save(paths[-1])
    told = {}
    if noise is not None:
        before, after = (float(psnr(each, images).mean()) for each in (noisy, made))
        screen.print(f"PSNR {before:.1f} dB with the noise, {after:.1f} dB without")
        told = {"psnr_noisy": before, "psnr": after}
    _wrote(paths, as_json, **told)


Each = Annotated[int, typer.Option("-n", "--n", min=1, help="Pictures drawn of each.")]
Label = Annotated[str | None, typer.Option(help="A class.", show_default="nothing is said")]
Resample = Annotated[
    int | None, typer.Option(min=1, help="How often each step is taken.", show_default="10")
]


@edit_app.command("vary")
def edit_vary(
    run: Run,
    pictures: Pictures,
    out: OutFolder,
    strength: Annotated[float, typer.Option(help="Above 0; 1 keeps nothing of the picture.")] = 0.6,
    n: Each = 4,
    seed: Seed = 0,
    label: Label = None,
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
    import torch

    from trilemma import edit, redraw, sampling

    trained = sampling.load(run, device)
    names, images = _read(trained, pictures)
    chosen = {"steps": steps, "solver": solver, "guidance": guidance, **options(option or [])}
    made = redraw.vary(trained, images, strength, n, seed=seed, label=label, track=_track, **chosen)
    facts: dict[str, Any] = {"edit": "vary", "pictures": names, "strength": strength, "seed": seed}
    facts |= {"label": label, "sample": redraw.told(trained, chosen, label)}
    paths = edit.save(trained, made.flatten(0, 1), out, facts, columns=n)
    rows = torch.cat([images[:, None], made], 1)[:16]
    sampling.grid(rows.flatten(0, 1), n + 1).save(paths[-1])
    _wrote(paths, as_json)


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

    from trilemma import edit, redraw, sampling

    trained = sampling.load(run, device)
    names, images = _read(trained, pictures)
    hidden = redraw.read_mask(mask, pictures, images.shape[2])
    chosen = {"steps": steps, "resample": resample, "guidance": guidance, **options(option or [])}
    made = redraw.inpaint(
        trained, images, hidden, n, seed=seed, label=label, track=_track, **chosen
    )
    facts: dict[str, Any] = {"edit": "inpaint", "pictures": names, "mask": str(mask), "seed": seed}
    facts |= {"label": label, "sample": redraw.told(trained, chosen, label, "inpaint")}
    paths = edit.save(trained, made.flatten(0, 1), out, facts, columns=n)
    given = torch.where(hidden, 128, images)
    rows = torch.cat([given[:, None], made, images[:, None]], 1)[:16]
    sampling.grid(rows.flatten(0, 1), n + 2).save(paths[-1])
    _wrote(paths, as_json)


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
    steps: Steps = None,
    resample: Resample = None,
    guidance: Guidance = None,
    option: Option = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Extend the canvas: draw what is beyond the borders."""
    from trilemma import edit, redraw, sampling

    trained = sampling.load(run, device)
    names, images = _read(trained, pictures)
    chosen = {"steps": steps, "resample": resample, "guidance": guidance, **options(option or [])}
    margins = (top, bottom, left, right)
    made = redraw.outpaint(
        trained, images, margins, n, seed=seed, label=label, track=_track, **chosen
    )
    facts: dict[str, Any] = {"edit": "outpaint", "pictures": names, "margins": margins}
    facts |= {"seed": seed, "label": label}
    facts |= {"sample": redraw.told(trained, chosen, label, "inpaint")}
    _wrote(edit.save(trained, made.flatten(0, 1), out, facts, columns=max(n, 4)), as_json)


@edit_app.command("repair")
def edit_repair(
    run: Run,
    pictures: Pictures,
    out: OutFolder,
    n: Each = 1,
    seed: Seed = 0,
    label: Label = None,
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
    names, sources = _read(trained, pictures, part.shape)
    chosen = {"steps": steps, "solver": solver, "guidance": guidance, **options(option or [])}
    made = redraw.repair(trained, sources, n, seed=seed, label=label, track=_track, **chosen)
    facts: dict[str, Any] = {"edit": "repair", "pictures": names, "source": part.kind}
    facts |= {"seed": seed, "label": label, "sample": redraw.told(trained, chosen, label)}
    paths = edit.save(trained, made.flatten(0, 1), out, facts, columns=n)
    given = F.interpolate(sources, made.shape[3:]).expand(-1, made.shape[2], -1, -1)
    rows = torch.cat([given[:, None], made], 1)[:64]
    sampling.grid(rows.flatten(0, 1), (n + 1) * max(1, 8 // (n + 1))).save(paths[-1])
    _wrote(paths, as_json)


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
    names, images = _read(trained, pictures)
    made = translation.translate(trained, images, direction)
    facts = {"translate": direction, "pictures": names}
    paths = edit.save(trained, made, out, facts, columns=8)
    pairs = torch.stack([images, made], 1).flatten(0, 1)
    sampling.grid(pairs[:128], 8).save(paths[-1])
    _wrote(paths, as_json)


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
        _say({"images": [str(path) for path in paths]})
    else:
        screen.print(f"{len(paths)} pictures in {out}")


@app.command()
def score(run: Run, pictures: Pictures, device: Device = None, as_json: Json = False) -> None:
    """Say which pictures the model finds strange, the strangest first: anomaly detection."""
    from trilemma import edit, sampling

    trained = sampling.load(run, device)
    names, images = _read(trained, pictures)
    scores, measure = edit.score(trained, images, _track)
    rows = sorted(zip(scores.tolist(), names, strict=True), reverse=True)
    if as_json:
        listed = [{"picture": name, "score": value} for value, name in rows]
        _say({"measure": measure, "scores": listed})
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
        _say(result)
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
        _say(report)


def main() -> None:
    """Run the command line; one clear message for each failure, a traceback with `--debug`."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except (Interrupted, UserError, OSError, ValueError) as error:
        if debug:
            raise
        screen.print("error:", style="bold red", end=" ")
        screen.print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)
