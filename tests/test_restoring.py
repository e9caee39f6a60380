"""How near restored pictures come to their originals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import tiny
from trilemma import cli, data, evaluation, restoring, sampling, training
from trilemma.batch import Rng, to_float, to_uint8
from trilemma.conditioning import grey, random_masks, shrink
from trilemma.errors import UserError
from trilemma.metrics.restoration import luma, psnr, ssim
from trilemma.upscale import bicubic, enlarge

KINDS = ["srresnet", "super-resolution", "colourise", "inpainting"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("restoring") / "pictures")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    known = {}

    def train(name):
        if name not in known:
            out = tmp_path_factory.mktemp(name) / "run"
            changes = tiny.overrides(name)
            training.train(name, str(folder), out=out, size=tiny.SIZE, steps=2, overrides=changes)
            known[name] = sampling.load(out)
        return known[name]

    return train


@pytest.fixture(scope="module")
def images(folder):
    return data.load(str(folder), split="all", size=tiny.SIZE).tensor(slice(6))


def test_pictures_are_spoiled_as_in_training(trained, images):
    original = to_float(images)
    low = to_uint8(shrink(original, 4))
    visible = low.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for name in ("srresnet", "super-resolution"):
        made = restoring.restore(trained(name), images)
        assert torch.equal(made.given, visible) and torch.equal(made.plain, bicubic(low, 4))
    assert torch.equal(
        restoring.restore(trained("srresnet"), images).drawn, enlarge(trained("srresnet"), low)
    )
    made = restoring.restore(trained("colourise"), images)
    assert torch.equal(made.given, to_uint8(grey(original)).expand_as(images))
    assert torch.equal(made.plain, made.given)
    made = restoring.restore(trained("inpainting"), images, seed=3)
    hidden = random_masks(Rng(range(3, 3 + len(images))), tiny.SIZE, tiny.SIZE).bool()
    hidden = hidden.expand_as(images)
    assert torch.equal(made.drawn[~hidden], images[~hidden]), "the known part is touched"
    assert (made.given[hidden] == 128).all() and torch.equal(made.given[~hidden], images[~hidden])


@pytest.mark.parametrize("name", ["super-resolution", "colourise", "inpainting"])
def test_a_picture_does_not_depend_on_its_company(name, trained, images):
    whole = restoring.restore(trained(name), images, seed=5).drawn
    alone = restoring.restore(trained(name), images[2:3], seed=7).drawn
    assert (whole[2:3].int() - alone.int()).abs().max() <= 1


def test_likeness_is_the_mean_over_pictures(images):
    made = images.roll(1, 3)
    whole = restoring.likeness(made, images)
    assert whole["psnr"] == pytest.approx(float(psnr(made.double(), images.double()).mean()))
    of_luma = restoring.likeness(made, images, 2)
    assert of_luma["ssim"] == pytest.approx(float(ssim(luma(made), luma(images), 2).mean()))
    same = restoring.likeness(images, images)
    assert same["psnr"] == restoring.MOST and math.isclose(same["ssim"], 1)


@pytest.mark.parametrize("name", KINDS)
def test_evaluate_tells_how_near_they_come(name, trained, folder):
    run = trained(name)
    said = ["evaluate", str(run.path), "--data", str(folder), "-n", "6", "--features", "pixels"]
    told = CliRunner().invoke(cli.app, [*said, "--split", "all", "--json"])
    assert told.exit_code == 0, told.output
    result = json.loads(told.stdout)
    loaded = data.load(str(folder), split="all", size=tiny.SIZE)
    rows = [int(row) for row in evaluation.references.thinned(len(loaded), 6)]
    originals = loaded.tensor(rows)
    made = restoring.restore(run, originals)
    factor = None if name in ("colourise", "inpainting") else 4
    for part, each in (("", made.drawn), ("-plain", made.plain)):
        for key, value in restoring.likeness(each, originals, factor).items():
            assert result["scores"][key + part] == pytest.approx(value, rel=1e-3)
    distance = evaluation.frechet(made.plain, originals, "pixels")
    assert result["scores"]["fd-pixels-plain"] == pytest.approx(distance, rel=1e-6)
    assert result["protocol"]["n"] == 6 and result["speed"]["images_per_second"] > 0
    assert any("few" in sentence for sentence in result["warnings"])


def test_what_cannot_be_done_is_named(trained, images, folder):
    with pytest.raises(UserError, match="not trained to restore"):
        restoring.restore(trained("quick-vae"), images)
    with pytest.raises(UserError, match="takes no options"):
        restoring.restore(trained("srresnet"), images, steps=4)
    with pytest.raises(UserError, match="cannot be sampled with 'stepps'"):
        evaluation.evaluate(trained("colourise"), folder, features="pixels", stepps=4)
