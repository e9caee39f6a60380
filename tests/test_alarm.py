"""The alarm: planted sequences, runs that saturate and collapse, and that it only looks."""

import json

import pytest
import torch

import tiny
from trilemma import alarm, training
from trilemma.alarm import Alarm, coverage
from trilemma.batch import to_float
from trilemma.data import load as load_data
from trilemma.model import Model
from trilemma.sampling import Trained

SMALL = ["train.grids=0", "train.compile=off"]
SMALL += ["model.generator.channels=4", "model.critic.channels=4", "train.batch=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_data(tiny.pictures(tmp_path_factory.mktemp("pictures"), 40), split="all")


@pytest.fixture
def ears(tmp_path):
    path = tmp_path / "log.jsonl"
    path.touch()
    return Alarm(path)


def hear(ears, key, values):
    return [ears.hear({"step": i, key: value}) for i, value in enumerate(values)]


def watch(ears, values):
    return [ears.hear({"step": i, "watch": {"coverage": v}}) for i, v in enumerate(values)]


def test_a_critic_that_stays_certain_is_told_once(ears):
    said = hear(ears, "critic/correct", [0.7] + [0.99] * 30)
    warned = [i for i, messages in enumerate(said) if messages]
    assert warned == [alarm.WINDOW]
    assert "train.phases.critic.lr" in said[warned[0]][0]


def test_a_critic_that_doubts_now_and_then_is_not_told(ears):
    assert not any(hear(ears, "critic/correct", ([1.0] * 8 + [0.9]) * 5))


def lead(ears, leads, ahead=1.0):
    """Let a critic with relative scores be ahead by `leads`, in successive lines of the log."""
    lines = [{"critic/ahead": ahead, "critic/real": v / 2, "critic/fake": -v / 2} for v in leads]
    return [ears.hear({"step": i, **line}) for i, line in enumerate(lines)]


@pytest.mark.parametrize(
    "leads",
    [
        [5.0] * 30,
        [50 / (1 + i) for i in range(30)],  # Wasserstein's, as the pictures come nearer
        [8 * (1 - 0.6**i) for i in range(1, 30)],  # its first steps
        [1.0] * 10 + [2.0] * 20,
        [4.0, 0.5] * 15,
    ],
)
def test_being_ahead_is_no_fault(ears, leads):
    assert not any(lead(ears, leads))
    assert ears.adversarial


@pytest.mark.parametrize(
    "leads",
    [
        [1.1**i for i in range(5)] + [1.5**i for i in range(25)],
        [0.01 * i**3 for i in range(1, 30)],  # three layers whose weights grow evenly
        [0.2] * 10 + [40.0] * 20,
    ],
)
def test_a_critic_that_runs_away_is_told_once(ears, leads):
    said = [message for messages in lead(ears, leads) for message in messages]
    assert len(said) == 1
    assert "runs away" in said[0] and "train.phases.critic.lr" in said[0]


def test_a_lead_that_grows_without_certainty_is_no_runaway(ears):
    assert not any(lead(ears, [1.5**i for i in range(30)], ahead=0.9))


def test_other_losses_are_not_watched(ears):
    assert not any(hear(ears, "loss", [1.0] * 30))
    assert not ears.adversarial


def test_falling_coverage_is_told_once_for_each_fall(ears):
    said = watch(ears, [0.2, 0.8, 0.6, 0.47, 0.3, 0.7, 0.1])
    assert [bool(messages) for messages in said] == [False] * 3 + [True, False, False, True]
    assert "47%" in said[3][0] and "80%" in said[3][0] and "--set" in said[3][0]


def test_noise_near_nothing_is_no_fall(ears):
    assert not any(watch(ears, [0.05, 0.0, 0.06, 0.01]))


def test_a_generator_that_never_begins_is_told_once(ears):
    said = watch(ears, [0.02, 0.0] * alarm.BARREN)
    assert [i for i, messages in enumerate(said) if messages] == [alarm.BARREN - 1]
    assert "not begun" in said[alarm.BARREN - 1][0] and "quick-gan" in said[alarm.BARREN - 1][0]


def test_a_late_beginning_is_a_beginning(ears):
    assert not any(watch(ears, [0.0] * (alarm.BARREN - 1) + [0.11, 0.09, 0.08, 0.1]))


def test_a_slow_beginning_is_a_beginning(ears):
    """Coverage of wgan-gp in a run of a minute."""
    assert not any(watch(ears, [0.0] * 5 + [0.004 * i for i in range(1, 16)]))


def test_a_resumed_run_has_not_forgotten(tmp_path):
    path = tmp_path / "log.jsonl"
    heard = [{"step": 0, "watch": {"coverage": 0.8}}]
    heard += [{"step": i, "critic/correct": 1.0} for i in range(alarm.WINDOW - 1)]
    relative = {"other/ahead": 1.0, "other/fake": 0.0}
    heard += [{"step": i, **relative, "other/real": 2.0**i} for i in range(alarm.WINDOW - 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in heard))
    ears = Alarm(path)
    assert ears.adversarial
    assert ears.hear({"step": 9, "critic/correct": 1.0})
    assert ears.hear({"step": 9, **relative, "other/real": 2.0**9})
    assert ears.hear({"step": 9, "watch": {"coverage": 0.4}})
    assert not ears.hear({"step": 10, "watch": {"coverage": 0.4}})


class Copies(Model):
    """Draws the real pictures, or the first of them only."""

    def __init__(self, data, collapsed):
        super().__init__()
        self.images = torch.nn.Parameter(to_float(data.tensor(slice(None))), False)
        self.collapsed = collapsed

    def phases(self):
        return []

    def sample(self, condition, rng):
        return self.images[rng.seeds * (0 if self.collapsed else 1)]


def test_coverage_sees_a_collapse(data):
    recipe = {"train": {}, "model": {}, "run": {"recipe": "copies"}}
    full, few = (Trained(Copies(data, c), recipe, {}, {}) for c in (False, True))
    assert coverage(full, data) == 1.0
    before = torch.random.get_rng_state()
    assert coverage(few, data) < 0.5
    assert torch.equal(torch.random.get_rng_state(), before)


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_whose_critic_saturates_is_told(data, tmp_path, capsys):
    """Plain hinge game, a critic that learns and a generator that hardly does."""
    changes = ["model.game=hinge", "model.penalty=none", "train.warmup=0", "train.log_every=2"]
    changes += ["train.optimizer.lr=0.01", "train.phases.generator.lr=1e-9"]
    out = tmp_path / "run"
    training.train("quick-gan", data, out=out, steps=80, overrides=[*SMALL, *changes])
    told = "".join(capsys.readouterr().err.split())
    assert told.count("thegeneratorcanlearnlittle") == 1
    assert "train.phases.critic.lr" in told


def test_a_run_whose_critic_runs_away_is_told(data, tmp_path, capsys):
    """Wasserstein's game without anything that bounds the critic's slope."""
    changes = ["model.game=wasserstein", "model.penalty=none", "train.warmup=0"]
    changes += ["train.optimizer.lr=0.003", "train.phases.generator.lr=1e-9", "train.log_every=2"]
    out = tmp_path / "run"
    training.train("quick-gan", data, out=out, steps=80, overrides=[*SMALL, *changes])
    told = "".join(capsys.readouterr().err.split())
    assert told.count("itrunsaway") == 1


def test_a_run_that_never_begins_is_told(data, tmp_path, capsys):
    """A relativistic critic at a large rate, and a generator that hardly learns."""
    changes = ["model.game=relativistic", "train.phases.generator.lr=1e-9", "train.log_every=5"]
    out = tmp_path / "run"
    training.train("quick-gan", data, out=out, steps=40, overrides=[*SMALL, *changes])
    told = "".join(capsys.readouterr().err.split())
    found = [line["watch"]["coverage"] for line in lines(out) if "watch" in line]
    assert told.count("hasnotbegun") == 1, found


def test_a_run_that_collapses_is_told(data, tmp_path, capsys):
    """The rate rises from nothing, at which it learns to cover the data, to an absurd one."""
    out = tmp_path / "run"
    changes = [*SMALL, "train.log_every=5", "train.watches=30", "train.ema_halflife=0"]
    changes += ["train.optimizer.lr=0.05", "train.warmup=1000000", "train.schedule=constant"]
    training.train("quick-gan", data, out=out, steps=600, overrides=changes)
    told = "".join(capsys.readouterr().err.split())
    found = [line["watch"]["coverage"] for line in lines(out) if "watch" in line]
    assert "collapsing" in told, found


def test_what_is_watched_is_logged_and_heard(data, tmp_path, capsys, monkeypatch):
    planted = iter([0.7, 0.8, 0.2])
    monkeypatch.setattr(alarm, "coverage", lambda trained, data: next(planted))
    out = tmp_path / "run"
    changes = [*SMALL, "train.log_every=1", "train.watches=3"]
    training.train("quick-gan", data, out=out, steps=6, overrides=changes)
    told = "".join(capsys.readouterr().err.split())
    assert told.count("collapsing") == 1
    assert [line["watch"]["coverage"] for line in lines(out) if "watch" in line] == [0.7, 0.8, 0.2]


def test_watching_changes_no_weight(data, tmp_path):
    runs = {}
    for watches in (0, 4):
        changes = [*SMALL, "train.log_every=1", f"train.watches={watches}"]
        out = tmp_path / f"{watches}"
        runs[watches] = training.train(
            "quick-gan", data, out=out, steps=8, overrides=changes, quiet=True
        )
        assert sum("watch" in line for line in lines(out)) == watches
    one, two = (runs[w].model.state_dict() for w in (0, 4))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_family_without_a_critic_is_not_watched(data, tmp_path):
    overrides = [*tiny.overrides("quick-vae"), "train.log_every=1"]
    training.train("quick-vae", data, out=tmp_path / "r", steps=4, overrides=overrides, quiet=True)
    assert not any("watch" in line for line in lines(tmp_path / "r"))
