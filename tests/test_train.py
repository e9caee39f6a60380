"""The training loop: budgets, averages, trouble, signals, kills, several processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import torch

import tiny
from trilemma import checkpoint, device, stepping, training
from trilemma.data import load as load_data
from trilemma.errors import Interrupted, UserError
from trilemma.settings import Settings

NAME = "ddpm"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("pictures"), count=40)


@pytest.fixture(scope="session")
def data(folder):
    return load_data(folder, split="all")


def fit(data, out, *changes, **options):
    options = {"seed": 3, "quiet": True, **options}
    overrides = [*tiny.overrides(NAME), *changes]
    return training.train(NAME, data, out=out, overrides=overrides, **options)


@pytest.mark.parametrize(
    ("warmup", "seen", "done", "rate"),
    [(100, 30, 0.05, 0.3), (100, 30, 0.1, 0.5), (100, 30, 0.5, 1.0), (0, 0, 0.0, 1.0)],
)
def test_a_warmup_ends_at_the_latest_after_a_fifth_of_the_training(warmup, seen, done, rate):
    assert Settings(warmup=warmup).rate(seen, done) == pytest.approx(rate)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out):
    return checkpoint.read(out / "model.safetensors")[0]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_lengths(data, tmp_path):
    assert fit(data, tmp_path / "a", steps=3).progress["step"] == 3
    assert fit(data, tmp_path / "b", images=20).progress["seen"] == 24
    assert fit(data, tmp_path / "c", budget=0.5).progress["elapsed"] >= 0.5
    with pytest.raises(UserError, match="give one of"):
        fit(data, tmp_path / "d", steps=3, images=3)
    with pytest.raises(UserError, match="already holds a run"):
        fit(data, tmp_path / "a", steps=3)


def test_a_run_folder(data, tmp_path):
    out = tmp_path / "run"
    fit(data, out, "train.grids=2", "train.log_every=1", steps=4)
    assert {p.name for p in (out / "samples").iterdir()} == {"000000016.png", "000000032.png"}
    assert [line["step"] for line in log(out)] == [1, 2, 3, 4]
    assert {"loss", "images_per_second", "elapsed", "seen"} <= log(out)[0].keys()
    assert "networks.unet.UNet" in (out / "recipe.toml").read_text()


def test_accumulation_gives_the_same_run(data, tmp_path):
    whole = fit(data, tmp_path / "a", "train.log_every=1", steps=4)
    fit(data, tmp_path / "b", "train.log_every=1", "train.accumulate=4", steps=4)
    ours, theirs = log(tmp_path / "a"), log(tmp_path / "b")
    for one, two in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-2)
    assert whole.progress["step"] == 4
    with pytest.raises(UserError, match="choose train.batch a multiple"):
        fit(data, tmp_path / "c", "train.accumulate=3", steps=1)


def test_probes_are_called_evenly_and_logged(data, tmp_path):
    called = []

    def probe(trained, elapsed):
        called.append(trained.progress["step"])
        return {"score": 1.0}

    fit(data, tmp_path / "run", steps=8, probe=probe, probes=4)
    assert called == [2, 4, 6, 8]
    assert [line["probe"] for line in log(tmp_path / "run") if "probe" in line] == [
        {"score": 1.0}
    ] * 4


def test_nothing_else_is_overwritten_and_numbers_are_numbers(data, tmp_path):
    checkpoint.write(tmp_path / "shared" / "model.safetensors", {"a": torch.ones(1)}, {})
    with pytest.raises(UserError, match="holds a model without the state to go on from"):
        fit(data, tmp_path / "shared", steps=1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; expected a folder"):
        fit(data, tmp_path / "file", steps=1)
    with pytest.raises(UserError, match=r"\[train\] batch is 'x'; expected a number"):
        fit(data, tmp_path / "run", "train.batch=x", steps=1)
    with pytest.raises(UserError, match="has lr nan; expected a finite number"):
        fit(data, tmp_path / "run", "train.optimizer.lr=nan", steps=1)
    assert not (tmp_path / "run").exists()


def test_init_takes_the_weights_that_fit(data, tmp_path):
    first = fit(data, tmp_path / "a", steps=3)
    second = fit(data, tmp_path / "b", "train.optimizer.lr=0.0", steps=1, init=tmp_path / "a")
    assert same(first.model.state_dict(), second.model.state_dict())


def test_init_from_another_architecture_is_refused(data, tmp_path):
    training.train(
        "quick-gan", data, out=tmp_path / "gan", steps=1, quiet=True,
        overrides=tiny.overrides("quick-gan"),
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"gan is a models.gan.GAN of .*; this recipe builds .*UNet"
    ):
        fit(data, tmp_path / "b", steps=1, init=tmp_path / "gan")


def test_dropout_resumes_too(data, tmp_path):
    changes = ["model.network.dropout=0.5", "train.save_every=0"]
    whole = fit(data, tmp_path / "whole", *changes, steps=6)

    def stop(trained, elapsed):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Interrupted):
        fit(data, tmp_path / "parts", *changes, steps=6, probe=stop, probes=3)
    parts = fit(data, tmp_path / "parts", *changes, steps=6, resume=True)
    assert same(whole.model.state_dict(), parts.model.state_dict())


def test_resume_refuses_what_differs(data, folder, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="nothing to resume"):
        fit(data, out, steps=2, resume=True)
    fit(data, out, steps=2)
    with pytest.raises(UserError, match=r"train.clip is 3 now and was"):
        fit(data, out, "train.clip=3", steps=4, resume=True)
    with pytest.raises(UserError, match="pictures have changed"):
        fit(load_data(folder, split="train"), out, steps=4, resume=True)
    assert fit(data, out, steps=4, resume=True).progress["step"] == 4
    assert fit(data, out, resume=True).progress["step"] == 4  # the length is remembered


def test_what_changes_nothing_learned_may_change_on_resuming(data, tmp_path, capsys):
    whole = fit(data, tmp_path / "whole", "train.ema_halflife=0", steps=4)
    fit(data, tmp_path / "parts", "train.ema_halflife=0", steps=2)
    changes = ["train.ema_halflife=0", "train.grids=1", "train.log_every=2", "sample.steps=3"]
    parts = fit(data, tmp_path / "parts", *changes, steps=4, resume=True, quiet=False)
    assert same(whole.model.state_dict(), parts.model.state_dict())
    written = tomllib.loads((tmp_path / "parts" / "recipe.toml").read_text())
    assert written["train"]["grids"] == 1 and written["sample"]["steps"] == 3
    assert written["run"]["length"] == {"steps": 4}
    assert "train.grids is 1 now and was" in capsys.readouterr().err
    about = checkpoint.read(tmp_path / "parts" / "model.safetensors")[1]
    assert about["recipe"]["train"]["log_every"] == 2


def poison(monkeypatch, bad_steps):
    """Make the loss not finite at these calls."""
    plain = stepping.take
    calls = iter(range(1000))

    def take(run, phase, batch, rate):
        if next(calls) in bad_steps:
            loss = phase.loss
            phase = type(phase)(
                phase.name, lambda b: {"loss": loss(b)["loss"] * torch.inf}, phase.modules
            )
        return plain(run, phase, batch, rate)

    monkeypatch.setattr(stepping, "take", take)


def test_a_step_that_is_not_finite_is_named_and_skipped(data, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3})
    trained = fit(data, tmp_path / "run", steps=6)
    assert all(value.isfinite().all() for value in trained.model.state_dict().values())
    told = [line for line in log(tmp_path / "run") if "non_finite" in line]
    assert [line["step"] for line in told] == [2, 3]
    assert "loss is not finite" in told[0]["non_finite"]


def test_trouble_that_persists_stops_at_the_last_good_state(data, tmp_path, monkeypatch):
    poison(monkeypatch, range(4, 1000))
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"5 steps in a row .* learning rate"):
        fit(data, out, "train.save_every=0", steps=100)
    _, facts = checkpoint.read(out / "training" / "state.safetensors")
    assert facts["progress"]["step"] == 4
    assert all(value.isfinite().all() for value in weights(out).values())


def test_a_signal_saves_and_stops(data, tmp_path):
    def probe(trained, elapsed):
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(Interrupted, match="add --resume to go on"):
        fit(data, tmp_path / "run", steps=8, probe=probe, probes=4)
    _, facts = checkpoint.read(tmp_path / "run" / "training" / "state.safetensors")
    assert facts["progress"]["step"] == 3


def command(folder, out, *more, prefix=(sys.executable, "-m", "trilemma")):
    sets = [word for change in tiny.overrides(NAME) for word in ("--set", change)]
    where = ["--data", str(folder), "--out", str(out), "--device", "cpu", "--seed", "3"]
    return [*prefix, "train", NAME, *where, *sets, *more]


def environment(tmp_path):
    return {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_two_processes_give_the_losses_of_one(folder, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    torchrun += ("--master_addr=127.0.0.1", f"--master_port={tiny.free_port()}", "-m", "trilemma")
    more = ["--steps", "4", "--set", "train.log_every=1", "--set", "train.precision=fp32"]
    environ = environment(tmp_path)
    one = command(folder, tmp_path / "one", *more)
    two = command(folder, tmp_path / "two", *more, prefix=torchrun)
    subprocess.run(one, check=True, env=environ, capture_output=True)
    subprocess.run(two, check=True, env=environ, capture_output=True)
    pairs = zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True)
    for ours, theirs in pairs:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for key, value in weights(tmp_path / "one").items():
        assert torch.allclose(value, weights(tmp_path / "two")[key], atol=1e-4), key


def test_a_resumed_run_keeps_its_number_format(data, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "dtype", lambda precision, where: torch.bfloat16)
    fit(data, tmp_path / "run", steps=2)
    monkeypatch.setattr(device, "dtype", lambda precision, where: torch.float32)
    fit(data, tmp_path / "run", steps=4, resume=True)
    _, facts = checkpoint.read(tmp_path / "run" / "training" / "state.safetensors")
    assert facts["precision"] == "bf16"


@pytest.mark.slow
def test_killed_at_any_moment_a_run_can_go_on(folder, tmp_path):
    """Kill -9 at 20 random moments; each run, resumed, ends in the same weights."""
    environ = environment(tmp_path)
    more = ["--steps", "200", "--set", "train.save_every=0.05"]
    began = time.monotonic()
    subprocess.run(command(folder, tmp_path / "whole", *more), check=True, env=environ)
    takes = time.monotonic() - began
    whole = weights(tmp_path / "whole")
    moments = random.Random(0)
    for i in range(20):
        out = tmp_path / f"killed{i}"
        process = subprocess.Popen(command(folder, out, *more), env=environ)
        time.sleep(moments.uniform(0, 1) * takes)
        process.kill()
        process.wait()
        began_at_all = (out / "training" / "state.safetensors").exists()
        again = command(folder, out, *more, *(["--resume"] if began_at_all else []))
        subprocess.run(again, check=True, env=environ)
        assert same(weights(out), whole), f"run {i} differs"


def test_files_that_cannot_be_used_are_told(tmp_path, capsys):
    folder = tiny.pictures(tmp_path / "pictures")
    for i in range(7):
        (folder / "class0" / f"bad{i}.png").write_bytes(b"")
    fit(folder, tmp_path / "run", steps=1, quiet=False)
    told = " ".join(capsys.readouterr().err.split())
    assert "7 files cannot be used" in told and "bad0.png: empty file" in told
    assert "trilemma data check" in told
