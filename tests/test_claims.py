"""The scripts that test claims run from end to end, on next to nothing."""

import argparse
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny
import trilemma
from trilemma import data as pictures_of
from trilemma import joining

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "claims"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Grey pictures of 8 pixels in three classes, 24 to train on and 18 to test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 18)):
        for i in range(count):
            image = draw.integers(0, 90, (8, 8), np.uint8)
            image[:, 2 * (i % 3) : 2 * (i % 3) + 3] += 120
            path = tmp_path / "pictures" / split / f"class{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return "pictures"


@pytest.fixture
def run(data):
    """A run of two steps."""
    small = ["model.network.channels=[16, 24]", "model.network.blocks=[1, 1]", "train.grids=0"]
    trilemma.train("quick-diffusion", data, out="run", steps=2, overrides=small, quiet=True)
    return "run"


def check(capsys, name, rows, *options):
    """Run a script to its end; return what it found."""
    script = importlib.import_module(name)
    script.main(["--tiny", "--out", "out", *options])
    told = capsys.readouterr().out
    told_rows = 0
    for block in told.split("\n\n"):
        table = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in table}) <= 1
        told_rows += max(len(table) - 2, 0)
    assert told_rows == rows
    assert Image.open(f"out/{name}.png").size[0] > 100
    return json.loads(Path(f"out/{name}.json").read_text())["found"], told


def check_twice(capsys, name, rows, *options):
    """Run a script twice: the second time it has only to read what it kept."""
    found, told = check(capsys, name, rows, *options)
    importlib.import_module(name).main(["--tiny", "--out", "out", *options])
    again = capsys.readouterr()
    assert again.out == told
    assert "drawing" not in again.err
    return found


def test_mamba_scaling(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS.parent))
    script = importlib.import_module("mamba_scaling")
    # what its processes would tell; each takes seconds to begin
    found = {
        f"{name} {side}": script.measure(name, side, 64, 1, 1)
        for side in (2, 4)
        for name in ("DiT", "Mamba")
    }
    script.KEPT.parent.mkdir(parents=True)
    asked = {"width": 64, "depth": 1, "rounds": 1}
    script.KEPT.write_text(json.dumps({"options": asked, "found": found}))
    options = [f"--{key}={value}" for key, value in asked.items()]
    script.main(["--sides", "2", "4", "--out", "out", *options])
    told = capsys.readouterr()
    assert not told.err  # nothing was measured anew
    assert len([line for line in told.out.splitlines() if line.startswith("|")]) == 2 + 4
    assert Path("out/mamba_scaling.png").exists()
    assert json.loads(Path("out/mamba_scaling.json").read_text())["found"] == found


def test_guidance(run, data, capsys):
    found = check_twice(capsys, "guidance", 6, "--run", run, "--data", data)
    assert set(found) == {"0", "1", "3", "3 within", "1, other seeds", "real"}


def test_backbones(data, capsys):
    found, _ = check(capsys, "backbones", 4, "--data", data)
    for probes in found["probes"].values():
        assert [probe["seen"] for probe in probes] == [32, 64]
        assert 0 < probes[0]["processor"] < probes[1]["processor"]


@pytest.mark.slow
def test_conditionings(data, capsys):
    found, _ = check(capsys, "conditionings", 4, "--data", data)
    assert set(found["milliseconds"]) == set(found["probes"])


def test_ncsn(data, capsys):
    found = check_twice(capsys, "ncsn", 6, "--data", data)
    assert set(found["processor"]) == {"NCSN", "DDPM"}


@pytest.mark.slow
def test_schedules(run, data, capsys):
    found, _ = check(capsys, "schedules", 9 + 3, "--run", run, "--data", data)
    assert len(found["probes"]) == 9
    assert found["1 calls"].keys() >= found["real"].keys() == {"sharpness", "from_mean", "apart"}


@pytest.mark.slow
def test_fewstep(run, data, capsys):
    rows = 2 + 4 + 1  # of the teacher, of each method, and real pictures
    found = check_twice(capsys, "fewstep", rows, "--run", run, "--data", data)
    assert {"teacher, ddpm, 4 calls", "reflow, --to 1, 1 calls"} <= set(found)
    assert json.loads(Path("runs/claims/fewstep/reflow-1-8/processor.json").read_text()) > 0
    script = importlib.import_module("fewstep")
    script.main(["--tiny", "--speed", "--run", run, "--data", data])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Train a recipe for two steps on captioned pictures of 16 pixels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    data = pictures_of.load(str(tiny.captioned(tmp_path / "data")), size=16)

    def fit(name, *changes):
        changes = [*tiny.overrides(name), *changes]
        trilemma.train(name, data, out=f"runs/{name}", steps=2, quiet=True, overrides=changes)

    return fit


def test_unclip(fit, capsys):
    fit("clip", "model.dim=8")
    fit("unclip-prior", "model.diffusion.network.dim=8")
    fit("unclip-decoder")
    joining.join("runs/unclip-prior", "runs/unclip-decoder", None, "runs/unclip")
    found = check_twice(capsys, "unclip", 1 + 4, "--run", "runs/unclip", "--data", "data")
    assert found["direct, cosines"]["text"] == pytest.approx(1, abs=1e-4)
    assert found["pictures, cosines"]["picture"] == pytest.approx(1, abs=1e-4)
    assert found["pictures, guidance 2"]["fd"] != found["prior, 1, guidance 2"]["fd"]
    fit("unclip-prior-ar", "model.components=4")
    joining.join("runs/unclip-prior-ar", "runs/unclip-decoder", None, "runs/numbers")
    other, _ = check(capsys, "unclip", 1 + 4, "--run", "runs/numbers", "--data", "data")
    assert other["direct, cosines"] == found["direct, cosines"]
    assert other["prior, 1, cosines"] != found["prior, 1, cosines"]


def test_clip_guidance(fit, capsys):
    fit("clip", "model.dim=8")
    fit("text-diffusion")
    options = ["--run", "runs/text-diffusion", "--clip", "runs/clip", "--data", "data"]
    found = check_twice(capsys, "clip_guidance", 1 + 4, *options)
    assert found["CLIP, scale 1"] != found["no words"]


def test_what_a_run_gave_is_forgotten_when_it_has_learned_on(run):
    common = importlib.import_module("common")

    def kept(fd):
        claim = common.Kept("tried", argparse.Namespace(run=run, out="out"))
        return claim("part", lambda: {"fd": fd})["fd"]

    assert [kept(1.0), kept(2.0)] == [1.0, 1.0], "the same run was measured again"
    weights = Path(run) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert kept(3.0) == 3.0, "another run, the same numbers"
