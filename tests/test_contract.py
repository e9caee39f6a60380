"""What every packaged recipe must keep, at a tiny size."""

from __future__ import annotations

import copy
import math
import os
import signal

import pytest
import torch
from torch import nn

import tiny
from trilemma import comparison, edit, recipe, redraw, retrieval, sampling, stepping, training
from trilemma.batch import Condition, Rng, to_float, to_uint8
from trilemma.conditioning import SOURCES, source_of
from trilemma.data import batches
from trilemma.data import load as load_data
from trilemma.errors import Interrupted, UserError
from trilemma.translation import translate
from trilemma.upscale import enlarge

RECIPES = recipe.names()
OTHERS = (
    tiny.translates,
    tiny.enlarges,
    tiny.restores,
    tiny.repairs,
    tiny.classifies,
    tiny.matches,
    tiny.embeds,
)
DRAWING = [name for name in RECIPES if not any(other(name) for other in OTHERS)]


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """The data that recipes need: class folders, two domains, or captions beside pictures."""
    return {
        "classes": load_data(tiny.pictures(tmp_path_factory.mktemp("pictures")), split="all"),
        "domains": load_data(tiny.domains(tmp_path_factory.mktemp("domains")), split="train"),
        "captions": load_data(tiny.captioned(tmp_path_factory.mktemp("captions")), split="all"),
    }


@pytest.fixture
def data(name, sets):
    if tiny.translates(name):
        return sets["domains"]
    return sets["captions" if tiny.reads_words(name) else "classes"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Folders with the runs that recipes use, in `runs`: tiny ones, and one step at 32 pixels."""
    tiny_ones, sizeable = (tmp_path_factory.mktemp(name) for name in ("tiny", "sizeable"))
    pictures = tiny.captioned(tmp_path_factory.mktemp("pictures"))
    large = ["train.batch=8", "train.grids=0"]
    without = ["model.weights=none"]
    for name, own in (("vqvae", []), ("kl-f4", without), ("vq-f4", without), ("clip", [])):
        for folder, size, changes in (
            (tiny_ones, tiny.SIZE, tiny.overrides(name)),
            (sizeable, 32, [*large, *own]),
        ):
            data = load_data(pictures, split="all", size=size)
            fit(name, data, folder / "runs" / name, steps=1, overrides=changes)
    return tiny_ones, sizeable


@pytest.fixture(autouse=True)
def beside_the_runs(folders, monkeypatch):
    monkeypatch.chdir(folders[0])


def build(name, data, seed=0):
    torch.manual_seed(seed)
    spec = recipe.override(recipe.load(name), tiny.overrides(name))
    return recipe.build(recipe.resolve(spec, training.facts(data))["model"])


def first_batch(data, seen=0):
    return next(batches(data, 8, seed=0, start=seen))


def fit(name, data, out, **options):
    options = {"seed": 1, "quiet": True, "overrides": tiny.overrides(name), **options}
    return training.train(name, data, out=out, **options)


@pytest.mark.parametrize("name", RECIPES)
def test_each_phase_lowers_its_own_loss_on_one_batch(name, data):
    model = build(name, data).train()
    for phase in model.phases():
        learn = [p for module in phase.modules for p in module.parameters()]
        optimizer = torch.optim.Adam(learn, lr=1e-3)
        trace = []
        for _ in range(25):
            with stepping.only_these_learn(model, phase.modules, {"a": 0, "b": 0}):
                loss = phase.loss(first_batch(data))["loss"]
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trace.append(loss.item())
        assert all(math.isfinite(value) for value in trace)
        assert min(trace[-5:]) < trace[0], (phase.name, trace)


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_learns_in_exactly_one_phase(name, data):
    model = build(name, data).train()
    names = {id(p): key for key, p in model.named_parameters()}
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    phases = model.phases()
    owners = [
        {names[id(p)] for module in phase.modules for p in module.parameters() if p.requires_grad}
        for phase in phases
    ]
    assert sum(len(own) for own in owners) == len(trainable)
    assert set().union(*owners) == trainable
    for phase, own in zip(phases, owners, strict=True):
        reached = set()
        for seen in 3 * tiny.MOMENTS.get(name, [0]):  # zero-initialised layers hold gradients back
            with stepping.only_these_learn(model, phase.modules, {"a": 0, "b": 0}):
                phase.loss(first_batch(data, seen))["loss"].backward()
            reached |= {k for k, p in model.named_parameters() if p.grad is not None}
            assert reached <= own
            moved = [p for p in model.parameters() if p.grad is not None]
            torch.optim.SGD(moved, lr=1e-2).step()
            model.zero_grad(set_to_none=True)
        assert reached == own, f"{phase.name}: no gradient for {own - reached}"


@pytest.mark.parametrize("name", RECIPES)
def test_loss_does_not_depend_on_how_the_batch_is_split(name, data):
    model = build(name, data).train()
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        pytest.skip("batch normalisation looks at the whole batch")
    if tiny.matches(name):
        pytest.skip("each pair is told apart from all others of the batch")
    for phase in model.phases():
        whole = copy.deepcopy(model)
        wholly = next(p for p in whole.phases() if p.name == phase.name)
        batch = first_batch(data)
        parts = [phase.loss(part)["loss"].item() for part in batch.split(2)]
        assert sum(parts) / 2 == pytest.approx(wholly.loss(batch)["loss"].item(), rel=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_is_the_same_run(name, data, tmp_path):
    whole = fit(name, data, tmp_path / "whole", steps=7)
    stop_at_4 = tmp_path / "parts"
    with pytest.raises(Interrupted):
        fit(name, data, stop_at_4, steps=7, probe=_stop_after(4), probes=7)
    parts = fit(name, data, stop_at_4, steps=7, resume=True)
    assert parts.progress["step"] == whole.progress["step"] == 7
    one, two = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def _stop_after(step):
    """Return a probe that asks the run to stop, as a signal would, once `step` is reached."""

    def probe(trained, elapsed):
        if trained.progress["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    return probe


@pytest.mark.parametrize("name", RECIPES)
def test_a_grid_is_drawn_while_training_where_there_are_pictures(name, data, tmp_path):
    overrides = [*tiny.overrides(name), "train.grids=1"]
    overrides += ["sample.steps=2"] if "steps" in recipe.load(name).get("sample", {}) else []
    fit(name, data, tmp_path / "run", steps=1, overrides=overrides)
    drawn = list((tmp_path / "run" / "samples").glob("*.png"))
    nothing = tiny.classifies(name) or tiny.matches(name) or tiny.embeds(name)
    assert len(drawn) == (0 if nothing else 1)


@pytest.mark.parametrize("name", DRAWING)
def test_samples(name, data, tmp_path):
    trained = fit(name, data, tmp_path / "run", steps=2)
    options = {"steps": 3} if "steps" in trained.sample_defaults else {}
    images = trained.sample(6, seed=5, **options)
    assert images.shape == (6, *data.shape) and images.dtype == torch.uint8
    loaded = sampling.load(tmp_path / "run")
    assert torch.equal(loaded.sample(6, seed=5, **options), images), "a reloaded model differs"
    apart = trained.sample(6, seed=5, batch=2, **options).int()
    assert (apart - images.int()).abs().max() <= 2, "a picture depends on its batch"
    assert not torch.equal(images[0], images[3]) or trained.sample(1, seed=9).std() == 0
    with pytest.raises(UserError, match="it takes"):
        trained.sample(1, no_such_option=1)


@pytest.mark.parametrize("name", [name for name in RECIPES if tiny.translates(name)])
def test_translations(name, data, tmp_path):
    trained = fit(name, data, tmp_path / "run", steps=2)
    source = data.tensor(slice(6))
    images = translate(trained, source)
    assert images.shape == (6, *data.shape) and images.dtype == torch.uint8
    loaded = sampling.load(tmp_path / "run")
    assert torch.equal(translate(loaded, source), images), "a reloaded model differs"
    apart = translate(trained, source, batch=2).int()
    assert (apart - images.int()).abs().max() <= 2, "a picture depends on its batch"
    with pytest.raises(UserError, match="trilemma translate"):
        trained.sample(1)


@pytest.mark.parametrize("name", [name for name in RECIPES if tiny.enlarges(name)])
def test_enlargements(name, data, tmp_path):
    trained = fit(name, data, tmp_path / "run", steps=2)
    source, factor = data.tensor(slice(6)), trained.model.factor
    images = enlarge(trained, source)
    channels, height, width = data.shape
    assert images.shape == (6, channels, factor * height, factor * width)
    loaded = sampling.load(tmp_path / "run")
    assert torch.equal(enlarge(loaded, source), images), "a reloaded model differs"
    apart = torch.cat([enlarge(trained, part) for part in source.split(2)]).int()
    assert (apart - images.int()).abs().max() <= 2, "a picture depends on its batch"
    with pytest.raises(UserError, match="trilemma upscale"):
        trained.sample(1)


@pytest.mark.parametrize("name", [name for name in RECIPES if tiny.restores(name)])
def test_restorations(name, data, tmp_path):
    changes = [*tiny.overrides(name), "train.grids=1"]
    trained = fit(name, data, tmp_path / "run", steps=2, overrides=changes)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
    source = data.tensor(slice(6))
    images = edit.reconstruct(trained, source)
    assert images.shape == (6, *data.shape) and images.dtype == torch.uint8
    loaded = sampling.load(tmp_path / "run")
    assert torch.equal(edit.reconstruct(loaded, source), images), "a reloaded model differs"
    apart = torch.cat([edit.reconstruct(trained, part) for part in source.split(2)]).int()
    assert (apart - images.int()).abs().max() <= 2, "a picture depends on its batch"
    with pytest.raises(UserError, match="draws no pictures.*trilemma edit reconstruct"):
        trained.sample(1)
    with pytest.raises(UserError, match="restores pictures and draws none"):
        comparison.compare([name], "fashion", budget=1, out=tmp_path / "unused")


@pytest.mark.parametrize("name", [name for name in RECIPES if tiny.repairs(name)])
def test_repairs(name, data, tmp_path):
    changes = [*tiny.overrides(name), "train.grids=1", "sample.steps=2"]
    trained = fit(name, data, tmp_path / "run", steps=2, overrides=changes)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
    images, source = data.tensor(slice(6)), source_of(trained.model)
    loaded = sampling.load(tmp_path / "run")
    if source.kind == "masked":
        mask = torch.zeros(images.shape[2:], dtype=torch.bool)
        mask[:5, 3:] = True

        def draw(model, part, seed=0):
            return redraw.inpaint(model, part, mask, seed=seed, steps=2)[:, 0]

        assert torch.equal(draw(trained, images)[:, :, ~mask], images[:, :, ~mask])
    else:
        images = to_uint8(SOURCES[source.kind](to_float(images), Rng(range(6)), source.factor))

        def draw(model, part, seed=0):
            return redraw.repair(model, part, seed=seed)[:, 0]

    made = draw(trained, images)
    assert made.shape == (6, *data.shape) and made.dtype == torch.uint8
    assert torch.equal(draw(loaded, images), made), "a reloaded model differs"
    apart = torch.cat([draw(trained, images[i : i + 2], i) for i in (0, 2, 4)])
    assert (apart.int() - made.int()).abs().max() <= 2, "a picture depends on its batch"
    with pytest.raises(UserError, match="trilemma edit repair"):
        trained.sample(1)
    with pytest.raises(UserError, match="repairs pictures and draws none"):
        comparison.compare([name], "fashion", budget=1, out=tmp_path / "unused")


@pytest.mark.parametrize("name", [name for name in RECIPES if tiny.classifies(name)])
def test_classifiers(name, data, tmp_path):
    changes = [*tiny.overrides(name), "train.grids=1"]
    trained = fit(name, data, tmp_path / "run", steps=2, overrides=changes)
    assert not trained.draws and not (tmp_path / "run" / "samples").exists()
    with pytest.raises(UserError, match="draws no pictures.*--classifier"):
        trained.sample(1)
    with pytest.raises(UserError, match="tells classes and draws none of its own"):
        comparison.compare([name], "fashion", budget=1, out=tmp_path / "unused")


@pytest.mark.parametrize("name", [name for name in RECIPES if tiny.matches(name)])
def test_matchers(name, data, tmp_path):
    changes = [*tiny.overrides(name), "train.grids=1"]
    trained = fit(name, data, tmp_path / "run", steps=2, overrides=changes)
    assert not trained.draws and not (tmp_path / "run" / "samples").exists()
    images, loaded = data.tensor(slice(6)), sampling.load(tmp_path / "run")
    vectors = retrieval.embed_images(trained, images)
    assert vectors.norm(dim=1).allclose(torch.ones(6), atol=1e-3)
    assert torch.equal(retrieval.embed_images(loaded, images), vectors), "a reloaded model differs"
    apart = torch.cat([retrieval.embed_images(trained, part) for part in images.split(2)])
    assert apart.allclose(vectors, atol=1e-2), "a vector depends on its batch"
    with pytest.raises(UserError, match="draws no pictures.*trilemma search"):
        trained.sample(1)
    with pytest.raises(UserError, match="matches pictures and words and draws none of its own"):
        comparison.compare([name], "fashion", budget=1, out=tmp_path / "unused")


@pytest.mark.parametrize("name", [name for name in RECIPES if tiny.embeds(name)])
def test_priors(name, data, tmp_path):
    trained = fit(name, data, tmp_path / "run", steps=2, overrides=tiny.overrides(name))
    assert not trained.draws and not (tmp_path / "run" / "samples").exists()
    loaded, told = sampling.load(tmp_path / "run").model, Condition(4, text=["red", "blue"] * 2)
    z = loaded.draw(told, Rng(range(4)))
    assert z.norm(dim=1).allclose(torch.ones(4), atol=1e-4) and not torch.equal(z[0], z[2])
    assert torch.equal(trained.model.draw(told, Rng(range(4))), z), "a reloaded model differs"
    apart = torch.cat([loaded.draw(told[i : i + 1], Rng([i])) for i in range(4)])
    assert apart.allclose(z, atol=1e-3), "an embedding depends on its batch"
    with pytest.raises(UserError, match="draws no pictures.*trilemma join"):
        trained.sample(1)
    with pytest.raises(UserError, match="draws embeddings of pictures and draws none of its own"):
        comparison.compare([name], "fashion", budget=1, out=tmp_path / "unused")


@pytest.mark.parametrize("name", RECIPES)
def test_about_is_complete_and_true(name, folders, monkeypatch):
    monkeypatch.chdir(folders[1])
    spec = recipe.load(name)
    about = spec["about"]
    assert {"summary", "paper", "family", "needs", "parameters"} <= about.keys()
    size = about.get("size", 32)
    facts = {"shape": [3, size, size], "channels": 3, "size": size, "classes": 10, "attributes": 0}
    model = recipe.build(recipe.resolve(spec, {**facts, "count": 10_000})["model"])
    assert sum(p.numel() for p in model.parameters()) == about["parameters"]


@pytest.mark.parametrize("name", RECIPES)
def test_an_unknown_option_names_the_accepted_ones(name, data, tmp_path):
    with pytest.raises(UserError, match="no option 'colour'.*it has"):
        fit(name, data, tmp_path / "run", overrides=["model.colour=3"])
    with pytest.raises(UserError, match="no option 'bach'.*did you mean 'batch'"):
        fit(name, data, tmp_path / "run", overrides=["train.bach=3"])
