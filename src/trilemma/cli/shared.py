"""What the commands share: their options, how these are read, and how results are told."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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


def lines(path: Path) -> list[str]:
    """Read the lines of a text file that hold something."""
    try:
        read = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read as text: {error}") from None
    return [line.strip() for line in read if line.strip()]


def pixels(text: str) -> tuple[int, int]:
    """Read `768x512` as width and height, `512` as both."""
    match = re.fullmatch(r"(0*[1-9]\d*)(?:x(0*[1-9]\d*))?", text)
    if match is None:
        raise typer.BadParameter(f"'{text}' is no size; write 512 or 768x512")
    return int(match[1]), int(match[2] or match[1])


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


OWN = "n seed label attributes text batch out mask strength keep steps guidance".split()
"""What commands that draw have options of their own for."""


def options(
    assignments: list[str] | None, own: Sequence[str] = OWN, **given: Any
) -> dict[str, Any]:
    """Return options given by name, and those of `key=value` pairs, their values as TOML."""
    chosen = given
    for text in assignments or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise typer.BadParameter(f"'{text}': expected key=value")
        if key in own:
            dashes = "-" if len(key) == 1 else "--"
            raise typer.BadParameter(f"'{text}': write {dashes}{key} {value}, without --option")
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
Seed = Annotated[int, typer.Option(min=0, max=2**53, help="The seed of everything random.")]
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
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:WEIGHT]",
        help="A LoRA to put on the model; repeat it for several.",
    ),
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


Run = Annotated[
    Path, typer.Argument(help="A run folder, its model.safetensors, or a packaged model.")
]
Pictures = Annotated[str, typer.Argument(help="A picture, or a folder or zip of them.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder for pictures.", show_default=False)]


def say(result: Any) -> None:
    """Print a result as JSON to standard output."""
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def read(trained: Any, source: str, shape: Any = None) -> tuple[list[str], Any]:
    """Read pictures as a model wants them, or of a shape, and tell of those that cannot be used."""
    from trilemma import data

    names, images, skipped = data.pictures(source, shape or trained.data["shape"])
    for name, reason in skipped.items():
        screen.print(f"left out: {name}: {reason}", markup=False)
    return names, images


def track(parts: Any) -> Any:
    """Show how far the work on a sequence of batches has come, while it lasts."""
    from rich.progress import track

    return track(parts, "working", console=screen, transient=True)


def wrote(paths: list[Path], as_json: bool, **told: float) -> None:
    """Tell which pictures were written; the last is the sheet."""
    if as_json:
        say({"images": [str(path) for path in paths[:-1]], "grid": str(paths[-1]), **told})
    else:
        screen.print(f"{len(paths) - 1} pictures, all on one sheet in {paths[-1]}")


def save_rows(
    trained: Any,
    made: Any,
    out: Path,
    facts: dict[str, Any],
    as_json: bool,
    before: Any = None,
    after: Any = None,
) -> None:
    """Write what was made of each picture, (N, n, C, H, W), and tell of it.

    A row of the sheet is what was made of one, with its picture of `before` and of `after` beside
    it, (N, C, H, W).
    """
    import torch

    from trilemma import edit

    columns = (before, made, after)
    shown = [each if each is made else each[:, None] for each in columns if each is not None]
    rows = torch.cat(shown, 1)[:16]
    images, sheet = made.flatten(0, 1), rows.flatten(0, 1)
    wrote(edit.save(trained, images, out, facts, rows.shape[1], sheet), as_json)
