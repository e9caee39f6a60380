"""The networks of GANs and autoencoders: shapes, labels, normalisation."""

import pytest
import torch
from torch import nn

from trilemma.networks import modulated, residual
from trilemma.networks.convnet import Decoder, Encoder
from trilemma.networks.dcgan import Critic, Generator
from trilemma.networks.layers import halvings, one_hot

SIZES = [8, 16, 20, 28, 30, 32, 36, 48, 64, 100, 128]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size(size, channels):
    shape = (channels, size, size)
    label = one_hot(torch.tensor([0, 2]), 3, 2, torch.device("cpu"))
    for generator in (Generator, modulated.Generator):
        image = generator(shape, latent=5, channels=2, classes=3)(torch.randn(2, 5), label)
        assert image.shape == (2, *shape)
        assert image.abs().max() <= 1
    assert Critic(shape, channels=2, classes=3)(image, label).shape == (2,)
    assert residual.Critic(shape, channels=2, classes=3)(image, label).shape == (2,)
    latent = Encoder(shape, 6, channels=2, classes=3)(image, label)
    assert latent.shape == (2, 6)
    assert Decoder(shape, 6, channels=2, classes=3)(latent, label).shape == image.shape


def test_oblong():
    shape, none = (3, 24, 40), torch.zeros(2, 0)
    for generator in (Generator, modulated.Generator):
        image = generator(shape, latent=5, channels=2)(torch.randn(2, 5), none)
        assert image.shape == (2, *shape)
    assert Critic(shape, channels=2)(image, none).shape == (2,)
    assert residual.Critic(shape, channels=2)(image, none).shape == (2,)
    latent = Encoder(shape, 6, channels=2)(image, none)
    assert Decoder(shape, 6, channels=2)(latent, none).shape == (2, *shape)


@pytest.mark.parametrize(
    ("size", "expected"), [(8, (1, 4)), (28, (2, 7)), (32, (3, 4)), (36, (3, 5)), (128, (5, 4))]
)
def test_halvings(size, expected):
    assert halvings(size) == expected


def test_too_small_is_said():
    with pytest.raises(ValueError, match="4 pixels.*at least 8"):
        Generator((3, 4, 4))


def test_parameters_are_the_papers():
    """DCGAN at 64 pixels, its widths 1024-512-256-128: counted by hand, kernel 4, no labels."""
    generator = Generator((3, 64, 64), latent=100, channels=128)
    widths = [1024, 512, 256, 128]
    dense = 100 * 1024 * 16
    convolutions = sum(16 * a * b for a, b in zip(widths, widths[1:], strict=False))
    expected = dense + convolutions + (16 * 128 * 3 + 3) + 2 * sum(widths)
    assert sum(p.numel() for p in generator.parameters()) == expected


def test_label_is_read_by_all():
    torch.manual_seed(0)
    shape = (1, 16, 16)
    latent, image = torch.randn(1, 5).expand(2, 5), torch.randn(1, 1, 16, 16).expand(2, 1, 16, 16)
    label = torch.eye(2)
    for out in (
        Generator(shape, latent=5, channels=4, classes=2).eval()(latent, label),
        modulated.Generator(shape, latent=5, channels=4, classes=2).eval()(latent, label),
        Critic(shape, channels=4, classes=2).eval()(image, label),
        residual.Critic(shape, channels=4, classes=2)(image, label),
        Encoder(shape, 3, channels=4, classes=2)(image, label),
        Decoder(shape, 5, channels=4, classes=2)(latent, label),
    ):
        assert not torch.allclose(out[0], out[1])


@pytest.mark.parametrize("norm", ["none", "layer", "spectral"])
def test_critic_scores_each_image_alone(norm):
    critic = Critic((1, 16, 16), channels=4, norm=norm)
    critic.eval()  # spectral: no step of the power iteration between the two calls
    image, label = torch.randn(3, 1, 16, 16), torch.zeros(3, 0)
    assert torch.allclose(critic(image, label)[:1], critic(image[:1], label[:1]), atol=1e-6)


def test_spectral_norm_bounds_every_layer():
    critic = Critic((1, 16, 16), channels=4, norm="spectral")
    for _ in range(50):
        critic(torch.zeros(1, 1, 16, 16), torch.zeros(1, 0))
    for module in critic.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            largest = torch.linalg.matrix_norm(module.weight.flatten(1), 2).item()
            assert largest == pytest.approx(1, abs=1e-2)


def test_unknown_norm_is_named():
    with pytest.raises(ValueError, match="'instance'.*'batch'"):
        Critic((1, 16, 16), norm="instance")


def test_one_hot():
    device = torch.device("cpu")
    assert one_hot(torch.tensor([1, 0]), 2, 2, device).tolist() == [[0, 1], [1, 0]]
    assert one_hot(torch.tensor([1, 0]), 0, 2, device).shape == (2, 0)
    with pytest.raises(ValueError, match="3 classes"):
        one_hot(None, 3, 2, device)
    with pytest.raises(ValueError, match="from 0 to 3 .* 0 to 2"):
        one_hot(torch.tensor([0, 3]), 3, 2, device)


def test_residual_blocks_start_as_the_identity():
    """Fix-up: whatever the depth, the network starts as its straight way."""
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(residual.Block(8, 6)(x), x)
    critic = residual.Critic((3, 36, 28), channels=4)
    image, label = torch.randn(2, 3, 36, 28), torch.zeros(2, 0)
    scores = critic(image, label)
    critic.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in critic.blocks)
    assert torch.equal(critic(image, label), scores)


def test_the_residual_critic_reads_every_place():
    critic = residual.Critic((1, 28, 28), channels=4)
    image = torch.randn(1, 1, 28, 28, requires_grad=True)
    critic(image, torch.zeros(1, 0)).sum().backward()
    assert (image.grad != 0).all()
