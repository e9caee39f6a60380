"""Flows: inverses, log-determinants, densities that integrate to 1, latents, temperature."""

import copy
import math

import pytest
import torch
from torch import nn

from trilemma import device
from trilemma.batch import Batch, Condition, Rng, dequantise, to_float, to_uint8
from trilemma.models.flow import Flow
from trilemma.networks.coupling import (
    ActNorm,
    Chain,
    Checkerboard,
    Coupling,
    Glow,
    InvertibleConv,
    Logit,
    MultiScale,
    RealNVP,
    Squeeze,
)

SHAPE = (2, 4, 4)
LAYERS = {
    "squeeze": Squeeze,
    "logit": Logit,
    "actnorm": lambda: ActNorm(2),
    "conv": lambda: InvertibleConv(2),
    "coupling": lambda: Coupling(2, nn.Conv2d(1, 2, 3, padding=1)),
    "flipped coupling": lambda: Coupling(2, nn.Conv2d(1, 2, 3, padding=1), flip=True),
    "checkerboard 0": lambda: Checkerboard(2, nn.Conv2d(2, 4, 3, padding=1), 0),
    "checkerboard 1": lambda: Checkerboard(2, nn.Conv2d(2, 4, 3, padding=1), 1),
}
NETWORKS = {
    "glow": lambda shape: Glow(shape, levels=2, steps=2, channels=8),
    "realnvp": lambda shape: RealNVP(shape, levels=2, couplings=2, channels=8, blocks=1),
}


def stirred(module, spread=0.1):
    """Move every parameter: much begins at 0, where mistakes hide."""
    for parameter in module.parameters():
        parameter.data.add_(spread * torch.randn_like(parameter))
    return module


def make(name="glow", shape=SHAPE, classes=0):
    torch.manual_seed(0)
    return stirred(Flow(NETWORKS[name](shape), classes)).eval()


def pixels(count=3, shape=SHAPE):
    return Rng(range(count)).uniform(*shape) * 1.8 - 0.9


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_inverts_and_its_log_determinant_is_autograds(name):
    torch.manual_seed(0)
    layer = stirred(LAYERS[name](), 0.3).double()
    x = pixels().double()
    y, log_det = layer(x)
    assert torch.allclose(layer.inverse(y), x, atol=1e-12)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0][0], x[i])
        expected = torch.linalg.slogdet(jacobian.reshape(32, 32)).logabsdet
        assert torch.allclose(log_det.expand(len(x))[i], expected, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_inverts_and_its_log_determinant_is_autograds(name):
    network = make(name).network.double()
    x = pixels().double()
    latent, log_det = network.encode(x)
    assert latent.shape == (3, 32)
    assert torch.allclose(network(latent), x, atol=1e-10)
    assert torch.allclose(network.encode(network(latent))[0], latent, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda v: network.encode(v[None])[0][0], x[0])
    expected = torch.linalg.slogdet(jacobian.reshape(32, 32)).logabsdet
    assert torch.allclose(log_det[0], expected, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_pictures_come_back_from_their_latents(name, dtype):
    """To the level in float32; where the coupling networks round, to within a few."""
    shape = (1, 28, 28)
    model = make(name, shape)
    images = to_uint8(pixels(8, shape))
    with torch.no_grad(), device.autocast(dtype, torch.device("cpu")):
        back = to_uint8(model.decode(model.encode(to_float(images))))
    off = (back.int() - images.int()).abs()
    assert off.max() <= (0 if dtype == torch.float32 else 4)


def test_the_determinant_of_the_convolution_is_that_of_its_weight():
    torch.manual_seed(0)
    conv = InvertibleConv(6).double()
    weight = conv(torch.eye(6).double()[:, :, None, None])[0][:, :, 0, 0].T  # columns W e_i
    assert torch.allclose(weight @ weight.T, torch.eye(6).double(), atol=1e-6), "a rotation"
    stirred(conv, 0.3)
    columns, log_det = conv(torch.eye(6).double()[:, :, None, None])
    expected = torch.linalg.slogdet(columns[:, :, 0, 0]).logabsdet
    assert torch.allclose(log_det, expected, atol=1e-10)


class ByHand(nn.Module):
    """Any function of the half that stays."""

    def forward(self, x):
        return torch.cat([x.sin(), 0.5 * x], dim=1)


@pytest.mark.parametrize("classes", [0, 2])
def test_the_density_integrates_to_one(classes):
    """Of pictures of 2 channels and one pixel, by a grid over the plane."""
    torch.manual_seed(0)

    class Plane(nn.Module):
        shape, top = (2, 1, 1), 2

        def __init__(self):
            super().__init__()
            layers = [Coupling(2, ByHand()), InvertibleConv(2), ActNorm(2), Coupling(2, ByHand())]
            self.chain = stirred(Chain(*layers), 0.2)

        def encode(self, x):
            y, log_det = self.chain(x)
            return y.flatten(1), log_det

    model = Flow(Plane(), classes).double()
    if classes:
        torch.nn.init.normal_(model.prior, std=0.3)
    axis = torch.linspace(-25, 25, 1000, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)[:, :, None, None]
    with torch.no_grad():
        total = model.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_a_flow_that_does_nothing_is_its_gaussian():
    model = Flow(MultiScale((1, 4, 4), [Chain(Squeeze()), Chain(Squeeze())]))
    x = pixels(shape=(1, 4, 4))
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
    model.double()
    assert torch.allclose(model.log_prob(x.double()).float(), expected, rtol=1e-5)


def test_without_a_label_all_classes_count_alike():
    model = make(classes=3)
    x = pixels()
    each = [model.log_prob(x, torch.full((3,), k)) for k in range(3)]
    assert not torch.allclose(each[0], each[1])
    mixture = torch.stack(each).logsumexp(0) - math.log(3)
    assert torch.allclose(model.log_prob(x), mixture, atol=1e-4)


def test_the_loss_is_bits_per_dimension_of_the_dequantised_picture():
    model = make(classes=3)
    label = torch.tensor([0, 1, 2])
    batch = Batch(to_float(to_uint8(pixels())), Condition(3, label), 0, Rng(range(3)))
    x = dequantise(batch.image, Rng(range(3)).uniform(*SHAPE))
    expected = 7 - model.log_prob(x, label).mean() / (32 * math.log(2))
    assert model.loss(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="needs a label"):
        model.loss(Batch(batch.image, Condition(3), 0, Rng(range(3))))


def test_temperature_zero_draws_the_mode_of_each_class():
    model = make(classes=3)
    label = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        drawn = model.sample(Condition(4, label), Rng(range(4)), temperature=0.0)
        assert torch.allclose(drawn[0], drawn[3], atol=1e-6)
        assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)
        mean = model.prior[0].chunk(2)[0]
        top = model.encode(drawn[:1])[0, : model.network.top]
    # An encoded picture is one of 256 levels, so only nearly the mode.
    assert (top - mean).abs().max() < 0.2


def test_samples_are_the_density_of_the_model():
    """log p(x) of a drawn x is log N(z) of its own z, and the log-determinant."""
    torch.manual_seed(0)
    model = Flow(stirred(Glow((1, 4, 4), levels=2, steps=1, channels=4), 0.02))
    model.network.levels[0].layers[1].log_scale.data += 1.0  # pictures within [-1, 1]
    with torch.no_grad():
        latent = Rng(range(500)).normal(16)
        image = model.network(latent)
        again, log_det = model.network.encode(image)
        assert torch.allclose(again, latent, atol=1e-3)
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(latent).sum(1) + log_det
        assert torch.allclose(model.log_prob(image), expected, atol=1e-2)


def test_a_picture_depends_on_its_seed_alone():
    model = make(classes=3)
    label = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        together = model.sample(Condition(4, label), Rng([5, 6, 7, 8]))
        alone = model.sample(Condition(1, label[2:3]), Rng([7]))
    assert torch.allclose(together[2:3], alone, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_flows_learn_two_tones_and_draw_them(name):
    """Dark pictures of class 0, bright ones of class 1."""
    torch.manual_seed(0)
    model = Flow(NETWORKS[name]((1, 8, 8)), classes=2)
    label = torch.arange(32) % 2
    image = (label.float() * 1.2 - 0.6)[:, None, None, None] + 0.1 * Rng(range(32)).normal(1, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = None
    for step in range(120):
        rng = Rng(range(32 * step, 32 * (step + 1)))
        loss = model.loss(Batch(image, Condition(32, label), 0, rng))["loss"]
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 1
    with torch.no_grad():
        drawn = model.sample(Condition(32, label), Rng(range(32)), temperature=0.7)
    assert drawn[label == 0].mean() < -0.3
    assert drawn[label == 1].mean() > 0.3


def test_the_loss_leaves_torchs_generator_alone_and_the_average_starts_right():
    model = make()
    before = torch.random.get_rng_state()
    twin = copy.deepcopy(model)
    batch = Batch(pixels(), Condition(3), 0, Rng(range(3)))
    model.train().loss(batch)
    assert torch.equal(torch.random.get_rng_state(), before)
    unlike = [k for k, v in twin.state_dict().items() if not torch.equal(v, model.state_dict()[k])]
    assert not unlike, "the loss changes the model"


def test_bad_input_is_told_in_a_line():
    model = make()
    with pytest.raises(ValueError, match=r"latents of shape \(2, 31\).*\(B, 32\)"):
        model.decode(torch.zeros(2, 31))
    with pytest.raises(ValueError, match=r"pictures of shape \(1, 2, 8, 8\).*\(B, 2, 4, 4\)"):
        model.encode(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="28x28 cannot be halved 3 times.*multiple of 8"):
        Glow((1, 28, 28), levels=3)
    with pytest.raises(ValueError, match="30x30 cannot be halved 2 times.*multiple of 4"):
        RealNVP((1, 30, 30))
    with pytest.raises(ValueError, match="labels from 5"):
        make(classes=3).sample(Condition(1, torch.tensor([5])), Rng([0]))
    with pytest.raises(ValueError, match="labels from 5"):
        make(classes=3).log_prob(pixels(1), torch.tensor([5]))
