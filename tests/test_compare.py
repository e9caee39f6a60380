"""The comparison, on real but tiny models: what it writes, keeps, refuses and survives."""

import json
import math
import os
import shlex
import signal

import numpy as np
import pytest
import tomli_w
from rich.console import Console

import tiny
from trilemma import data, entries, foresight, recipe, sampling
from trilemma.comparison import compare
from trilemma.errors import Interrupted, UserError
from trilemma.judge import Judge


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of pictures, and tiny recipes beside it, as the working directory."""
    root = tmp_path_factory.mktemp("compare")
    tiny.pictures(root / "photos", count=160)
    for name in ("quick-vae", "quick-gan", "flow-matching"):
        small = recipe.override(recipe.load(name), tiny.overrides(name))
        if "steps" in small["sample"]:
            small["sample"]["steps"] = 4
        (root / f"{name}-small.toml").write_text(tomli_w.dumps(small))
    (root / "broken.toml").write_text('[model]\ntype = "models.gan.Nothing"\n')
    return root


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr("trilemma.metrics.speed._SECONDS", 0.01)


VAE, GAN, FLOW = "quick-vae-small.toml", "quick-gan-small.toml", "flow-matching-small.toml"
SMALL = {
    "equal": "images", "images": 32, "n": 50, "features": "pixels", "probes": 2, "steps": [2, 3],
    "quiet": True, "device_name": "cpu",
}  # fmt: skip


def run(out, recipes=(VAE,), **changes):
    return compare(list(recipes), "photos", out=out, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def finished(folder):
    """A finished comparison of two models and one that fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr("trilemma.metrics.speed._SECONDS", 0.01)
        return run("all", [VAE, FLOW, "broken.toml"])


def test_report_holds_everything(finished, folder):
    assert json.loads((folder / "all" / "report.json").read_text()) == finished
    for file in ("report.html", "trilemma.png"):
        assert (folder / "all" / file).stat().st_size > 1000
    assert [m["name"] for m in finished["models"]] == ["quick-vae-small", "flow-matching-small"]
    assert finished["title"] and finished["choice"]["quality"]["sentence"]
    assert finished["reference"]["coverage"] > 0.5
    for model in finished["models"]:
        assert model["training"]["images"] == 32
        assert 0 <= model["scores"]["coverage"] <= 1 and model["scores"]["fd"] > 0
        assert np.isfinite(list(model["noise"].values())).all() and model["noise"]["fd"] > 0
        assert model["speed"]["images_per_second"] > 0 and model["speed"]["calls"] >= 1
        assert [p["images"] for p in model["probes"]] == [16, 32]
        assert (folder / "all" / model["sheet"]["path"]).exists()
        assert (folder / "all" / model["neighbours"]["path"]).exists()
    vae, flow = finished["models"]
    assert vae["steps"] == []
    assert [row["steps"] for row in flow["steps"]] == [2, 3, 4]
    assert [row["calls"] for row in flow["steps"]] == [2, 3, 4]
    assert flow["protocol"]["solver"] == "euler"


def test_failed_recipe_is_listed_and_does_not_lose_the_others(finished, folder):
    (failed,) = finished["failed"]
    assert failed["name"] == "broken" and "models.gan.Nothing" in failed["error"]
    assert failed["error"] in (folder / "all" / "report.html").read_text().replace("&#39;", "'")


@pytest.fixture
def judge(folder):
    training = data.load("photos", multiple=8)
    held_out = data.load("photos", split="test", multiple=8)
    return Judge(training, held_out, folder, n=50, features="pixels", seed=0, steps=[],
                 device_name="cpu", screen=Console(quiet=True))  # fmt: skip


def test_model_timed_in_small_batches_is_timed_again_by_what_it_draws(finished, folder, judge):
    judge.n = 60
    trained = sampling.load(folder / "all" / finished["models"][0]["name"], "cpu")
    slow = {
        "images_per_second": 1e-9,
        "batch": 4,
        "by_batch": {"4": 1e-9},
        "calls": 1,
        "room": None,
    }
    told = judge.full(trained, slow)
    assert told["speed"]["batch"] == 60 and told["protocol"]["timed in"] == "batches of 60"
    assert told["speed"]["images_per_second"] == told["speed"]["by_batch"]["60"] > 1e-9
    assert told["speed"]["calls"] == 1 and "memory" in told["speed"]
    judged = judge.full(trained, slow | {"batch": 128})
    assert judged["scores"] == told["scores"] and judged["speed"]["images_per_second"] == 1e-9


def test_last_probe_is_the_probe_of_the_finished_model(finished, folder, judge):
    flow = finished["models"][1]
    again = judge.probe(sampling.load(folder / "all" / flow["name"], "cpu"))
    assert again["fd"] == pytest.approx(flow["probes"][-1]["fd"], rel=1e-6)
    assert again["coverage"] == flow["probes"][-1]["coverage"]
    own = next(row for row in flow["steps"] if row["steps"] == 4)
    assert own["fd"] == flow["probes"][-1]["fd"]


def test_finished_work_is_kept(finished, monkeypatch):
    def never(*_, **__):
        raise AssertionError("trained or judged again")

    monkeypatch.setattr(entries, "train", never)
    monkeypatch.setattr(Judge, "full", never)
    again = run("all", [VAE, FLOW])
    assert again["models"] == finished["models"] and again["failed"] == []


def test_more_pictures_are_judged_without_training_again(finished, monkeypatch):
    def never(*_, **__):
        raise AssertionError("trained or measured again")

    monkeypatch.setattr(entries, "train", never)
    monkeypatch.setattr(Judge, "speed", never)
    more = run("all", [VAE], n=60)
    assert more["request"]["n"] == 60 and more["protocol"]["n"] == 60
    assert more["models"][0]["training"] == finished["models"][0]["training"]
    assert more["models"][0]["speed"]["batch"] == 60  # that of the batches of 50 would not do


LIGHT = {"probes": 0, "steps": ()}
RATES = {"quick-vae-small": 1000.0, "flow-matching-small": 7.0}


def at_rates(monkeypatch, rates):
    """Let models of a comparison be as fast as told, and no model be scored by fewer than 50."""
    monkeypatch.setattr("trilemma.foresight.FEWEST", 50)
    measure, asked = Judge.speed, []

    def speed(judge, trained):
        asked.append(trained.name)
        return measure(judge, trained) | {"images_per_second": rates[trained.name]}

    monkeypatch.setattr(Judge, "speed", speed)
    return asked


def test_all_models_are_judged_by_what_the_slowest_draws_in_time(tmp_path, monkeypatch, capsys):
    asked = at_rates(monkeypatch, RATES)
    made = run(tmp_path / "out", [VAE, FLOW], n=100, judge_budget=10.0, quiet=False, **LIGHT)
    assert asked == list(RATES)
    note = made["judging"]["note"]
    assert note.startswith("Every model is judged by 70 pictures, not the 100 asked for: flow-ma")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(note) == 2  # before the judging, and with the scores
    assert said.index(note) < said.index("1 of 2: judging")
    assert made["request"]["n"] == 100 and made["protocol"]["n"] == 70
    assert made["judging"]["bound"] == 10.0
    assert made["judging"]["foreseen"]["flow-matching-small"] == pytest.approx(100 / 7)
    assert made["protocol"]["shared"]["drawn"] == made["reference"]["n"] == 70
    for model in made["models"]:
        assert model["protocol"]["seeds"] == "0 to 69"
        assert "--n 70" in model["commands"][2]["command"]
    assert "--n 100 --judge-budget 10s" in made["commands"][0]["command"]
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert note in page and "judged by 70 drawn pictures" in page

    full = Judge.full
    monkeypatch.setattr(Judge, "full", None)
    again = run(tmp_path / "out", [VAE, FLOW], n=100, judge_budget=10.0, **LIGHT)
    assert again["models"] == made["models"] and asked == list(RATES), "all is kept"
    monkeypatch.setattr(Judge, "full", full)
    free = run(tmp_path / "out", [VAE, FLOW], n=100, judge_budget=math.inf, **LIGHT)
    assert free["judging"] == {**made["judging"], "bound": None, "note": ""}
    assert {m["protocol"]["drawn"] for m in free["models"]} == {"100 pictures"}
    assert "--judge-budget none" in free["commands"][0]["command"]


def test_model_too_slow_to_be_judged_does_not_take_the_others_along(tmp_path, monkeypatch):
    at_rates(monkeypatch, RATES | {"flow-matching-small": 1.0})
    made = run(tmp_path / "out", [VAE, FLOW], n=100, judge_budget=10.0, **LIGHT)
    assert made["judging"]["note"] == "" and made["protocol"]["n"] == 100
    (failed,) = made["failed"]
    assert [m["name"] for m in made["models"]] == ["quick-vae-small"]
    assert failed["name"] == "flow-matching-small" and failed["speed"]["images_per_second"] == 1.0
    assert "--judge-budget 1m to judge every model by 50 pictures, or 2m to" in failed["error"]
    assert failed["error"] in (tmp_path / "out" / "report.html").read_text("utf-8")
    monkeypatch.setattr(entries, "train", None)
    made = run(tmp_path / "out", [VAE, FLOW], n=100, judge_budget=60.0, **LIGHT)
    assert len(made["models"]) == 2 and made["protocol"]["n"] == 60


def test_judging_that_was_interrupted_goes_on_by_as_many_pictures(tmp_path, monkeypatch):
    asked = at_rates(monkeypatch, RATES)
    full = Judge.full

    def stops(judge, trained, cost):
        if trained.name == "flow-matching-small":
            raise Interrupted("by Ctrl-C")
        return full(judge, trained, cost)

    monkeypatch.setattr(Judge, "full", stops)
    with pytest.raises(Interrupted):
        run(tmp_path / "out", [VAE, FLOW], n=100, judge_budget=10.0, **LIGHT)
    judged = []
    monkeypatch.setattr(
        Judge, "full", lambda j, t, c: (judged.append((t.name, j.n)), full(j, t, c))[1]
    )
    made = run(tmp_path / "out", [VAE, FLOW], n=100, judge_budget=10.0, **LIGHT)
    assert judged == [("flow-matching-small", 70)] and asked == list(RATES)
    assert [m["protocol"]["drawn"] for m in made["models"]] == ["70 pictures"] * 2


@pytest.mark.parametrize(
    ("rates", "asked", "bound", "n", "left_out"),
    [({"a": 1000.0, "b": 1.9}, 2000, 600.0, 1100, []),  # the slow one draws 1,140 in time
     ({"a": 1000.0, "b": 1.9}, 2000, 1100.0, 2000, []),
     ({"a": 1000.0, "b": 0.3}, 2000, 600.0, 2000, ["b"]),  # it would draw 180
     ({"a": 1000.0, "b": 0.3, "c": 2.0}, 2000, 600.0, 1200, ["b"]),
     ({"a": 1000.0, "b": 0.3}, 2000, math.inf, 2000, []),
     ({"a": 1000.0, "b": 0.3}, 100, 600.0, 100, []),  # fewer were asked for
     ({"a": 0.3}, 2000, 600.0, 2000, ["a"]), ({}, 2000, 600.0, 2000, [])],
)  # fmt: skip
def test_what_is_foreseen(rates, asked, bound, n, left_out):
    plan = foresight.plan(rates, asked, bound)
    assert plan.n == n and list(plan.left_out) == left_out
    assert bool(plan.note) == (n < asked)
    assert json.loads(json.dumps(plan.told(), allow_nan=False))["asked"] == asked


def test_drawing_may_take_as_long_as_training_or_some_minutes(finished, tmp_path, monkeypatch):
    assert finished["judging"]["bound"] == 300.0
    assert run("all", [VAE], judge_budget=40.0)["judging"]["bound"] == 40.0
    monkeypatch.setattr("trilemma.foresight.LEAST", 0.0)
    made = run(tmp_path / "out", equal="time", images=None, budget=0.5, **LIGHT)
    assert made["judging"]["bound"] == 0.5


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"seed": 1}, "seed was 0 and is 1"), ({"images": 64}, "images was 32 and is 64"),
     ({"size": 8}, "shape"), ({"equal": "time", "images": None, "budget": 5.0}, "equal"),
     ({"overrides": ["train.clip=2"]}, "overrides")],
)  # fmt: skip
def test_another_request_is_refused(finished, changes, told):
    with pytest.raises(UserError, match=f"{told}.*take another --out"):
        run("all", **changes)


def test_changed_pictures_are_refused(tmp_path):
    pictures = tiny.pictures(tmp_path / "mine", count=160)
    compare([VAE], pictures, out=tmp_path / "out", **SMALL)
    tiny.pictures(pictures, count=170)
    with pytest.raises(UserError, match="the pictures have changed"):
        compare([VAE], pictures, out=tmp_path / "out", **SMALL)


def test_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    probe, calls = Judge.probe, []

    def stop(judge, trained):
        calls.append(trained.name)
        if len(calls) == 2:  # in the middle of the second training
            os.kill(os.getpid(), signal.SIGTERM)
        return probe(judge, trained)

    monkeypatch.setattr(Judge, "probe", stop)
    with pytest.raises(Interrupted):
        run(tmp_path / "out", [VAE, GAN])
    assert not (tmp_path / "out" / "report.html").exists()
    monkeypatch.setattr(Judge, "probe", probe)
    resumed = []
    train = entries.train
    monkeypatch.setattr(
        entries, "train", lambda *a, **o: (resumed.append((a[0], o["resume"])), train(*a, **o))[1]
    )
    made = run(tmp_path / "out", [VAE, GAN])
    assert resumed == [(GAN, True)]
    whole = run(tmp_path / "whole", [VAE, GAN])
    for one, other in zip(made["models"], whole["models"], strict=True):
        assert one["scores"] == other["scores"]  # bit for bit the same model
        assert [p["images"] for p in one["probes"]] == [16, 32]


def test_run_that_was_trained_on_is_not_compared(tmp_path):
    run(tmp_path / "out", [VAE, GAN])
    entries.train(VAE, "photos", out=tmp_path / "out" / "quick-vae-small", images=64,
                    resume=True, quiet=True, device_name="cpu")  # fmt: skip
    made = run(tmp_path / "out", [VAE, GAN])
    assert len(made["models"]) == 2, "finished scores are kept"
    made = run(tmp_path / "out", [VAE, GAN], n=60)
    assert [m["name"] for m in made["models"]] == ["quick-gan-small"]
    assert "64 images" in made["failed"][0]["error"]


def test_unexpected_error_keeps_its_traceback(tmp_path, monkeypatch):
    train = entries.train

    def breaks(name, *arguments, **options):
        if name == GAN:
            raise ZeroDivisionError("by nothing")
        return train(name, *arguments, **options)

    monkeypatch.setattr(entries, "train", breaks)
    made = run(tmp_path / "out", [GAN, VAE])
    assert [m["name"] for m in made["models"]] == ["quick-vae-small"]
    assert made["failed"][0]["error"].startswith("ZeroDivisionError: by nothing")
    assert "breaks" in (tmp_path / "out" / "quick-gan-small-error.txt").read_text()


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no recipe came to an end; broken: .*Nothing"):
        run(tmp_path / "out", ["broken.toml"])


@pytest.mark.parametrize(
    ("recipes", "changes", "told"),
    [([], {}, "name the recipes"), ([VAE, VAE], {}, "two recipes are called"),
     (["no-such"], {}, "no recipe 'no-such'"), ([VAE], {"n": 10}, "at least 50"),
     ([VAE], {"images": None}, "needs --images"), ([VAE], {"budget": 60.0}, "no --budget"),
     ([VAE], {"judge_budget": 0.0}, "judge_budget is 0.0"),
     ([VAE], {"equal": "luck"}, "time or images"), ([VAE], {"features": "luck"}, "luck")],
)  # fmt: skip
def test_wrong_use_is_told(tmp_path, recipes, changes, told):
    with pytest.raises(UserError, match=told):
        run(tmp_path / "out", recipes, **changes)
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_other_folder_is_not_written_into(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no comparison"):
        run(tmp_path)


def test_too_few_pictures_to_judge_by(tmp_path):
    pictures = tiny.pictures(tmp_path / "few", count=12)
    with pytest.raises(UserError, match="at least 10 are needed"):
        compare([VAE], pictures, out=tmp_path / "out", **SMALL)


def test_slow_probe_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("trilemma.judge.PATIENCE", 0.0)
    made = run(tmp_path / "out")
    assert [p["images"] for p in made["models"][0]["probes"]] == [32]


def test_commands_go_on_from_there(finished):
    """The report's own commands, run as they are but for the length."""
    from typer.testing import CliRunner

    from trilemma.cli import app

    def run_command(command, *more):
        result = CliRunner().invoke(app, [*shlex.split(command)[1:], *more, "--json"])
        assert result.exit_code == 0, (command, result.output, result.exception)
        return json.loads(result.stdout)

    model = finished["models"][0]
    train, draw, score = (entry["command"] for entry in model["commands"])
    again = run_command(score, "--features", "pixels")
    assert again["scores"]["fd-pixels"] == pytest.approx(model["scores"]["fd"], rel=1e-6)
    assert again["scores"]["coverage"] == model["scores"]["coverage"]
    assert len(run_command(draw)["images"]) == 64
    assert run_command(train.replace("--images 320", "--images 40"))["seen"] == 40


@pytest.mark.slow
def test_command_line_on_fashion(tmp_path):
    """`trilemma compare` at ten seconds each, with the real features."""
    from typer.testing import CliRunner

    from trilemma.cli import app

    words = ["compare", "quick-vae", "quick-gan", "--data", "fashion", "--budget", "10s"]
    result = CliRunner().invoke(app, [*words, "--n", "200", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {m["name"] for m in made["models"]} == {"quick-vae", "quick-gan"}
    assert made["protocol"]["distance"] == "FD-Lite0"
