"""Grids fitted to a model: the law on a mixture, and the command from end to end."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image

import tiny
from trilemma import cli, sampling, tuning
from trilemma.batch import Rng
from trilemma.diffusion import grids, schedules, solvers
from trilemma.errors import UserError
from trilemma.training import train


def mixture(schedule):
    """The posterior mean when the data are two narrow bumps, at 0.8 and -0.5, in each number."""
    centres, weights, std = torch.tensor([0.8, -0.5]), torch.tensor([0.3, 0.7]), 0.1

    def denoise(x, t):
        alpha, sigma = (float(v) for v in schedule(torch.tensor(t, dtype=torch.float64)))
        variance = alpha**2 * std**2 + sigma**2
        apart = x[..., None] - alpha * centres
        share = (weights.log() - apart**2 / (2 * variance)).softmax(-1)
        return (share * (centres + alpha * std**2 / variance * apart)).sum(-1)

    return denoise


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "unipc"])
def test_a_tuned_grid_beats_every_named_one_on_a_mixture(solver):
    schedule, steps = schedules.Linear(), 5
    denoise = mixture(schedule)

    def drawing(seeds):
        def draw(times, name=solver):
            x = Rng(seeds).normal(8).double()
            *_, last = solvers.SOLVERS[name].steps(denoise, x, times, schedule, None)
            return last

        many = grids.even_log_snr(schedule, 200)
        return draw, draw(many, "dpmpp_2m")

    draw, target = drawing(range(128))
    named = [grid(schedule, steps) for grid in grids.GRIDS.values()]
    nearest = min(named, key=lambda times: (draw(times) - target).square().mean())
    tuned = tuning.fit(draw, target, schedule, nearest)
    assert len(tuned) == steps + 1 and tuned[0] == 1 and tuned[-1] == 0 and (tuned.diff() < 0).all()
    draw, target = drawing(range(1000, 1128))  # other noises
    best = min((draw(times) - target).square().mean() for times in named)
    assert (draw(tuned) - target).square().mean() < 0.9 * best


def test_gaps_and_times_are_inverse():
    for schedule in (schedules.Straight(), schedules.Linear()):
        times = grids.karras(schedule, 9)
        alpha, sigma = (float(v) for v in schedule(times[0]))
        back = tuning._times(schedule, tuning._gaps(schedule, times), sigma / (alpha + sigma))
        torch.testing.assert_close(back, times)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tiny.pictures(tmp_path_factory.mktemp("pictures"), count=60)
    out = tmp_path_factory.mktemp("runs") / "run"
    name = "quick-diffusion"
    train(name, folder, out=out, steps=2, overrides=tiny.overrides(name), quiet=True)
    return out


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["trilemma", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
        sys.exit(0)
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, " ".join(err.split())


def test_tuned_steps_are_kept_in_the_run_and_used(run, tmp_path, monkeypatch, capsys):
    before = sampling.load(run).sample(2, solver="dpmpp_2m", steps=4)
    arguments = ["tune-steps", run, "--calls", 4, "--solver", "dpmpp_2m", "-n", 3, "--json"]
    monkeypatch.setattr(tuning, "REFERENCE", 20)
    monkeypatch.setattr(tuning, "ROUNDS", 3)
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 0, err
    told = json.loads(out)
    assert told["kept"] and told["distances"]["tuned"] < told["distances"][told["own"]]
    trained = sampling.load(run)
    assert [each["steps"] for each in trained.tuned] == [4]
    assert trained.options({"solver": "dpmpp_2m", "steps": 4})["grid"] == told["times"]
    assert "grid" not in trained.options({"solver": "dpmpp_2m", "steps": 5})
    assert "grid" not in trained.options({"solver": "ddim", "steps": 4})
    asked = ["sample", run, "--out", tmp_path, "-n", 1, "--solver", "dpmpp_2m", "--steps", 4]
    assert call(monkeypatch, capsys, *asked)[0] == 0
    picture = Image.open(tmp_path / "00000.png")
    assert "Schedule type: tuned" in picture.info["parameters"]
    assert json.loads(picture.info["trilemma"])["sample"]["grid"] == told["times"]
    assert call(monkeypatch, capsys, *asked, "--grid", told["own"])[0] == 0
    assert f"Schedule type: {told['own']}" in Image.open(tmp_path / "00000.png").info["parameters"]
    named = trained.sample(2, solver="dpmpp_2m", steps=4, grid=told["own"])
    assert torch.equal(named, before)
    code, out, err = call(monkeypatch, capsys, *arguments[:-1])  # again: in the place of the first
    assert code == 0 and "(its own)" in out
    assert len(sampling.load(run).tuned) == 1


def test_what_cannot_be_tuned_says_so(run, tmp_path):
    with pytest.raises(UserError, match="fresh noise.*expected one of ddim"):
        tuning.tune_steps(run, 10, solver="ddpm")
    with pytest.raises(UserError, match="'dimm' is not known"):
        tuning.tune_steps(run, 10, solver="dimm")
    with pytest.raises(UserError, match="2 calls are 1 steps of heun"):
        tuning.tune_steps(run, 2, solver="heun")
    with pytest.raises(UserError, match="expected 2 steps to 127, for 128 are the reference"):
        tuning.tune_steps(run, 100_000)
    folder = tiny.pictures(tmp_path / "pictures", count=20)
    changes = tiny.overrides("quick-vae")
    train("quick-vae", folder, out=tmp_path / "vae", steps=1, overrides=changes, quiet=True)
    with pytest.raises(UserError, match="not drawn in steps"):
        tuning.tune_steps(tmp_path / "vae", 10)


def test_a_solvers_own_options_go_with_it(run, tmp_path):
    trained = sampling.load(run)
    assert trained.options({"solver": "ddim", "eta": 1.0})["eta"] == 1.0
    with pytest.raises(UserError, match="cannot be sampled with 'eta'.*it takes.*s_churn"):
        trained.options({"solver": "heun", "eta": 1.0})
    trained.recipe["sample"] |= {"solver": "ddim", "eta": 0.5}
    assert trained.options({})["eta"] == 0.5
    assert "eta" not in trained.options({"solver": "heun"})
