"""What takes pictures and gives pictures: translation, enlargement, search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilemma.cli.shared import (
    Device,
    Json,
    OutFolder,
    Pictures,
    Run,
    app,
    read,
    say,
    screen,
    track,
    wrote,
)
from trilemma.errors import UserError


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
    pairs = torch.stack([images, made], 1).flatten(0, 1)
    wrote(edit.save(trained, made, out, facts, columns=8, sheet=pairs[:128]), as_json)


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
def search(
    run: Run,
    pictures: Annotated[str, typer.Argument(help="A folder, zip or parquet file, or a named set.")],
    text: Annotated[str | None, typer.Option(help="What to look for.", show_default=False)] = None,
    image: Annotated[
        Path | None, typer.Option(help="Or a picture to find the like of.", show_default=False)
    ] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="How many to find.")] = 20,
    out: Annotated[Path, typer.Option(help="The sheet of what was found.")] = Path("search.png"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find pictures by words, or by another picture, with a run of the recipe clip."""
    from trilemma import retrieval, sampling

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out}: expected the name of a picture file, such as search.png")
    trained = sampling.load(run, device)
    found, sheet, skipped = retrieval.search(
        trained, pictures, text=text, image=image, n=n, progress=track
    )
    for name, reason in skipped.items():
        screen.print(f"left out: {name}: {reason}", markup=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    if as_json:
        rows = [{"picture": name, "cosine": cosine} for name, cosine in found]
        say({"found": rows, "sheet": str(out)})
        return
    for name, cosine in found:
        print(f"{cosine:8.3f}  {name}")
    screen.print(f"the sheet of these is {out}")
