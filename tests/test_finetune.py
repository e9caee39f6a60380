"""Fine-tuning: what is carried over, what learns, LoRA files, prior preservation."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from trilemma import (
    adapters,
    checkpoint,
    finetune,
    preservation,
    recipe,
    sampling,
    stepping,
    training,
)
from trilemma import cli as command_line
from trilemma.data import load as load_data
from trilemma.errors import Interrupted, UserError
from trilemma.networks import lora

NAME = "quick-diffusion"
LORA = {"mode": "lora", "rank": 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("pictures"), count=30)


@pytest.fixture(scope="module")
def data(pictures):
    return load_data(pictures, split="all")


@pytest.fixture(scope="module")
def others(pictures, tmp_path_factory):
    """The same pictures with the classes class1 and class2, which are known, and new."""
    folder = tmp_path_factory.mktemp("others") / "others"
    shutil.copytree(pictures, folder)
    (folder / "class0").rename(folder / "new")
    return load_data(folder, split="all")


@pytest.fixture(scope="module")
def plain(pictures, tmp_path_factory):
    """Pictures of one subject, without classes."""
    folder = tmp_path_factory.mktemp("plain") / "mug"
    shutil.copytree(pictures / "class0", folder)
    return load_data(folder, split="all")


def fit(data, out, *changes, name=NAME, **options):
    options = {"seed": 3, "quiet": True, "steps": 2, **options}
    overrides = [*tiny.overrides(name), *changes]
    return training.train(name, data, out=out, overrides=overrides, **options)


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    """A run to begin with; its layers that begin at 0 have moved."""
    out = tmp_path_factory.mktemp("first") / "run"
    fit(data, out, "train.ema_halflife=0", steps=8)
    return out


def weights(run):
    return checkpoint.read_model(run)[0]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def carried(data, name, init):
    """Return the state of a model as it begins from a run, and what is remembered of that."""
    spec, facts = recipe.override(recipe.load(name), tiny.overrides(name)), training.facts(data)
    model = recipe.build(recipe.resolve(spec, facts)["model"])
    names = {"classes": data.label_names, "attributes": data.attribute_names}
    remember, _ = finetune.carry(model, spec, facts, names, str(init))
    return model.state_dict(), remember


def begun(trained):
    return trained.recipe["run"]["init"]


LAST = {"mode": "last"}
STILL = ("train.optimizer.lr=0.0", "train.optimizer.adam_lr=0.0")


def test_a_low_rank_layer_begins_as_itself_and_merges_into_what_it_computes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 16, 12))
    x = torch.randn(4, 8, 4, 4)
    before = net(x)
    layers = lora.fitting(net, 2)
    lora.attach(net, layers, 2)
    assert layers == ["0", "2"] and torch.equal(net(x), before)
    for _, _, part in lora.factors(net):
        nn.init.normal_(part.up)
    plain = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 16, 12))
    plain.load_state_dict(lora.merged(net))
    torch.testing.assert_close(plain(x), net(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(net(x), before)
    net(x).sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {
        f"{layer}.parametrizations.weight.0.{own}" for layer in "02" for own in ("down", "up")
    } | {"0.bias", "2.bias"}  # biases are for who calls to hold


def test_factors_stay_in_float32_under_autocast():
    layer = nn.Linear(32, 32, bias=False)
    before = layer.weight.detach().clone()
    lora.attach(layer := nn.Sequential(layer), ["0"], 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer[0].weight, before)


def test_targets_are_names_parts_of_names_or_patterns():
    assert lora.named("network.up.0.expand", ["up"])
    assert lora.named("network.up.0.expand", ["network.up"])
    assert lora.named("network.up.0.expand", ["exp*"])
    assert not lora.named("network.upper.0", ["up"])


@pytest.mark.parametrize("mode", [{}, {"mode": "last"}, LORA])
def test_at_first_the_model_is_the_one_it_began_with(data, first, tmp_path, mode):
    tuned = fit(data, tmp_path / "run", *STILL, steps=1, init=first, tune=mode)
    assert same(weights(first), weights(tmp_path / "run"))
    start = sampling.load(first)
    options = {"seed": 5, "steps": 2}
    assert torch.equal(tuned.sample(4, **options), start.sample(4, **options))
    assert begun(tuned)["new"] == []


@pytest.mark.parametrize(
    "name", ["quick-diffusion", "pixel-transformer", "pixelcnn", "quick-gan", "quick-vae", "dit"]
)
@pytest.mark.parametrize("mode", ["full", "last", "lora"])
def test_modes(name, mode, data, tmp_path):
    fit(data, tmp_path / "first", name=name)
    tune = {"mode": mode, **({"rank": 2} if mode == "lora" else {})}
    run = tmp_path / "run"
    tuned = fit(data, run, "train.ema_halflife=0", name=name, init=tmp_path / "first", tune=tune)
    before, after = weights(tmp_path / "first"), weights(run)
    learn = {n for n, p in before.items() if not torch.equal(p, after[n])}
    buffers = {name for name, _ in tuned.model.named_buffers()}
    assert learn - buffers
    if mode == "lora":
        assert all(n.endswith(".weight") for n in learn - buffers)
    elif mode == "last":
        assert learn - buffers < before.keys() - buffers
    if name in ("quick-diffusion", "quick-gan"):
        options = {"steps": 2} if "steps" in tuned.sample_defaults else {}
        drawn = sampling.load(run).sample(3, seed=1, **options)
        assert (tuned.sample(3, seed=1, **options).int() - drawn.int()).abs().max() <= 2
    if mode == "lora":
        apart = sampling.load(tmp_path / "first", lora=[str(run)])
        merged = apart.model.state_dict()
        assert merged.keys() == after.keys()
        for key, value in merged.items():
            torch.testing.assert_close(value, after[key], rtol=1e-5, atol=1e-5)


def test_only_factors_take_gradients(data, first, tmp_path, monkeypatch):
    seen = set()
    take = stepping.take

    def look(run, phase, batch, rate):
        loss = phase.loss(batch)["loss"]
        loss.backward()
        seen.update(n for n, p in run.model.named_parameters() if p.grad is not None)
        run.model.zero_grad(set_to_none=True)
        return take(run, phase, batch, rate)

    monkeypatch.setattr(stepping, "take", look)
    fit(data, tmp_path / "run", init=first, tune={**LORA, "targets": ["up", "conv_out"]})
    assert seen and all(n.endswith(("weight.0.up", "weight.0.down")) for n in seen)
    assert all(".up." in n or "conv_out" in n for n in seen)


def test_two_are_put_on_with_weights_and_add_up(data, first, tmp_path):
    for seed in (1, 2):
        fit(data, tmp_path / f"{seed}", seed=seed, init=first, tune=LORA)
    base = weights(first)
    files = [f"{tmp_path / f'{seed}' / 'lora.safetensors'}" for seed in (1, 2)]
    one, two = (sampling.load(first, lora=[file]).model.state_dict() for file in files)
    both = sampling.load(first, lora=[f"{files[0]}:0.5", f"{files[1]}:-2"])
    assert not same(one, base)
    for key, value in both.model.state_dict().items():
        added = base[key] + 0.5 * (one[key] - base[key]) - 2 * (two[key] - base[key])
        torch.testing.assert_close(value, added, rtol=1e-5, atol=1e-5)
    assert both.recipe["run"]["lora"] == [f"{files[0]}:0.5", f"{files[1]}:-2"]
    nothing = sampling.load(first, lora=[f"{files[0]}:0"])
    assert same(nothing.model.state_dict(), base)
    out = adapters.merge(first, [files[0]], tmp_path / "merged.safetensors")
    assert same(weights(out), one)
    with pytest.raises(UserError, match="name of a new .safetensors file"):
        adapters.merge(first, [files[0]], out)
    with pytest.raises(UserError, match="nothing to merge"):
        adapters.merge(first, [], tmp_path / "other.safetensors")


def test_classes_are_carried_over_by_name(others, first, tmp_path, capsys):
    tuned = fit(others, tmp_path / "run", *STILL, steps=1, init=first, quiet=False)
    assert others.label_names == ["class1", "class2", "new"]
    old, new = (w["conditioner.table.weight"] for w in (weights(first), weights(tmp_path / "run")))
    assert torch.equal(new[:2], old[1:3]) and torch.equal(new[3], old[3])
    torch.testing.assert_close(new[2], old[:3].mean(0))
    assert begun(tuned)["new"] == ["conditioner.table.weight"]
    told = capsys.readouterr().err
    assert "classes kept: class1, class2; new classes, from the mean of the old: new" in told


@pytest.mark.parametrize("name", ["quick-gan", "quick-vae", "pixel-transformer", "progan", "glow"])
def test_inputs_beside_the_classes_keep_their_place(name, data, others, tmp_path):
    old, new = weights(_first(name, data, tmp_path)), carried(others, name, tmp_path / name)[0]
    key, dim, extra = {
        "quick-gan": ("generator.first.weight", 1, 64),
        "quick-vae": ("decoder.layers.0.weight", 1, 64),
        "pixel-transformer": ("start.weight", 1, 0),
        "progan": ("critic.score.weight", 0, 1),
        "glow": ("prior", 0, 0),
    }[name]
    was, now = old[key].movedim(dim, 0), new[key].movedim(dim, 0)
    assert torch.equal(now[:extra], was[:extra])
    assert torch.equal(now[extra : extra + 2], was[extra + 1 :])
    torch.testing.assert_close(now[extra + 2], was[extra:].mean(0))


def test_a_lora_brings_new_classes_with_it(others, first, tmp_path):
    tuned = fit(others, tmp_path / "run", init=first, tune=LORA)
    assert tuned.data["label_names"] == others.label_names
    apart = sampling.load(first, lora=[str(tmp_path / "run")])
    assert apart.data["label_names"] == others.label_names
    for key, value in apart.model.state_dict().items():
        torch.testing.assert_close(value, weights(tmp_path / "run")[key], rtol=1e-5, atol=1e-5)
    fit(others, tmp_path / "two", init=first, tune=LORA, seed=9)
    with pytest.raises(UserError, match="both bring conditioner.table.weight"):
        sampling.load(first, lora=[str(tmp_path / "run"), str(tmp_path / "two")])


def test_another_size_keeps_weights_and_positions_are_interpolated(pictures, data, tmp_path):
    larger = load_data(pictures, split="all", size=24)
    name = "pixel-transformer"
    start = _first(name, data, tmp_path)
    state, remember = carried(larger, name, start)
    old, new = weights(start)["position.weight"], state["position.weight"]
    assert remember["new"] == ["position.weight"] and len(new) == 24 * 24 * 3
    torch.testing.assert_close(new[[0, -1]], old[[0, -1]])  # the corners
    assert fit(larger, tmp_path / "run", name=name, init=start).progress["step"] == 2
    _, remember = carried(larger, "dit", _first("dit", data, tmp_path))
    assert remember["new"] == []


def _first(name, data, tmp_path):
    return fit(data, tmp_path / name, name=name).path


def test_what_does_not_fit_begins_anew_and_is_told(plain, first, tmp_path, capsys):
    out = tmp_path / "run"
    tuned = fit(plain, out, "model.network.patch=2", init=first, quiet=False, tune=LAST)
    told = capsys.readouterr().err
    assert "3 begin anew: network.conv_in.weight (16, 12, 3, 3) was (16, 3, 3, 3)" in told
    assert "1 of the run are not used: conditioner.table.weight" in told
    assert begun(tuned)["new"][0] == "network.conv_in.weight"
    before, after = weights(first), weights(out)
    assert torch.equal(before["network.time.0.weight"], after["network.time.0.weight"])


def test_a_part_of_a_larger_model_can_begin_from_a_run_of_its_own(data, tmp_path):
    start = _first("srresnet", data, tmp_path)
    state, remember = carried(data, "srgan", start)
    assert all(torch.equal(state[name], value) for name, value in weights(start).items())
    assert all(name.startswith("critic.") for name in remember["new"])


def test_refusals(data, first, tmp_path):
    def refused(match, *changes, name=NAME, **options):
        with pytest.raises(UserError, match=match):
            fit(data, tmp_path / "run", *changes, name=name, **options)

    wider = ["model.network.channels=[32,48]", "model.network.embedding_dim=64"]
    wider.append("model.conditioner.dim=64")
    refused(r"run is a models.diffusion.Diffusion of networks.quick_unet.QuickUNet; this recipe "
            r"builds .* numbers fit \(network.time.0.weight \(64, 64\) was \(128, 64\), ",
            *wider, init=first)  # fmt: skip
    refused("begins with a trained run; say which: --init RUN", tune=LORA)
    refused("mode 'some' is not one of full, last, lora", init=first, tune={"mode": "some"})
    refused("targets choose what learns in mode last or lora", init=first, tune={"targets": ["up"]})
    refused("rank 0", init=first, tune={"mode": "lora", "rank": 0})
    refused("no option 'ranks'.*did you mean 'rank'", init=first, tune={"ranks": 2})
    refused("upp: no layer to tune with --tune lora --rank 2; it has network.time.0", init=first,
            tune={**LORA, "targets": ["upp"]})  # fmt: skip
    refused("the model: no layer to tune with --tune lora --rank 4000", init=first,
            tune={"mode": "lora", "rank": 4000})  # fmt: skip
    fit(data, tmp_path / "gan", name="quick-gan")
    refused("nothing learns in phase 'critic'; name some of its layers too.*critic",
            name="quick-gan", init=tmp_path / "gan",
            tune={"mode": "last", "targets": ["generator"]})  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_lora_for_another_network_is_refused(data, first, tmp_path, caplog):
    fit(data, tmp_path / "lora", init=first, tune=LORA)
    file = tmp_path / "lora" / "lora.safetensors"
    fit(data, tmp_path / "wide", "model.network.channels=[32,48]")
    with pytest.raises(UserError, match=r"for another network than .*wide: of its \d+ layers .*"
                       r"\(16, 27\) is \(32, 27\).*give the run it was trained on"):  # fmt: skip
        sampling.load(tmp_path / "wide", lora=[str(file)])
    fit(data, tmp_path / "gan", name="quick-gan")
    with pytest.raises(UserError, match="network.time.0.* is not there"):
        sampling.load(tmp_path / "gan", lora=[str(file)])
    with pytest.raises(UserError, match="is a whole model and no LoRA"):
        sampling.load(first, lora=[str(first / "model.safetensors")])
    with pytest.raises(UserError, match="is a LoRA, which changes a model and is none; .*--lora"):
        sampling.load(file)
    with pytest.raises(UserError, match="is a LoRA, which changes a model and is none"):
        fit(data, tmp_path / "more", init=file)
    with pytest.raises(UserError, match="expected the lora.safetensors of a run trained with"):
        sampling.load(first, lora=[str(tmp_path / "wide")])
    tensors, facts = checkpoint.read(file)
    down = next(name for name in tensors if name.startswith("down."))
    longer = {**tensors, down: torch.zeros(5, tensors[down].shape[1])}
    lacking = {name: tensor for name, tensor in tensors.items() if name != down}
    for damaged in (longer, lacking):
        checkpoint.write(tmp_path / "damaged.safetensors", damaged, facts)
        with pytest.raises(UserError, match=f"no factors of {down[5:]} that fit each other"):
            sampling.load(first, lora=[str(tmp_path / "damaged.safetensors")])
    checkpoint.write(tmp_path / "damaged.safetensors", tensors, {**facts, "lora": {}})
    with pytest.raises(UserError, match="does not tell base, base_path"):
        sampling.load(first, lora=[str(tmp_path / "damaged.safetensors")])
    assert not caplog.records
    fit(data, tmp_path / "like", seed=8)
    sampling.load(tmp_path / "like", lora=[str(file)])
    assert "same networks with other weights" in caplog.text


def test_weights_of_lora_files_are_read_after_the_last_colon():
    assert adapters.parse("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert adapters.parse("a.safetensors") == ("a.safetensors", 1.0)
    assert adapters.parse("C:\\a.safetensors") == ("C:\\a.safetensors", 1.0)
    assert adapters.parse("a:-1") == ("a", -1.0)
    for weight in ("nan", "inf"):
        with pytest.raises(UserError, match="expected a finite weight"):
            adapters.parse(f"a.safetensors:{weight}")


@pytest.mark.parametrize(
    "tune",
    [{}, {"mode": "last", "preserve": 5}, {**LORA, "preserve": 5}],
    ids=["full", "last", "lora"],
)
def test_a_resumed_fine_tuning_is_the_same_and_needs_its_first_run_no_more(
    plain, first, tmp_path, tune
):
    def stop(trained, elapsed):
        if trained.progress["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    begin = tmp_path / "begin"
    shutil.copytree(first, begin)
    options = {"steps": 6, "init": begin, "tune": tune}
    whole = fit(plain, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        fit(plain, tmp_path / "parts", probe=stop, probes=6, **options)
    shutil.rmtree(begin)
    parts = fit(plain, tmp_path / "parts", steps=6, resume=True)
    assert same(whole.model.state_dict(), parts.model.state_dict())
    assert same(weights(whole.path), weights(parts.path))
    assert sampling.load(parts.path).sample(2, steps=2).shape == (2, *plain.shape)


def test_preserved_pictures_are_the_first_runs_own_and_a_share_of_each_batch(
    plain, first, tmp_path
):
    changes = ["train.batch=8", "finetune.preserve_weight=0.5"]
    tuned = fit(plain, tmp_path / "run", *changes, init=first, tune={"preserve": 6})
    names = ["mug", "class0", "class1", "class2"]
    assert tuned.data["label_names"] == names
    data = preservation.with_classes(plain, preservation.classes_of(first))
    drawn = preservation.kept(tmp_path / "run", data)
    assert np.array_equal(drawn.images, sampling.load(first).sample(6, seed=3).numpy())
    assert [names[i] for i in drawn.label] == ["class0", "class1", "class2"] * 2
    count = preservation.share(8, 0.5, 1)
    given, place = (data, tuned.path, 8), {"seed": 0, "flip": False, "rank": 0, "world": 1}
    stream = preservation.mixed(*given, 0.5, start=0, **place)
    first_batch, second = next(stream), next(stream)
    assert count == 3 and len(first_batch) == 8 and second.seen == 8
    assert (
        first_batch.condition.label[:5].eq(0).all() and first_batch.condition.label[5:].gt(0).all()
    )
    assert len(set(first_batch.rng.seeds.tolist())) == 8
    again = next(preservation.mixed(*given, 0.5, start=8, **place))
    assert torch.equal(again.image, second.image)
    assert torch.equal(again.rng.seeds, second.rng.seeds)
    halves = [
        next(preservation.mixed(*given, 1.0, start=0, **{**place, "rank": r, "world": 2}))
        for r in (0, 1)
    ]
    assert [len(half) for half in halves] == [4, 4]
    assert all(half.condition.label.eq(0).sum() == 2 for half in halves)


def test_preservation_refuses_what_it_cannot_draw(data, plain, first, tmp_path):
    start = _first("ddpm", data, tmp_path)  # knows no classes
    with pytest.raises(UserError, match="has classes and the model to begin with knows none"):
        fit(data, tmp_path / "a", name="ddpm", init=start, tune={"preserve": 2})
    start = _first("dcgan", data, tmp_path)
    fit(plain, tmp_path / "c", name="dcgan", init=start, tune={"preserve": 2})
    assert preservation.kept(tmp_path / "c", plain).label is None
    with pytest.raises(UserError, match="no room for a drawn picture"):
        fit(plain, tmp_path / "b", "train.batch=1", init=first, tune={"preserve": 2})


def test_the_recipe_may_say_it_and_so_may_the_command_line(
    pictures, first, tmp_path, monkeypatch, capsys
):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["trilemma", *map(str, arguments)])
        try:
            command_line.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    changes = [part for change in tiny.overrides(NAME) for part in ("--set", change)]
    common = ["train", NAME, "--data", pictures, "--steps", 1, *changes]
    said = ["--init", first, "--tune", "lora", "--rank", 2, "--targets", "up, middle"]
    code, _, err = run(*common, "--out", tmp_path / "a", *said, "--preserve", 2)
    assert code == 0, err
    assert "weights of" in err and "carried over" in err and "factors of rank 2 for" in err
    sets = ["mode=lora", "rank=2", 'targets=["up","middle"]', "preserve=2"]
    sets = [part for each in (f"init={first}", *sets) for part in ("--set", f"finetune.{each}")]
    code, _, err = run(*common, "--out", tmp_path / "b", *sets)
    assert code == 0, err
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    file = tmp_path / "a" / "lora.safetensors"
    draw = ["sample", first, "-n", 2, "--steps", 2, "--out", tmp_path / "pictures", "--json"]
    code, out, err = run(*draw, "--lora", f"{file}:0.5", "--lora", f"{file}:0.5")
    assert code == 0 and len(json.loads(out)["images"]) == 2, err
    merged = tmp_path / "merged.safetensors"
    code, out, _ = run("merge", first, "--lora", file, "--out", merged, "--json")
    assert code == 0 and json.loads(out) == {"model": str(merged)}
    code, out, _ = run("sample", merged, *draw[2:])
    assert code == 0
