"""A trained run inside another model: held still, carried along, and named when it cannot be."""

from __future__ import annotations

import shutil
import sys
import types

import pytest
import torch
from torch import nn

import tiny
from trilemma import checkpoint, recipe, sampling, training
from trilemma.data import load as load_data
from trilemma.errors import Interrupted, UserError
from trilemma.model import Frozen, Model, Phase

CODES = """
[model]
type = "models.stand_in.Blocks"
channels = "@channels"
[train]
batch = 8
grids = 0
"""

PRIOR = """
[model]
type = "models.autoregressive.Autoregressive"
classes = "@classes"
[model.codec]
type = "codecs.CodeTokens"
shape = "@shape"
tokenizer = { type = "trained", path = "" }
[model.network]
type = "networks.transformer.CausalTransformer"
width = 16
layers = 1
heads = 2
[train]
batch = 8
grids = 0
ema_halflife = 40
[sample]
temperature = 1.0
"""


class Blocks(Model):
    """The smallest VQ-VAE: a block of 4 x 4 pixels is told by its grey, the colour is learned."""

    codebook_size, code_shape = 5, (4, 4)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.colour = nn.Parameter(torch.ones(channels))
        self.register_buffer("seen", torch.zeros(()))

    def phases(self):
        return [Phase("colour", self.loss, [self])]

    def loss(self, batch):
        self.seen += len(batch)
        drawn = self.from_codes(self.codes(batch.image))
        return {"loss": (drawn - batch.image).square().mean()}

    def codes(self, image):
        grey = nn.functional.avg_pool2d(image.mean(1, keepdim=True), 4)[:, 0]
        return ((grey + 1) * 2.499).long()

    def from_codes(self, codes):
        grey = (codes[:, None] / 2 - 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return grey * self.colour[:, None, None]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_data(tiny.pictures(tmp_path_factory.mktemp("pictures")), split="all")


@pytest.fixture
def fit(data, tmp_path, monkeypatch):
    """Return a function that trains a recipe into a folder; the stand-in can be built."""
    module = types.ModuleType("trilemma.models.stand_in")
    module.Blocks = Blocks
    monkeypatch.setattr(Blocks, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "codes.toml").write_text(CODES)
    (tmp_path / "prior.toml").write_text(PRIOR)

    def train(name, out, *overrides, **options):
        return training.train(
            tmp_path / f"{name}.toml",
            data,
            out=tmp_path / out,
            overrides=overrides,
            seed=1,
            quiet=True,
            **{"steps": 6, **options},
        )

    return train


@pytest.fixture
def codes(fit, tmp_path):
    fit("codes", "codes")
    return tmp_path / "codes"


def using(path):
    return f'model.codec.tokenizer.path="{path}"'


def test_a_prior_carries_its_tokenizer(fit, codes, tmp_path):
    theirs = checkpoint.read_model(codes)[0]
    assert (theirs["colour"] != 1).all(), "the stand-in has learned nothing"
    prior = fit("prior", "prior", using(codes))
    shutil.rmtree(codes)
    ours = checkpoint.read_model(tmp_path / "prior")[0]
    for name, tensor in theirs.items():
        assert torch.equal(ours[f"codec.tokenizer.module.{name}"], tensor), name
    loaded = sampling.load(tmp_path / "prior")
    assert torch.equal(loaded.sample(4, seed=3), prior.sample(4, seed=3))
    assert loaded.conditional


def test_what_is_frozen_does_not_learn(fit, codes, data):
    spec = recipe.override(recipe.load(codes.parent / "prior.toml"), [using(codes)])
    model = recipe.build(recipe.resolve(spec, training.facts(data))["model"]).train()
    training.load_frozen(model)
    frozen = model.codec.tokenizer
    assert isinstance(frozen, Frozen) and not frozen.module.training
    assert torch.equal(frozen.module.colour, checkpoint.read_model(codes)[0]["colour"])
    assert not any(p.requires_grad for p in frozen.parameters())
    (phase,) = model.phases()
    learn = {id(p) for module in phase.modules for p in module.parameters()}
    assert learn == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_resumed_run_keeps_what_is_frozen(fit, codes, tmp_path):
    """Bit for bit, even when the tokenizer was trained further in between."""

    def stop(trained, elapsed):
        raise Interrupted("as by Ctrl-C")

    whole = fit("prior", "whole", using(codes))
    with pytest.raises(Interrupted):
        fit("prior", "parts", using(codes), "train.save_every=0", probe=stop, probes=2)
    fit("codes", "codes", steps=12, resume=True)
    parts = fit("prior", "parts", using(codes), "train.save_every=0", resume=True)
    one, two = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_goes_on_when_the_tokenizer_is_gone(fit, codes, tmp_path):
    def stop(trained, elapsed):
        raise Interrupted("as by Ctrl-C")

    whole = fit("prior", "whole", using(codes))
    with pytest.raises(Interrupted):
        fit("prior", "parts", using(codes), "train.save_every=0", probe=stop, probes=2)
    shutil.rmtree(codes)
    parts = fit("prior", "parts", using(codes), "train.save_every=0", resume=True)
    one, two = whole.model.state_dict(), parts.model.state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(UserError, match="codes is not there"):
        fit("prior", "anew", using(codes))
    with pytest.raises(UserError, match="elsewhere is not there"):
        fit("prior", "parts", using(tmp_path / "elsewhere"), resume=True)


def test_a_run_that_cannot_be_used_is_named(fit, data, tmp_path):
    told = r"nowhere is not there.*train RECIPE --data ... --out .*set model.codec.tokenizer.path="
    with pytest.raises(UserError, match=told):
        fit("prior", "a", using(tmp_path / "nowhere"))
    with pytest.raises(UserError, match='"trained" needs the path of a run'):
        fit("prior", "a", "model.codec.tokenizer.paht=1")
    small = tiny.overrides("ae")
    training.train("ae", data, out=tmp_path / "ae", steps=1, quiet=True, overrides=small)
    with pytest.raises(UserError, match="a trained AE, which has no codes; give the run of a VQ"):
        fit("prior", "a", using(tmp_path / "ae"))


def test_pictures_of_another_shape_are_named(fit, codes, data):
    spec = recipe.override(recipe.load(codes.parent / "prior.toml"), [using(codes)])
    other = {**training.facts(data), "shape": [3, 8, 8]}
    with pytest.raises(UserError, match=r"\[3, 16, 16\] and these are \[3, 8, 8\].*--size 16"):
        recipe.resolve(spec, other)
