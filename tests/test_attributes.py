"""A model of attributes, from the table beside the pictures to the drawn ones."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from trilemma import cli, sampling, training
from trilemma.batch import Rng
from trilemma.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures that are bright or dark, and say so; all are square, none is round."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    with open(root / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "bright", "square", "round"])
        for i in range(40):
            level = 220 if i % 4 else 30
            noise = draw.integers(-20, 20, (tiny.SIZE, tiny.SIZE, 3))
            Image.fromarray((level + noise).astype(np.uint8)).save(root / f"{i}.png")
            table.writerow([f"{i}.png", int(i % 4 > 0), 1, 0])
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cgan"
    changes = [*tiny.overrides("cgan"), "model.augment=off", "train.optimizer.lr=3e-3"]
    changes += ["model.noise=0", "model.flip=0", "train.ema_halflife=0"]
    training.train("cgan", folder, out=out, steps=150, overrides=changes, quiet=True)
    return sampling.load(out)


def test_pictures_have_the_attributes_asked_for(trained):
    assert not trained.conditional
    bright = trained.sample(16, attributes=["bright", "square"]).float().mean()
    dark = trained.sample(16, attributes=["square"]).float().mean()
    assert bright > dark + 60


def test_attributes_are_drawn_with_their_shares_from_the_pictures_own_stream(trained):
    drawn = trained.attributes(Rng(range(400)), None)
    assert drawn.shape == (400, 3)
    share = trained.data["attribute_shares"][0]
    assert drawn[:, 0].mean().item() == pytest.approx(share, abs=0.07) and 0.5 < share < 1
    assert (drawn[:, 1] == 1).all() and (drawn[:, 2] == 0).all()
    assert (trained.attributes(Rng([7]), None)[0] == drawn[7]).all()


def test_a_seed_keeps_its_latent_whatever_the_attributes(trained):
    """Where the drawn attributes are the asked ones, so is the picture."""
    drawn = trained.sample(8, seed=3).int()
    asked = trained.sample(8, seed=3, attributes=["bright", "square"]).int()
    same = [(a - b).abs().max() <= 2 for a, b in zip(drawn, asked, strict=True)]
    assert any(same)


def test_command_line(trained, tmp_path, monkeypatch, capsys):
    arguments = ["sample", trained.path, "-n", "2", "--attributes", "bright, square"]
    arguments += ["--out", tmp_path / "drawn", "--json"]
    monkeypatch.setattr("sys.argv", ["trilemma", *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    path = json.loads(capsys.readouterr().out)["images"][1]
    facts = json.loads(Image.open(path).text["trilemma"])
    assert facts["attributes"] == ["bright", "square"] and facts["label"] is None


def test_bad_input(trained):
    with pytest.raises(UserError, match="'brihgt'.*'bright'.*bright, square, round"):
        trained.sample(1, attributes=["brihgt"])
    with pytest.raises(UserError, match="without classes"):
        trained.sample(1, label="bright")


def test_a_model_of_classes_takes_no_attributes(tmp_path):
    data = tiny.pictures(tmp_path / "pictures")
    options = {"out": tmp_path / "run", "quiet": True, "overrides": tiny.overrides("cgan")}
    trained = training.train("cgan", data, steps=1, **options)
    with pytest.raises(UserError, match="without attributes"):
        trained.sample(1, attributes=["bright"])


def test_a_diffusion_model_of_attributes(folder, tmp_path):
    spec = 'model.conditioner={type="conditioning.Attributes", attributes="@attributes", dim=128}'
    changes = [*tiny.overrides("quick-diffusion"), spec]
    changes += ["train.warmup=0", "train.ema_halflife=0"]
    out = tmp_path / "run"
    training.train("quick-diffusion", folder, out=out, steps=10, overrides=changes, quiet=True)
    trained = sampling.load(out)
    assert trained.options({})["guidance"] == 1.5
    bright = trained.sample(2, attributes=["bright"], steps=2, guidance=8.0)
    dark = trained.sample(2, attributes=[], steps=2, guidance=8.0)
    assert not torch.equal(bright, dark)
