"""Inverting a generator: what it drew is found again, with its label, whatever is beside it."""

import math

import pytest
import torch

from trilemma.batch import Condition, Rng
from trilemma.models import inversion
from trilemma.models.gan import GAN
from trilemma.models.inversion import SLACK, invert, split
from trilemma.models.progan import ProGAN
from trilemma.networks import dcgan, progan

SHAPE = (1, 8, 8)
DIMS, CLASSES = 6, 3


class Linear:
    """x = tanh(A z + B y): of one z and y only, since A and B have full rank."""

    def __init__(self, labels=0):
        rng = Rng([1, 2])
        self.matrix = rng.normal(64, DIMS)[0] / 8
        self.label = rng.normal(64, labels)[1] / 2

    def __call__(self, latent, label):
        image = (latent @ self.matrix.T + label @ self.label.T).tanh()
        return image.view(-1, *SHAPE)


def drawn(count, labels=None, seed=5):
    """Latents on the shell, and images."""
    rng = Rng(range(seed, seed + count))
    latent = inversion._on_shell(rng.normal(DIMS))
    label = torch.zeros(count, 0) if labels is None else labels
    return latent, Linear(label.shape[1])(latent, label)


def test_the_latent_of_a_drawn_picture_is_found():
    latent, image = drawn(5)
    assert (invert(Linear(), image, DIMS) - latent).abs().max() < 0.02


def test_the_class_of_a_drawn_picture_is_found():
    label = torch.eye(CLASSES)[[0, 2, 1, 1]]
    latent, image = drawn(4, label)
    found, shares = split(invert(Linear(CLASSES), image, DIMS, CLASSES), DIMS, CLASSES)
    assert torch.equal(shares, label)
    assert (found - latent).abs().max() < 0.02


def test_attributes_are_searched_along():
    label = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    latent, image = drawn(2, label)
    found = invert(Linear(4), image, DIMS, attributes=4)
    assert (found - torch.cat([latent, label], dim=1)).abs().max() < 0.02
    assert found[:, DIMS:].min() >= 0 and found[:, DIMS:].max() <= 1


@pytest.mark.parametrize("size", [0.1, 30.0])
def test_latents_stay_where_the_prior_has_its_own(size):
    """Of pictures that only a latent of another length would make."""
    latent, _ = drawn(3)
    image = Linear()(latent * size / math.sqrt(DIMS), torch.zeros(3, 0))
    lengths = invert(Linear(), image, DIMS).norm(dim=1)
    nearest = math.sqrt(DIMS) + math.copysign(SLACK, size - 1)
    assert torch.allclose(lengths, torch.full((3,), nearest), atol=1e-3)


def test_a_picture_is_inverted_alike_in_any_batch():
    _, image = drawn(5)
    whole = invert(Linear(), image, DIMS)
    assert torch.equal(whole, invert(Linear(), image, DIMS))
    assert torch.allclose(whole[3:4], invert(Linear(), image[3:4], DIMS), atol=1e-3)


def test_torchs_generator_is_left_alone():
    before = torch.random.get_rng_state()
    invert(Linear(), drawn(1)[1], DIMS)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_shares_of_classes_and_of_attributes():
    point = torch.tensor([[9.0, -1.0, 3.0, 1.0]])
    latent, shares = split(point, 1, classes=3)
    assert latent.item() == 9 and torch.equal(shares, torch.tensor([[0.0, 0.5, 0.5]]))
    point = torch.tensor([[9.0, -1.0, 0.2, 3.0]])
    assert torch.allclose(split(point, 1, attributes=3)[1], torch.tensor([[0.0, 0.2, 1.0]]))


MODELS = {
    "gan": lambda classes: GAN(
        dcgan.Generator(SHAPE, latent=4, channels=8, classes=classes),
        dcgan.Critic(SHAPE, channels=4, classes=classes),
    ),
    "progan": lambda classes: ProGAN(
        progan.Generator(SHAPE, latent=4, channels=8, classes=classes),
        progan.Critic(SHAPE, channels=4, classes=classes),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("classes", [0, 2])
def test_a_model_finds_its_own_pictures(kind, classes):
    torch.manual_seed(0)
    model = MODELS[kind](classes).eval()
    for parameter in model.generator.parameters():  # an untrained generator draws grey
        torch.nn.init.normal_(parameter, 0.0, 0.3 if kind == "gan" else 1.0)
    label = torch.arange(4) % classes if classes else None
    with torch.no_grad():
        image = model.sample(Condition(4, label), Rng(range(4)))
        latent = model.encode(image)
        back = model.decode(latent)
    assert latent.shape == (4, 4 + classes)
    assert (back - image).square().mean() < 0.02 * image.var()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match=rf"latents of shape \(1, 3\).*\(B, {4 + classes}\)"):
        model.decode(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"pictures of shape \(1, 1, 9, 9\)"), torch.no_grad():
        model.encode(torch.zeros(1, 1, 9, 9))
