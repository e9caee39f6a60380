"""CycleGAN: known values of its losses, the history's laws, the patch, resuming, translating."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys

import pytest
import torch
from PIL import Image
from torch import nn

import tiny
from trilemma import cli, compare, drawing, evaluate, sampling, stepping, training
from trilemma.batch import Batch, Condition, Rng
from trilemma.data import load as load_data
from trilemma.errors import Interrupted, UserError
from trilemma.models.cyclegan import CycleGAN, History
from trilemma.networks.layers import GroupNorm
from trilemma.networks.patchgan import Critic
from trilemma.networks.resnet_generator import Generator, Residual
from trilemma.settings import SCHEDULES
from trilemma.translation import translate

SHAPE = (3, 16, 16)


class Constant(nn.Module):
    """A critic of one opinion."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def forward(self, image):
        return torch.full((len(image), 1, 2, 2), self.score)


def make(**options):
    torch.manual_seed(0)
    generators = [Generator(SHAPE, channels=4, blocks=1) for _ in range(2)]
    critics = [Critic(SHAPE, channels=4, depth=2) for _ in range(2)]
    return CycleGAN(SHAPE, *generators, *critics, **options)


def batch(count=8, seed=0):
    """Images of A from seeds, of B from others."""
    a = Rng(range(seed, seed + count)).uniform(*SHAPE) * 2 - 1
    b = Rng(range(seed + 10_000, seed + 10_000 + count)).uniform(*SHAPE) * 2 - 1
    return Batch(b, Condition(count, source=a), seed, Rng(range(seed, seed + count)))


def test_cycle_and_identity_vanish_for_identities():
    model = CycleGAN(SHAPE, nn.Identity(), nn.Identity(), Constant(0.25), Constant(0.25))
    losses = model.generator_loss(batch())
    assert losses["cycle"] == losses["identity"] == 0
    assert losses["loss"] == losses["game"] == 2 * 0.75**2


def test_least_squares():
    model = CycleGAN(SHAPE, nn.Identity(), nn.Identity(), Constant(1.0), Constant(0.5))
    losses = model.critic_loss(batch())
    assert losses["a"] == 0.5, "sure of every image, right about half of them"
    assert losses["b"] == 0.25, "without an opinion"
    assert losses["loss"] == 0.75


def test_weights_of_the_losses():
    """G and F halve an image: the cycle leaves a quarter of it, the identity a half."""

    class Half(nn.Module):
        def forward(self, image):
            return image / 2

    model = CycleGAN(SHAPE, Half(), Half(), Constant(1.0), Constant(1.0), cycle=10, identity=0.5)
    size = batch().image.abs().mean() + batch().condition.source.abs().mean()
    losses = model.generator_loss(batch())
    assert losses["cycle"] == pytest.approx(0.75 * float(size))
    assert losses["identity"] == pytest.approx(0.5 * float(size))
    assert losses["loss"] == pytest.approx((10 * 0.75 + 5 * 0.5) * float(size))
    model.identity = 0.0
    assert "identity" not in model.generator_loss(batch())


def test_each_domain_has_its_own_players():
    """Without cycles, and with nothing to be learned from A's critic, only G: A -> B learns."""
    model = make(cycle=0.0)
    model.critic_a = Constant(1.0)
    model.generator_loss(batch())["loss"].backward()
    assert any(p.grad.abs().sum() > 0 for p in model.a_to_b.parameters() if p.grad is not None)
    assert all(p.grad is None or not p.grad.any() for p in model.b_to_a.parameters())


def numbered(start, count):
    return torch.arange(start, start + count).float()[:, None, None, None].expand(-1, 1, 2, 2)


def test_history_returns_what_it_was_given_half_of_it_new():
    history, returned = History((1, 2, 2), 50), []
    for start in range(0, 1000, 4):
        shown = history(numbered(start, 4), Rng(range(start, start + 4)))
        assert (shown == shown[:, :1, :1, :1]).all(), "an image came back in pieces"
        returned.append(shown[:, 0, 0, 0])
    shown = torch.cat(returned)
    given = torch.arange(1000).float()
    assert torch.equal(shown[:50], given[:50]), "as long as there is room, new ones"
    assert (shown <= given).all() and (shown == shown.round()).all()
    assert 0.45 < (shown == given)[50:].float().mean() < 0.55
    older = shown[50:][shown[50:] != given[50:]]
    assert len(older.unique()) == len(older), "an image that was taken out came back again"
    assert len(history.images[:, 0, 0, 0].unique()) == 50


def test_history_does_not_depend_on_parts():
    whole, parts = History((1, 2, 2), 5), History((1, 2, 2), 5)
    for start in range(0, 60, 6):
        rng, fresh = Rng(range(start, start + 6)), numbered(start, 6)
        shown = [parts(fresh[k : k + 2], rng[slice(k, k + 2)]) for k in (0, 2, 4)]
        assert torch.equal(torch.cat(shown), whole(fresh, rng))
    assert torch.equal(whole.images, parts.images) and whole.count == parts.count == 5


def test_history_of_none_and_of_broken_images():
    history = History((1, 2, 2), 0)
    assert torch.equal(history(numbered(0, 3), Rng(range(3))), numbered(0, 3))
    history = History((1, 2, 2), 5)
    history(numbered(0, 3) * float("nan"), Rng(range(3)))
    assert history.count == 0
    with pytest.raises(ValueError, match="history is -1"):
        make(history=-1)


def test_losses_do_not_depend_on_the_split():
    whole, parts = make(history=5), make(history=5)
    for step in range(3):
        now = batch(8, 8 * step)
        for name in ("generator_loss", "critic_loss"):
            pieces = [getattr(parts, name)(part)["loss"] for part in now.split(4)]
            loss = getattr(whole, name)(now)["loss"]
            assert torch.allclose(torch.stack(pieces).mean(), loss, rtol=1e-4)
    assert torch.allclose(whole.history_a.images, parts.history_a.images, atol=1e-5)


def test_losses_leave_torchs_generator_alone():
    model = make()
    before = torch.random.get_rng_state()
    model.critic_loss(batch())
    model.generator_loss(batch())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("depth", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_patch_is_what_a_score_sees(depth, patch):
    critic = Critic((1, 128, 128), channels=2, depth=depth)
    for i, layer in enumerate(critic.layers):
        if isinstance(layer, GroupNorm):  # instance normalisation sees everything
            critic.layers[i] = nn.Identity()
    image = torch.randn(1, 1, 128, 128, requires_grad=True)
    scores = critic(image)
    side = 128 // 2**depth - 2
    assert scores.shape == (1, 1, side, side)
    scores[0, 0, side // 2, side // 2].backward()
    seen = image.grad[0, 0] != 0
    assert seen.any(0).sum() == seen.any(1).sum() == patch


def test_the_papers_critic_is_the_default():
    widths = [m.out_channels for m in Critic((3, 256, 256)).layers if isinstance(m, nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1]


@pytest.mark.parametrize(("size", "blocks"), [(64, 6), (128, 6), (256, 9)])
def test_residual_blocks_by_size(size, blocks):
    generator = Generator((1, size, size), channels=2)
    assert sum(isinstance(layer, Residual) for layer in generator.layers) == blocks


def test_the_papers_generator_has_its_number_of_weights():
    """11.38 million with 9 blocks, as published; instance norm's gains in place of biases."""
    count = sum(p.numel() for p in Generator((3, 256, 256)).parameters())
    assert 11.37e6 < count < 11.39e6


def test_translations_have_the_shape_of_their_source():
    image = torch.rand(2, 3, 12, 20) * 2 - 1
    made = Generator((3, 12, 20), channels=4, blocks=1)(image)
    assert made.shape == image.shape and made.abs().max() <= 1


def test_a_generator_with_a_skip_begins_at_its_image_and_learns():
    image = torch.rand(2, 3, 12, 20) * 2.1 - 1.05  # black and white among the pixels
    image.clamp_(-1, 1)
    generator = Generator((3, 12, 20), channels=4, blocks=1, skip=True)
    made = generator(image)
    assert (made - image).abs().max() <= 0.0101
    made.mean().backward()
    assert generator.layers[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Generator((3, 18, 16)), "18 x 16.*multiples of 4"),
        (lambda: Critic((3, 16, 16), depth=3), "24 pixels or more.*16 x 16.*depth=2"),
        (lambda: Critic((3, 16, 16), depth=0), "depth is 0"),
    ],
)
def test_sizes_that_do_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_linear_half():
    factor = SCHEDULES["linear-half"]
    assert [factor(done) for done in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    changes = [*tiny.overrides("cyclegan"), "train.grids=1"]
    training.train("cyclegan", folder, out=out, steps=2, quiet=True, overrides=changes)
    return sampling.load(out)


def test_a_is_the_source_and_b_the_image(folder):
    data = load_data(folder)
    assert len(data.source) == 12 and len(data) == 10
    assert data.source.mean() < 100 < 150 < data.images.mean()


def test_directions_are_the_two_generators(run, folder):
    images = load_data(folder).tensor(slice(3))
    there, back = translate(run, images), translate(run, images, "b-to-a")
    assert not torch.equal(there, back)
    model = run.model
    model.a_to_b, model.b_to_a = model.b_to_a, model.a_to_b
    assert torch.equal(translate(run, images), back)
    model.a_to_b, model.b_to_a = model.b_to_a, model.a_to_b
    assert translate(run, images[:0]).shape == (0, *SHAPE)


def test_sheet_shows_fixed_pictures_of_both_domains(run, folder):
    sheets = list((run.path / "samples").glob("*.png"))
    assert len(sheets) == 1
    sheet = Image.open(sheets[0])
    data = load_data(folder)
    step = SHAPE[2] + 2
    assert sheet.size == (8 * step - 2, 6 * step - 2)  # 12 of A, 10 of B, 4 to a row
    first = sheet.crop((0, 0, 16, 16))
    assert first.tobytes() == drawing.to_pil(torch.from_numpy(data.source[0].copy())).tobytes()
    first = sheet.crop((0, 3 * step, 16, 3 * step + 16))
    assert first.tobytes() == drawing.to_pil(data.tensor([0])[0]).tobytes()


def test_resuming_goes_on_with_the_history(folder, tmp_path):
    """A history of 3 and batches of 8: every step takes images from before the interruption."""

    def stop(trained, elapsed):
        if trained.progress["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    def fit(out, **options):
        changes = [*tiny.overrides("cyclegan"), "model.history=3", "train.accumulate=2"]
        options = {"steps": 5, "seed": 1, "quiet": True, **options}
        return training.train("cyclegan", folder, out=out, overrides=changes, **options)

    whole = fit(tmp_path / "whole").model.state_dict()
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", probe=stop, probes=5)
    parts = fit(tmp_path / "parts", resume=True).model.state_dict()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert whole["history_a.count"] == 3 and whole["history_a.images"].abs().sum() > 0


def test_it_learns_to_turn_dark_into_bright():
    """A is dark, B is bright, with a texture each: after a short training so are translations."""
    model = make(identity=0.0)
    phases = model.phases()
    optimizers = [
        torch.optim.Adam([p for m in phase.modules for p in m.parameters()], 2e-3, (0.5, 0.99))
        for phase in phases
    ]

    def scene(step):
        now = batch(8, 8 * step)
        source = 0.2 * now.condition.source - 0.6
        return Batch(0.2 * now.image + 0.6, Condition(8, source=source), now.seen, now.rng)

    for step in range(100):
        for phase, optimizer in zip(phases, optimizers, strict=True):
            with stepping.only_these_learn(model, phase.modules, {"a": 0, "b": 0}):
                phase.loss(scene(step))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    now = scene(100)
    bright = model.sample(now.condition, now.rng)
    dark = model.sample(Condition(8, source=now.image), now.rng, direction="b-to-a")
    assert bright.mean() > 0.3 and dark.mean() < -0.3


def test_translate_command(run, folder, tmp_path, monkeypatch, capsys):
    def call(*arguments):
        command = ["translate", str(run.path), str(folder / "trainA"), "--json", *arguments]
        monkeypatch.setattr(sys, "argv", ["trilemma", *command])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr()

    out = tmp_path / "out"
    code, told = call("--out", str(out), "--direction", "b-to-a")
    assert not code
    made = json.loads(told.out)["images"]
    assert len(made) == 12 and Image.open(made[0]).size == (16, 16)
    facts = json.loads(Image.open(made[0]).text["trilemma"])
    assert facts["translate"] == "b-to-a" and len(facts["pictures"]) == 12
    code, told = call("--out", str(out), "--direction", "up")
    assert code == 1 and "use a-to-b or b-to-a" in told.err


def test_what_translates_does_not_draw(run, folder, tmp_path):
    for attempt in (
        lambda: run.sample(1),
        lambda: list(drawing.save(run, 1, tmp_path / "out")),
        lambda: evaluate(run, folder, n=2, features="pixels"),
        lambda: compare(["cyclegan"], folder, out=tmp_path / "both", budget=1, quiet=True),
    ):
        with pytest.raises(UserError, match="trilemma translate"):
            attempt()
    assert not (tmp_path / "out").exists() and not (tmp_path / "both").exists()


def test_what_draws_does_not_translate(folder, tmp_path):
    other = training.train(
        "quick-gan", folder, out=tmp_path / "run", steps=1, quiet=True,
        overrides=tiny.overrides("quick-gan"),
    )  # fmt: skip
    with pytest.raises(UserError, match="quick-gan draws pictures and translates none"):
        translate(other, torch.zeros(1, *SHAPE, dtype=torch.uint8))


def test_pictures_of_another_shape(run):
    with pytest.raises(UserError, match="trained on uint8 pictures of"):
        translate(run, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="needs those of domain A"):
        run.model.sample(Condition(1), Rng([0]))


def test_data_of_one_domain(folder, tmp_path):
    def fit(data):
        training.train("cyclegan", data, out=tmp_path / "run", steps=1, quiet=True)

    with pytest.raises(UserError, match="two domains.*one.*trainA and trainB"):
        fit(tiny.pictures(tmp_path / "classes"))
    with pytest.raises(UserError, match="two domains.*one.*trainA and trainB"):
        fit(folder / "trainA")
    shutil.copytree(folder / "trainA", tmp_path / "half" / "trainA")
    shutil.copytree(folder / "trainA", tmp_path / "half" / "testA")
    (tmp_path / "half" / "trainB").mkdir()
    with pytest.raises(UserError, match="pictures in trainA and none in trainB"):
        fit(tmp_path / "half")
    shutil.copytree(folder, tmp_path / "bad")
    for path in (tmp_path / "bad" / "trainA").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="two domains.*one"):
        fit(tmp_path / "bad")
    assert not (tmp_path / "run").exists()
