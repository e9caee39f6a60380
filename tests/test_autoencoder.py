"""AE and VAE: the KL against references, the bound's law, free bits, latents, sampling."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from trilemma.batch import Batch, Condition, Rng, to_float
from trilemma.models.autoencoder import AE, VAE, gaussian_kl
from trilemma.models.likelihoods import LIKELIHOODS
from trilemma.networks.convnet import Decoder, Encoder

SHAPE = (1, 8, 8)


def make(classes=0, latent=4, **options):
    torch.manual_seed(0)
    encoder = Encoder(SHAPE, 2 * latent, channels=8, classes=classes)
    decoder = Decoder(SHAPE, latent, channels=8, classes=classes)
    return VAE(encoder, decoder, latent, classes, **options)


def batch(count=6, classes=0, seen=0):
    label = torch.arange(count) % classes if classes else None
    image = Rng(range(count)).uniform(*SHAPE) * 2 - 1
    return Batch(image, Condition(count, label=label), seen, Rng(range(count)))


def test_kl_is_the_closed_form_and_the_monte_carlo_mean():
    torch.manual_seed(0)
    mean, log_variance, prior_mean, prior_log_variance = torch.randn(4, 3, 5)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    prior = Normal(prior_mean, (0.5 * prior_log_variance).exp())
    kl = gaussian_kl(mean, log_variance, prior_mean, prior_log_variance)
    assert torch.allclose(kl, kl_divergence(posterior, prior), rtol=1e-4, atol=1e-6)
    z = posterior.sample((40_000,))
    ratio = posterior.log_prob(z) - prior.log_prob(z)  # (S, 3, 5)
    error = ratio.std(0) / math.sqrt(len(z))
    assert ((ratio.mean(0) - kl).abs() < 5 * error).all()
    zero = torch.zeros(1, 5)
    assert (gaussian_kl(zero, zero, zero, zero) == 0).all()


def test_the_bound_of_a_class_counts_its_own_prior():
    """The mean over draws of the one-draw bound is fit - KL, whatever the class's prior."""
    model = make(classes=3).eval()
    torch.nn.init.normal_(model.prior.weight)
    data = batch(1, 3)
    count = 4000
    image, label = data.image.expand(count, *SHAPE), torch.eye(3)[:1].expand(count, 3)
    noise = Rng(range(count)).normal(4)
    with torch.no_grad():
        mean, log_variance = model._posterior(image, label)
        latent = mean + (0.5 * log_variance).exp() * noise
        output = model.decoder(latent, label)
        fit = model.likelihood.log_prob(image, output, model.log_scale).mean()
        kl = gaussian_kl(mean, log_variance, *model._prior(label)).sum(1).mean()
        bounds = model._bound(image, label, noise)
    assert abs(bounds.mean() - (fit - kl)) < 5 * bounds.std() / math.sqrt(count)


class LinearEncoder(nn.Module):
    """q(z | x) = N(A x, diag): with the right A and variance, the exact posterior."""

    def __init__(self, matrix, log_variance):
        super().__init__()
        self.matrix, self.log_variance = matrix, log_variance

    def forward(self, image, label):
        mean = image.flatten(1) @ self.matrix.T
        return torch.cat([mean, self.log_variance.expand_as(mean)], dim=1)


class LinearDecoder(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, latent, label):
        return (latent @ self.matrix.T).view(-1, 1, 2, 3)


@pytest.fixture
def linear():
    """x = W z + sigma e with orthogonal columns: the posterior is a diagonal Gaussian."""
    torch.manual_seed(1)
    scale, sigma = torch.tensor([1.5, 0.4]), 0.3
    weight = torch.linalg.qr(torch.randn(6, 2)).Q * scale
    variance = sigma**2 / (sigma**2 + scale**2)
    encoder = LinearEncoder((variance / sigma**2)[:, None] * weight.T, variance.log())
    model = VAE(encoder, LinearDecoder(weight), latent=2)
    model.log_scale.data.fill_(math.log(sigma))
    truth = MultivariateNormal(torch.zeros(6), weight @ weight.T + sigma**2 * torch.eye(6))
    return model, truth


def test_bound_is_the_likelihood_when_the_posterior_is_exact(linear):
    model, truth = linear
    image = truth.sample((5,)).view(5, 1, 2, 3)
    expected = truth.log_prob(image.flatten(1))
    assert torch.allclose(model.log_prob(image, draws=1), expected, atol=1e-4)
    assert torch.allclose(model.log_prob(image, draws=8), expected, atol=1e-4)
    rng = Rng(range(5))
    loss = model.loss(Batch(image, Condition(5), 0, rng))
    assert loss["fit"] - loss["kl"] == pytest.approx(-6 * loss["loss"].item(), rel=1e-4)


def test_bound_lies_below_and_tightens_with_draws(linear):
    """With a posterior too wide: below the truth on average, and nearer with more draws."""
    model, truth = linear
    model.encoder.log_variance = model.encoder.log_variance + 1.0
    image = truth.sample((200,)).view(200, 1, 2, 3)
    expected = truth.log_prob(image.flatten(1)).mean()
    noise = torch.randn(200, 2)
    one = model._bound(image, torch.zeros(200, 0), noise).mean()
    many = model.log_prob(image, draws=1000).mean()
    assert one < expected
    assert abs(expected - many) < 0.1 * (expected - one)


def test_log_prob_without_label_is_over_all_classes():
    model = make(classes=3).eval()
    image = batch().image
    each = [model.log_prob(image, torch.full((6,), k), draws=1) for k in range(3)]
    total = torch.stack(each).logsumexp(0) - math.log(3)
    assert torch.allclose(model.log_prob(image, draws=1), total, atol=1e-3)


def test_log_prob_does_not_depend_on_the_batch():
    model = make().eval()
    image = batch().image
    assert torch.allclose(model.log_prob(image)[2:3], model.log_prob(image[2:3]), atol=1e-3)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_loss_does_not_depend_on_the_split(likelihood):
    model = make(classes=3, likelihood=likelihood, free_bits=0.1)
    whole = model.loss(batch(6, 3))["loss"]
    parts = [model.loss(part)["loss"] for part in batch(6, 3).split(3)]
    assert torch.allclose(torch.stack(parts).mean(), whole, atol=1e-5)


def test_loss_leaves_torchs_generator_alone():
    before = torch.random.get_rng_state()
    model = make()
    before = torch.random.get_rng_state()
    model.loss(batch())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_beta_and_its_warmup():
    def weight(seen, **options):
        losses = make(**options).loss(batch(seen=seen))
        return ((64 * losses["loss"] + losses["fit"]) / losses["kl"]).item()

    assert weight(0, beta=4.0) == pytest.approx(4.0, rel=1e-3)
    assert weight(250, beta=4.0, warmup=1000) == pytest.approx(1.0, rel=1e-3)
    assert weight(5000, beta=4.0, warmup=1000) == pytest.approx(4.0, rel=1e-3)


def test_free_bits_do_not_press_what_lies_below_them():
    """Each latent of each image counts max(free_bits, KL_j), and below it has no gradient."""
    data, free = batch(), 0.02
    model = make(free_bits=free, beta=2.0)
    losses = model.loss(data)
    posterior = model._posterior(data.image, torch.zeros(6, 0))
    zero = torch.zeros(6, 4)
    kl = gaussian_kl(*posterior, zero, zero)
    assert 0 < (kl < free).float().mean() < 1  # the test has both sides
    expected = torch.where(kl < free, free, kl).sum(1).mean()
    counted = (64 * losses["loss"] + losses["fit"]) / 2
    assert counted.item() == pytest.approx(expected.item(), rel=1e-3)
    assert losses["kl"].item() == pytest.approx(kl.sum(1).mean().item(), rel=1e-5)

    free_of_kl, without_kl = make(free_bits=100.0), make(beta=0.0)
    for each in (free_of_kl, without_kl):
        each.loss(batch())["loss"].backward()
    for one, other in zip(free_of_kl.parameters(), without_kl.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-7)


def test_sigma_learns_the_mean_squared_error():
    model = make(beta=0.0)
    only_sigma = torch.optim.Adam([model.log_scale], 0.1)
    for _ in range(80):
        only_sigma.zero_grad()
        model.loss(batch())["loss"].backward()
        only_sigma.step()
    mean, log_variance = model._posterior(batch().image, torch.zeros(6, 0))
    latent = mean + (0.5 * log_variance).exp() * batch().rng.normal(4)
    error = (model.decoder(latent, torch.zeros(6, 0)) - batch().image).square().mean()
    assert model.log_scale.exp().item() == pytest.approx(error.sqrt().item(), rel=1e-2)


def train(model, data, steps=200, rate=3e-3):
    (phase,) = model.phases()
    parameters = [p for module in phase.modules for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, rate)
    for step in range(steps):
        rng = Rng(range(len(data) * step, len(data) * (step + 1)))
        optimizer.zero_grad()
        losses = phase.loss(Batch(data.image, data.condition, len(data) * step, rng))
        losses["loss"].backward()
        optimizer.step()
    return losses["loss"].item()


def two_tones(count=32):
    """Class 0: dark pictures, class 1: bright; each with a bright or dark left half."""
    label = torch.arange(count) % 2
    side = (torch.arange(count) // 2) % 2
    image = (label.float() * 1.2 - 0.6)[:, None, None, None].repeat(1, *SHAPE)
    image[:, :, :, :4] += (side.float() * 0.6 - 0.3)[:, None, None, None]
    return Batch(image, Condition(count, label=label), 0, Rng(range(count)))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_vae_learns_and_its_latents_say_the_class(likelihood):
    model, data = make(classes=2, likelihood=likelihood), two_tones()
    train(model, data)
    model.eval()
    with torch.no_grad():
        latent = model.encode(data.image)
        assert latent.shape == (32, 4 + 2)
        assert torch.equal(latent[:, 4:].argmax(1), data.condition.label)
        assert (model.decode(latent) - data.image).abs().mean() < 0.15
        drawn = model.sample(data.condition, Rng(range(32)))
        dark, bright = drawn[data.condition.label == 0], drawn[data.condition.label == 1]
    assert dark.mean() < -0.4
    assert bright.mean() > 0.4
    assert drawn.abs().max() <= 1


def test_ae_learns_and_samples_what_it_saw():
    torch.manual_seed(0)
    model = AE(Encoder(SHAPE, 3, channels=8), Decoder(SHAPE, 3, channels=8), 3, halflife=500)
    data = two_tones()
    assert train(model, data) < 0.01
    model.eval()
    with torch.no_grad():
        latent = model.encode(data.image)
        assert (model.decode(latent) - data.image).abs().mean() < 0.1
        moments = model.first_moment / model.weight
        assert torch.allclose(moments, latent.mean(0), atol=0.2 * latent.std().item())
        drawn = model.sample(Condition(64), Rng(range(64)))
        assert abs(drawn.mean().item() - data.image.mean().item()) < 0.15
        assert drawn.mean((1, 2, 3)).std() > 0.3
        still = model.sample(Condition(2), Rng(range(2)), temperature=0.0)
    assert torch.equal(still[0], still[1])


def test_ae_samples_have_the_fitted_covariance():
    class Same(nn.Module):
        def forward(self, x, label):
            return x.view(-1, 1, 1, 2) if x.ndim == 2 else x.flatten(1)

    model = AE(Same(), Same(), 2, halflife=1000)
    torch.manual_seed(0)
    root = torch.tensor([[0.1, 0.0], [0.08, 0.05]])
    for _ in range(100):
        image = (torch.randn(100, 2) @ root.T + 0.2).view(100, 1, 1, 2)
        model.loss(Batch(image, Condition(100), 0, Rng(range(100))))
    drawn = model.sample(Condition(20_000), Rng(range(20_000))).flatten(1)
    assert torch.allclose(drawn.mean(0), torch.tensor([0.2, 0.2]), atol=0.01)
    assert torch.allclose(drawn.T.cov(), root @ root.T, atol=1.5e-3)


def test_a_picture_depends_on_its_seed_alone():
    model = make(classes=3).eval()
    label = torch.tensor([0, 1, 2, 0])
    together = model.sample(Condition(4, label=label), Rng([5, 6, 7, 8]))
    alone = model.sample(Condition(1, label=label[2:3]), Rng([7]))
    assert torch.allclose(together[2:3], alone, atol=1e-6)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_log_prob_is_of_what_the_model_says_it_is(likelihood):
    """A probability of the 8-bit picture, at most 1, or a density, which may be anything."""
    model = make(likelihood=likelihood).eval()
    assert model.discrete == (likelihood == "discretized-logistic")
    image = to_float((batch().image * 127.5 + 127.5).round().to(torch.uint8))
    log_prob = model.log_prob(image)
    assert log_prob.shape == (6,) and log_prob.isfinite().all()
    if model.discrete:
        assert (log_prob < 0).all()


def test_class_shares_are_brought_to_a_sum_of_one():
    model = make(classes=2).eval()
    latent = torch.randn(1, 4)
    halves = model.decode(torch.cat([latent, torch.tensor([[0.5, 0.5]])], dim=1))
    for shares in ([0.7, 0.7], [2.0, 2.0]):
        same = model.decode(torch.cat([latent, torch.tensor([shares])], dim=1))
        assert torch.allclose(same, halves, atol=1e-6)
    one = model.decode(torch.cat([latent, torch.tensor([[1.0, 0.0]])], dim=1))
    less = model.decode(torch.cat([latent, torch.tensor([[1.0, -0.3]])], dim=1))
    assert torch.equal(one, less)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="'poisson'.*gaussian"):
        make(likelihood="poisson")
    with pytest.raises(ValueError, match="free_bits is -1"):
        make(free_bits=-1)


def test_a_wrong_label_or_latent_is_told():
    model = make(classes=3).eval()
    with pytest.raises(ValueError, match="labels from 0 to 3.*0 to 2"):
        model.sample(Condition(2, label=torch.tensor([0, 3])), Rng(range(2)))
    with pytest.raises(ValueError, match=r"latents of shape \(2, 4\).*expected \(B, 7\)"):
        model.decode(torch.zeros(2, 4))
    model = AE(Encoder(SHAPE, 3, channels=8), Decoder(SHAPE, 3, channels=8), 3)
    with pytest.raises(ValueError, match=r"expected \(B, 3\)"):
        model.decode(torch.zeros(2, 4))


class Identity(nn.Module):
    """Both halves of an autoencoder that changes nothing, of 1 x 8 x 8 pictures."""

    def forward(self, x, label):
        return x.flatten(1) if x.ndim == 4 else x.view(-1, *SHAPE)


def test_corrupted_pictures_are_to_be_restored_clean():
    """An autoencoder that lets all noise through loses the noise's variance."""
    data = batch(64)
    grey = Batch(0 * data.image, data.condition, 0, data.rng)
    for deviation in (0.0, 0.1, 0.2):
        loss = AE(Identity(), Identity(), 64, corruption=deviation).loss(grey)["loss"].item()
        assert loss == pytest.approx(deviation**2, rel=0.05)
    with pytest.raises(ValueError, match="corruption is -1"):
        AE(Identity(), Identity(), 64, corruption=-1)


def test_corruption_is_of_the_8_bit_picture_and_its_own():
    data = batch(8)
    white = Batch(0 * data.image + 1, data.condition, 0, data.rng)
    model = AE(Identity(), Identity(), 64, corruption=0.2)
    whole = model.loss(white)["loss"].item()
    assert whole == pytest.approx(0.2**2 / 2, rel=0.1), "what is above white is cut off"
    parts = [model.loss(part)["loss"].item() for part in white.split(2)]
    assert sum(parts) / 2 == pytest.approx(whole, rel=0.3)
