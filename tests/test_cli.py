"""The command line as a user meets it: output, errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import tiny
from trilemma import cli, drawing
from trilemma.cli import shared

NAME = "flow-matching"  # knows classes


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command line in this process; return (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trilemma", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("pictures"), count=60)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    from trilemma.training import train

    out = tmp_path_factory.mktemp("runs") / "run"
    train(NAME, folder, out=out, steps=2, overrides=tiny.overrides(NAME), quiet=True)
    return out


def test_help_needs_no_torch():
    code = "import sys; sys.argv = ['trilemma', '--help']\nimport trilemma.cli as c\n"
    code += "try: c.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "command", ["", "models", "train", "sample", "evaluate", "compare", "data", "data check",
                "edit", "edit reconstruct", "edit interpolate", "edit arithmetic", "score",
                "translate", "upscale", "tune-steps", "distill", "merge", "join", "search"]
)  # fmt: skip
def test_every_help_reads(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and "Usage" in out


def test_models(run):
    code, out, _ = run("models", "--json")
    rows = json.loads(out)
    assert code == 0 and {"ddpm", "quick-gan"} <= {row["name"] for row in rows}
    assert all({"family", "paper", "needs", "parameters", "summary"} <= row.keys() for row in rows)
    code, out, _ = run("models")
    assert code == 0 and "quick-diffusion" in out


def test_train_and_sample(run, folder, tmp_path):
    sets = [word for change in tiny.overrides("ddpm") for word in ("--set", change)]
    more = ["--data", folder, "--out", tmp_path / "run", "--steps", "2", *sets]
    code, out, err = run("train", "ddpm", *more, "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == 2
    code, _, err = run("train", "ddpm", *more)
    assert code == 1 and "already holds a run" in err and "Traceback" not in err
    code, out, _ = run("train", "ddpm", *more, "--resume", "--json")
    assert code == 0 and json.loads(out)["step"] == 2


def test_distill(run, folder, trained, tmp_path):
    more = ["--data", folder, "--out", tmp_path / "student", "--images", 8, "--json"]
    code, out, err = run("distill", trained, "--to", 1, "--method", "reflow", *more)
    assert code == 0, err
    assert json.loads(out)["recipe"] == f"{NAME}-reflow-1"
    code, out, err = run("distill", trained, "--to", 0)
    assert code == 1 and "at least 1 step" in err and out == ""


def test_pictures_carry_their_recipe(run, trained, tmp_path):
    out = tmp_path / "pictures"
    arguments = ["-n", 3, "--seed", 5, "--label", "class1", "--steps", 2, "--solver", "ddim"]
    code, text, err = run("sample", trained, *arguments, "--out", out, "--json")
    assert code == 0, err
    told = json.loads(text)
    assert len(told["images"]) == 3 and told["grid"].endswith("grid.png")
    picture = Image.open(told["images"][2])
    facts = json.loads(picture.info["trilemma"])
    assert facts["seed"] == 7 and facts["label"] == "class1" and facts["sample"]["steps"] == 2
    assert facts["recipe"]["model"]["type"] == "models.diffusion.Diffusion"
    assert "Seed: 7" in picture.info["parameters"] and "Sampler: ddim" in picture.info["parameters"]


def test_of_a_picture_that_finds_no_room_nothing_is_left(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="a.png cannot be written: .*too large"):
            drawing.write(Image.effect_noise((64, 64), 9.0), tmp_path / "a.png", PngInfo())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_pictures_that_were_not_drawn_are_not_replaced(run, trained, tmp_path):
    arguments = ["sample", trained, "-n", 2, "--steps", 1, "--out", tmp_path]
    assert run(*arguments)[0] == 0 == run(*arguments)[0]  # drawings may be drawn anew
    Image.new("RGB", (4, 4)).save(tmp_path / "00001.png")
    code, _, err = run(*arguments)
    assert code == 1 and "00001.png is there, and Trilemma did not draw it" in err
    assert Image.open(tmp_path / "00001.png").size == (4, 4)
    code, _, err = run("edit", "vary", trained, tmp_path / "00001.png", "-n", 2, "--out", tmp_path)
    assert code == 1 and "did not draw it" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--label", "cat"], "no class 'cat'"),
        (["--solver", "dimm"], "expected one of ddpm"),
        (["--option", "stepps=3"], "did you mean 'steps'"),
    ],
)
def test_wrong_values_fail_with_one_message(run, trained, tmp_path, arguments, told):
    code, out, err = run("sample", trained, "--out", tmp_path / "x", *arguments)
    assert code == 1 and told in err and out == "" and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train", "ddpm"],
        ["train", "ddpm", "--data", "fashion", "--budget", "soon"],
        ["train", "ddpm", "--data", "fashion", "--images", "many"],
        ["sample", "x", "--out", "y", "--steps", "0"],
        ["sample", "x", "--out", "y", "--option", "steps"],
        ["sample", "x", "--out", "y", "--option", "seed=3"],
        ["sample", "x", "--out", "y", "--seed", "99999999999999999999"],
    ],
)
def test_wrong_use_exits_with_2(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and err


def test_missing_things_are_named(run, tmp_path):
    code, _, err = run("train", "ddpmm", "--data", "fashion")
    assert code == 1 and "did you mean 'ddpm'" in err
    code, _, err = run("sample", tmp_path / "none", "--out", tmp_path)
    assert code == 1 and "does not exist" in err
    code, _, err = run("train", "ddpm", "--data", tmp_path / "none")
    assert code == 1 and "none" in err


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    arguments = ["sample", str(tmp_path), "--out", str(tmp_path), "--debug"]
    ours = subprocess.run([sys.executable, "-m", "trilemma", *arguments], capture_output=True)
    assert ours.returncode == 1 and b"Traceback" in ours.stderr


def test_lengths_are_read():
    assert cli.duration("90") == cli.duration("90s") == cli.duration("1.5m") == 90
    assert cli.duration("1h30m") == 5400
    assert cli.number("500k") == 500_000 and cli.number("2M") == 2_000_000
    assert shared.pixels("768x512") == (768, 512) and shared.pixels("64") == (64, 64)
    for wrong in ("0", "0x8", "8x0", "8x"):
        with pytest.raises(typer.BadParameter):
            shared.pixels(wrong)
    for wrong in ("", "m", "10x"):
        with pytest.raises(typer.BadParameter):
            cli.duration(wrong)
