"""The verbs of `trilemma edit` that every family can have: by latents, completion, denoising."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trilemma.cli.shared import (
    Device,
    Json,
    Option,
    OutFolder,
    Pictures,
    Run,
    Seed,
    edit_app,
    options,
    read,
    save_rows,
    screen,
    track,
    upper_part,
    wrote,
)


@edit_app.command("reconstruct")
def edit_reconstruct(
    run: Run, pictures: Pictures, out: OutFolder, device: Device = None, as_json: Json = False
) -> None:
    """Encode pictures and decode them: what the model keeps. The sheet shows both, side by side."""
    import torch

    from trilemma import edit, sampling

    trained = sampling.load(run, device)
    names, images = read(trained, pictures)
    made = edit.reconstruct(trained, images, track)
    facts = {"edit": "reconstruct", "pictures": names}
    pairs = torch.stack([images, made], 1).flatten(0, 1)
    wrote(edit.save(trained, made, out, facts, columns=8, sheet=pairs[:128]), as_json)


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
    (names, images), (others, targets) = read(trained, first), read(trained, second)
    made = edit.interpolate(trained, images, targets, steps, path, track)
    facts = {"edit": "interpolate", "path": path, "first": names, "second": others}
    save_rows(trained, made, out, facts, as_json)


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
    names, images = read(trained, pictures)
    groups = read(trained, plus)[1], read(trained, minus)[1]
    made = edit.arithmetic(trained, images, *groups, strength, track)
    facts: dict[str, Any] = {"edit": "arithmetic", "pictures": names, "strength": strength}
    facts |= {"plus": plus, "minus": minus}
    wrote(edit.save(trained, made, out, facts, columns=8), as_json)


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
    from trilemma import edit, sampling

    share = upper_part(keep)
    trained = sampling.load(run, device)
    names, images = read(trained, pictures)
    chosen = options(option, temperature=temperature)
    made = edit.complete(trained, images, share, n, seed=seed, label=label, track=track, **chosen)
    facts: dict[str, Any] = {"edit": "complete", "pictures": names, "keep": share, "seed": seed}
    facts |= {"label": label, "sample": trained.options(chosen)}
    given = images.clone()
    given[:, :, round(share * images.shape[2]) :] = 128
    save_rows(trained, made, out, facts, as_json, before=given, after=images)


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
    names, images = read(trained, pictures)
    noisy = images if noise is None else edit.add_noise(images, noise, seed)
    made = edit.denoise(trained, noisy, noise, track)
    facts = {"edit": "denoise", "pictures": names, "noise": noise, "seed": seed}
    shown = [noisy, made] if noise is None else [images, noisy, made]
    columns = 3 * len(shown)
    sheet = torch.stack(shown, 1).flatten(0, 1)[: 16 * columns]
    paths = edit.save(trained, made, out, facts, columns, sheet)
    told = {}
    if noise is not None:
        before, after = (float(psnr(each, images).mean()) for each in (noisy, made))
        screen.print(f"PSNR {before:.1f} dB with the noise, {after:.1f} dB without")
        told = {"psnr_noisy": before, "psnr": after}
    wrote(paths, as_json, **told)
