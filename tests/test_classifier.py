"""The classifier of noisy pictures, and guidance by a trained one."""

import json

import pytest
import torch
from PIL import Image

import tiny
from trilemma import cli, sampling, training
from trilemma.batch import Batch, Condition, Rng
from trilemma.codecs import Pixels
from trilemma.diffusion.schedules import Linear, Straight
from trilemma.errors import UserError
from trilemma.models.classifier import Classifier
from trilemma.networks.quick_unet import QuickClassifier

SHAPE = (1, 8, 8)


def small(classes=2, **options):
    torch.manual_seed(0)
    network = QuickClassifier(1, classes, 8, [8, 16], [1, 1], 16)
    return Classifier(Pixels(SHAPE), network, classes, Straight(), **options)


def batch(n, seed=0):
    """Bright pictures and dark ones."""
    label = torch.arange(n) % 2
    rng = Rng(range(seed, seed + n))
    image = (label[:, None, None, None] - 0.5 + 0.1 * rng.normal(*SHAPE)).clamp(-1, 1)
    return Batch(image, Condition(n, label), 0, rng)


def test_it_learns_and_is_surer_where_there_is_less_noise():
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        told = model.loss(batch(32, 1000 * step))
        told["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert told["correct"] > 0.8
    test = batch(200, 10**6)
    log_prob = model.log_prob_of(test.condition, SHAPE, Straight())
    noise = test.rng.normal(*SHAPE)
    with torch.no_grad():
        sure = [float(log_prob((1 - t) * test.image + t * noise, t).mean()) for t in (0.1, 0.9)]
    assert sure[0] > -0.1 and sure[0] > sure[1]
    other = model.log_prob_of(test.condition, SHAPE, Linear())
    x, t = 0.8 * test.image + 0.6 * noise, float(Linear().time(torch.tensor(2 * 0.28768207)))
    with torch.no_grad():
        here, there = log_prob(x / 1.4, 0.6 / 1.4), other(x, t)
    torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-3)


def test_loss_does_not_depend_on_how_the_batch_is_split():
    model = small()
    whole = model.loss(batch(12))["loss"]
    parts = [model.loss(part)["loss"] for part in batch(12).split(4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_too_few_classes_are_explained(tmp_path):
    with pytest.raises(ValueError, match="a folder for each class"):
        small(classes=1)
    folder = tiny.pictures(tmp_path / "pictures", classes=1) / "class0"
    with pytest.raises(UserError, match="a folder for each class"):
        training.train("classifier", folder, out=tmp_path / "run", steps=1, quiet=True)
    with pytest.raises(ValueError, match="levels"):
        QuickClassifier(1, 2, 8, [8, 16], [1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An unconditional diffusion model, a conditional one and a classifier, of three colours."""
    folder = tiny.pictures(tmp_path_factory.mktemp("pictures"), count=60)
    out = tmp_path_factory.mktemp("runs")
    for name, steps in (("ddpm", 2), ("quick-diffusion", 2), ("classifier", 60)):
        changes = [*tiny.overrides(name), "train.warmup=0", "train.ema_halflife=0"]
        training.train(name, folder, out=out / name, steps=steps, overrides=changes, quiet=True)
    return out


def test_it_guides_a_model_that_knows_no_classes(runs, tmp_path, monkeypatch, capsys):
    trained = sampling.load(runs / "ddpm")
    judge = sampling.load(runs / "classifier")
    options = {"steps": 4, "classifier_scale": 30.0}
    red, blue = (
        trained.sample(8, label=name, classifier=judge, **options).float().mean((0, 2, 3))
        for name in ("class0", "class2")
    )
    assert red[0] - red[2] > blue[0] - blue[2] + 5
    with pytest.raises(UserError, match="did you mean 'class0'"):
        trained.sample(1, label="clas0", classifier=judge)
    arguments = ["sample", runs / "ddpm", "-n", 3, "--classifier", runs / "classifier"]
    arguments += ["--classifier-scale", 2, "--steps", 2, "--out", tmp_path / "out", "--json"]
    monkeypatch.setattr("sys.argv", ["trilemma", *map(str, arguments)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    paths = json.loads(capsys.readouterr().out)["images"]
    facts = [json.loads(Image.open(path).text["trilemma"]) for path in paths]
    assert [each["label"] for each in facts] == ["class0", "class1", "class2"]
    assert facts[0]["sample"]["classifier"] == str(runs / "classifier")


def test_it_must_know_the_same_classes_as_a_model_that_knows_some(runs):
    trained, judge = sampling.load(runs / "quick-diffusion"), sampling.load(runs / "classifier")
    trained.sample(2, classifier=judge, steps=2, guidance=1.0)
    judge.data["label_names"] = ["a", "b", "c"]
    with pytest.raises(UserError, match="the same pictures"):
        trained.sample(2, classifier=judge, steps=2)
