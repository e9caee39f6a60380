"""Score models: shaking solvers, likelihoods, pairing, learned variances and weights."""

import itertools
import math

import pytest
import torch
from torch import nn

from gaussian import COVARIANCE, MEAN, SCHEDULES, exact, levels, noise
from test_diffusion_model import SHAPE, batch, model
from test_likelihood import dataset
from test_likelihood import trained as as_trained
from trilemma import evaluation
from trilemma.batch import Batch, Condition, Rng, dequantise, to_float
from trilemma.conditioning import Labels
from trilemma.diffusion import (
    likelihood,
    pairing,
    schedules,
    solvers,
    stochastic,
    targets,
    times,
    weights,
)
from trilemma.errors import UserError
from trilemma.model import HasCostlyLikelihood
from trilemma.models import score

CONTINUOUS = ("ve", "vp", "sub-vp", "straight", "zero-terminal")


def draw(solver, schedule, steps, n, denoise=None, grid=solvers.even_log_snr, **own):
    """Draw n points of 2 numbers with the solver, from the noise that sampling starts from."""
    _, sigma = levels(schedule, 1.0)
    start = sigma * noise(n)
    path = solvers.SOLVERS[solver].steps(
        denoise or exact(schedule), start, grid(schedule, steps), schedule, Rng(range(n)), **own
    )
    *_, last = path
    return last


MOVES = {"moves": 15, "size": 0.4}  # a level's moves have to bring it into balance


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("solver,steps,own", [("sde", 120, {}), ("pc", 80, {})])
def test_shaking_solvers_reach_mean_and_covariance(name, solver, steps, own):
    drawn = draw(solver, SCHEDULES[name], steps, 2500, **own)
    torch.testing.assert_close(drawn.mean(0), MEAN, rtol=0, atol=0.04)
    torch.testing.assert_close(drawn.T.cov(), COVARIANCE, rtol=0, atol=0.04)


@pytest.mark.parametrize("name", ["ve", "straight"])
def test_langevin_reaches_mean_and_covariance(name):
    drawn = draw("langevin", SCHEDULES[name], 40, 1500, **MOVES)
    torch.testing.assert_close(drawn.mean(0), MEAN, rtol=0, atol=0.06)
    torch.testing.assert_close(drawn.T.cov(), COVARIANCE, rtol=0, atol=0.06)


PLACES = torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
SHARES, WIDTH = torch.tensor([0.8, 0.2], dtype=torch.float64), 0.2


def mixture(schedule):
    """The posterior mean of x_0 when the data are two narrow bumps."""

    def denoise(x, t):
        alpha, sigma = levels(schedule, t)
        variance = alpha**2 * WIDTH**2 + sigma**2
        apart = x[:, None] - alpha * PLACES
        near = (SHARES.log() - apart.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
        each = PLACES + alpha * WIDTH**2 / variance * apart
        return (near * each).sum(1)

    return denoise


@pytest.mark.parametrize(
    "solver,steps,own", [("sde", 100, {}), ("pc", 60, {}), ("langevin", 40, MOVES)]
)
def test_both_bumps_get_their_share(solver, steps, own):
    schedule = SCHEDULES["ve"]
    drawn = draw(solver, schedule, steps, 2000, mixture(schedule), **own)
    right = drawn[:, 0] > 0
    assert abs(right.double().mean() - 0.2) < 0.04
    for bump, place in zip((~right, right), PLACES, strict=True):
        torch.testing.assert_close(drawn[bump].mean(0), place, rtol=0, atol=0.04)
        assert drawn[bump].std(0).sub(WIDTH).abs().max() < 0.03


def test_langevin_without_levels_gets_the_shares_wrong():
    # Song & Ermon 2019, section 3.2.2: the score near a bump says nothing of the other's weight.
    schedule = SCHEDULES["ve"]
    start, end = schedule.time(torch.tensor([-2 * math.log(r) for r in (0.2, 0.19)]).double())
    path = torch.tensor([float(start), float(end), 0.0], dtype=torch.float64)
    x = 3 * noise(2000)
    *_, last = stochastic.langevin(mixture(schedule), x, path, schedule, Rng(range(2000)), moves=50)
    assert (last[:, 0] > 0).double().mean() > 0.35


def test_a_step_of_the_sde_is_the_papers():
    # Song et al. 2021: dx = [f x - g^2 score] dt + g dw, backwards in time.
    x, t, width = noise(5), 0.6, 1e-3
    path = torch.tensor([t, t - width, 0.0], dtype=torch.float64)
    for name in ("ve", "vp"):
        schedule = SCHEDULES[name]
        alpha, sigma = levels(schedule, t)
        if name == "ve":
            drift = 0.0
            g2 = schedule.smallest**2 * schedule.growth * math.exp(schedule.growth * t)
        else:
            beta = 0.1 + t * 19.9
            drift, g2 = -beta / 2, beta
        score_there = (alpha * exact(schedule)(x, t) - x) / sigma**2
        expected = x - (drift * x - g2 * score_there) * width
        expected += (g2 * width) ** 0.5 * next(Rng(range(5)).normals(1, 2))
        first = next(
            iter(stochastic.reverse_sde(exact(schedule), x, path, schedule, Rng(range(5))))
        )
        size = (expected - x).abs().max()
        assert (first - expected).abs().max() < 0.02 * size


def test_the_predictor_is_ddpm_with_the_large_variance():
    schedule, x = SCHEDULES["vp"], noise(5)
    path = solvers.even_log_snr(schedule, 10)
    pc = stochastic.predictor_corrector(exact(schedule), x, path, schedule, Rng(range(5)), snr=0.0)
    first = next(iter(pc))
    ddpm = solvers.ddpm(exact(schedule), x, path, schedule, Rng(range(5)), variance="large")
    torch.testing.assert_close(first, next(iter(ddpm)))


# Likelihood


def normal(x, covariance):
    return torch.distributions.MultivariateNormal(MEAN, covariance).log_prob(x)


def gaussian(schedule, covariance):
    def denoise(x, t):
        alpha, sigma = levels(schedule, t)
        inner = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        return MEAN + (x - alpha * MEAN) @ (alpha * covariance @ torch.linalg.inv(inner)).T

    return denoise


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_flow_tells_the_density_of_a_gaussian(name):
    schedule, covariance = SCHEDULES[name], torch.diag(torch.tensor([0.3, 0.05]).double())
    if name == "ve":
        schedule = schedules.VarianceExploding(0.01, 500.0)
    x = MEAN + noise(40) * covariance.diagonal().sqrt()
    denoise = gaussian(schedule, covariance)
    found = likelihood.flow_log_prob(denoise, x, schedule, Rng(range(40)))
    # Signs see the trace of a diagonal exactly. At t = 1 sampling starts from noise alone, though
    # a little of the picture is left there.
    assert (found - normal(x, covariance)).abs().max() / 2 < 0.01


@pytest.mark.parametrize("gaussian_noise", [False, True])
def test_hutchinsons_estimate_is_without_bias(gaussian_noise):
    schedule, n = SCHEDULES["vp"], 4000
    x = (MEAN + torch.tensor([0.3, 0.2]).double()).expand(n, 2)
    found = likelihood.flow_log_prob(
        exact(schedule), x, schedule, Rng(range(n)), gaussian=gaussian_noise
    )
    error = found.std() / n**0.5
    assert found.std() > 0.05
    assert abs(found.mean() - normal(x[:1], COVARIANCE)) < 4 * error + 0.02


def test_the_flow_tells_the_density_of_a_mixture():
    schedule = SCHEDULES["ve"]
    x = torch.tensor([[-2.0, 0.0], [1.9, 1.1], [-1.5, -0.2], [0.0, 0.5]]).double()
    at = torch.cat([x] * 500)
    found = likelihood.flow_log_prob(mixture(schedule), at, schedule, Rng(range(2000)), steps=64)
    apart = (x[:, None] - PLACES).square().sum(-1) / (2 * WIDTH**2)
    true = (SHARES.log() - apart - math.log(2 * math.pi * WIDTH**2)).logsumexp(1)
    torch.testing.assert_close(found.view(500, 4).mean(0)[:3], true[:3], rtol=0, atol=0.05)


def levelled(n, std):
    """Pictures of 8-bit levels, and the entropy of one of their numbers in nats."""
    edges = (torch.arange(257, dtype=torch.float64) - 128) / 127.5 / std
    below = torch.special.ndtr(edges)
    below[0], below[-1] = 0, 1
    mass = below.diff()
    entropy = -(mass * mass.clamp(min=1e-300).log()).sum()
    place = torch.searchsorted(below, Rng(range(n)).uniform(16).double()) - 1
    return to_float(place.to(torch.uint8)).view(n, 1, 4, 4).double(), float(entropy)


def test_the_bound_lies_just_above_the_entropy():
    schedule, steps = schedules.Linear(200, 5e-4, 0.1), 200
    x, entropy = levelled(200, 0.3)

    def guess(share):
        def of(x, t):
            alpha, sigma = levels(schedule, t)
            gain = alpha * 0.09 / (alpha**2 * 0.09 + sigma**2)
            return x * gain, share if share is not None else best(t)

        return of

    def best(t):
        """Where the true variance of the step lies between the two."""
        k = round(t * steps)
        now, then, one, two = (schedule(torch.tensor(i / steps).double()) for i in (k, k - 1, 1, 2))
        large, small = likelihood.variances(*now, *then)
        left = 0.09 * now[1] ** 2 / (now[0] ** 2 * 0.09 + now[1] ** 2)  # of x_0 given x_t
        true = small + (then[0] * large / now[1] ** 2) ** 2 * left
        if k == 1:
            small = likelihood.variances(*two, *one)[1]
        return float((true / small).log() / (large / small).log())

    nats = {
        share: -likelihood.step_bound(guess(share), x, schedule, Rng(range(200)), steps).mean() / 16
        for share in (None, 0.0, 1.0)
    }
    assert entropy - 0.02 < nats[None] < entropy + 0.03
    assert nats[None] < nats[1.0] < nats[0.0]


def test_a_model_of_one_picture_needs_no_bits_for_it():
    schedule = schedules.Linear()
    x = to_float(torch.full((2, 1, 2, 2), 77, dtype=torch.uint8))
    guess = lambda noisy, t: (x, 0.0)  # noqa: E731
    steps = 50
    alpha, sigma = levels(schedule, 1.0)
    left = 0.5 * (alpha / sigma) ** 2 * x[0].square().sum()
    found = likelihood.step_bound(guess, x, schedule, Rng(range(2)), steps)
    coarse = schedule(torch.tensor([1 / steps]))[1]
    assert coarse > 1 / 255  # so that the last step's Gaussian is wider than the cell
    assert (found < -left).all() and (found > -left - 4 * math.log(255 * coarse * 2)).all()


def test_continuous_models_tell_densities_and_discrete_ones_bounds():
    smooth = model(dequantise=True)
    stepped = model(
        schedule=schedules.Linear(20, 1e-3, 0.3), target="noise", times=times.Uniform(20)
    )
    assert (smooth.discrete, smooth.bound, smooth.likelihood_calls) == (False, False, 64)
    assert (stepped.discrete, stepped.bound, stepped.likelihood_calls) == (True, True, 20)
    image = to_float((torch.arange(48) * 5).to(torch.uint8).view(3, *SHAPE))
    label = torch.tensor([0, 1, 2])
    for m in (smooth, stepped):
        assert isinstance(m, HasCostlyLikelihood)
        seen = image if m.discrete else dequantise(image, Rng(range(3)).uniform(*SHAPE))
        m.network.calls.clear()
        with torch.no_grad():
            together = m.log_prob(seen, label)
        assert len(m.network.calls) == m.likelihood_calls
        assert together.shape == (3,) and together.isfinite().all()
        torch.testing.assert_close(together[1:2], m.log_prob(seen[1:2], label[1:2]))
        assert not torch.allclose(together, m.log_prob(seen))
    with pytest.raises(ValueError, match="model.dequantise=true"):
        model().log_prob(image)


def test_likelihoods_that_cost_are_told_when_asked_for():
    m = model(classes=0, dequantise=True)
    run = as_trained(m)
    assert evaluation.likelihood(run, dataset(4)) is None
    told = evaluation.likelihood(run, dataset(4), costly=True)
    assert told["bits_are"] == "exact" and math.isfinite(told["bits_per_dim"])
    with pytest.raises(UserError, match="tells none"):
        evaluation.evaluate(torch.zeros(4, *SHAPE, dtype=torch.uint8), dataset(4), bits=True)


# Reference objectives


def test_the_objectives_agree_on_a_mixture():
    # J(s) - J(true score) is the mean of |s - true|^2 / 2, whichever objective J.
    n, sigma = 40_000, 0.4
    which = (Rng(range(n)).uniform() < 0.2).long()
    wide = WIDTH + 0.3
    x = PLACES[which] / 2 + wide * noise(n)

    def true(x, variance=wide**2):
        apart = PLACES / 2 - x[:, None]
        near = (SHARES.log() - apart.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
        return (near * apart).sum(1) / variance

    def noisy(x):
        return true(x, wide**2 + sigma**2)

    def wrong(known):
        return [lambda x: 0.7 * known(x), lambda x: known(x) + torch.sin(x.flip(1))]

    rng = Rng(range(10**7, 10**7 + n))
    objectives = {
        "exact": (true, lambda s: score.exact(s, x)),
        "sliced": (true, lambda s: score.sliced(s, x, rng[:])),
        "denoising": (noisy, lambda s: score.denoising(s, x, sigma, rng[:])),
    }
    for name, (known, objective) in objectives.items():
        best = objective(known).mean()
        seen = x + sigma * rng[:].normal(2) if name == "denoising" else x
        for other in wrong(known):
            lost = (objective(other).mean() - best).item()
            apart = (other(seen) - known(seen)).square().sum(1).mean().item() / 2
            assert lost == pytest.approx(apart, rel=0.15), name


def test_exact_and_sliced_are_the_same_where_the_jacobian_is_diagonal():
    x = noise(7)
    s = lambda x: torch.sin(x) - x  # noqa: E731
    torch.testing.assert_close(score.exact(s, x), score.sliced(s, x, Rng(range(7))))


# Preconditioning, weights, times


def test_preconditioning_is_table_1():
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0]).double()[:, None]
    alpha, std = torch.ones_like(sigma), 0.5
    skip = std**2 / (sigma**2 + std**2)
    out = sigma * std / (sigma**2 + std**2).sqrt()
    x, output = noise(4), noise(8)[4:]
    ab = targets.TARGETS["preconditioned"](alpha, sigma, std)
    x0 = targets.clean(x, output, alpha, sigma, ab)
    torch.testing.assert_close(x0, skip * x + out * output)
    for schedule in SCHEDULES.values():  # F has unit variance, and knows nothing that x_t tells
        alpha, sigma = schedule(torch.linspace(0.1, 0.9, 5, dtype=torch.float64))
        a, b = targets.TARGETS["preconditioned"](alpha, sigma, std)
        torch.testing.assert_close(a**2 * std**2 + b**2, torch.ones_like(a))
        torch.testing.assert_close(a * alpha * std**2 + b * sigma, torch.zeros_like(a))


@pytest.mark.parametrize("name", ["ve", "straight", "cosine"])
def test_log_normal_noise(name):
    schedule = SCHEDULES[name]
    t = times.LogNormal()(Rng(range(20_000)), schedule)
    log_ratio = -schedule.log_snr(t.double()) / 2
    assert abs(log_ratio.mean() + 1.2) < 0.05 and abs(log_ratio.std() - 1.2) < 0.05


def test_uncertainty_learns_the_log_of_the_mean_error():
    u, t = weights.Uncertainty(), Rng(range(512)).uniform()
    assert (u(t) == 0).all()
    error = 0.2 + t  # larger at later times
    optimizer = torch.optim.Adam(u.parameters(), lr=0.05)
    for _ in range(80):
        (error * (-u(t)).exp() + u(t)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(u(t), error.log(), rtol=0, atol=0.1)


def test_uncertainty_learns_with_the_network():
    torch.manual_seed(0)
    m = model(uncertainty=weights.Uncertainty())
    losses = m.loss(batch())
    torch.testing.assert_close(losses["loss"], losses["error"])  # u is 0 at first
    losses["loss"].backward()
    (phase,) = m.phases()
    assert m.uncertainty in phase.modules and m.uncertainty.linear.bias.grad is not None


# Pairing


def test_assignment_is_the_best_of_all():
    for seed in range(20):
        cost = Rng([seed]).uniform(6, 6)[0].double().numpy()
        best = min(
            sum(cost[i, j] for i, j in enumerate(order))
            for order in itertools.permutations(range(6))
        )
        found = pairing.assign(cost)
        assert sorted(found) == list(range(6))
        assert cost[range(6), found].sum() == pytest.approx(best)


def test_noise_is_handed_round_within_classes():
    z, x = noise(30), noise(60)[30:]
    label = torch.arange(30) % 3
    paired = pairing.optimal(z, x, label)
    for c in range(3):
        own = {tuple(row.tolist()) for row in z[label == c]}
        assert {tuple(row.tolist()) for row in paired[label == c]} == own
    free = pairing.optimal(z, x)
    distances = [(x - each).square().sum() for each in (z, paired, free)]
    assert distances[0] > distances[1] > distances[2]


def test_optimal_pairs_make_paths_that_hardly_cross():
    # Liu et al. 2023, eq. 5: a flow is the straighter the less x_0 - noise varies where paths meet.
    n = 1024
    z = noise(n)
    x = torch.cat([noise(n + n // 2)[n:] * 0.1 + 1, noise(2 * n)[n + n // 2 :] * 0.1 - 1])
    x = x[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    parts = zip(z.split(128), x.split(128), strict=True)
    paired = torch.cat([pairing.optimal(a, b) for a, b in parts])
    varies = []
    for start in (z, paired):
        middle, way = (start + x) / 2, x - start
        near = torch.cdist(middle, middle).topk(16, largest=False).indices
        varies.append(way[near].var(1).sum(1).mean())
    assert varies[1] < 0.2 * varies[0]


def test_a_model_with_optimal_pairing_uses_the_noise_it_drew():
    plain, paired = model(classes=0), model(classes=0, pairing="optimal")
    heard = []
    for m in (plain, paired):
        m.network.register_forward_pre_hook(lambda _, given: heard.append(given))
        m.loss(batch())
    assert torch.equal(heard[0][1], heard[1][1]) and not torch.equal(heard[0][0], heard[1][0])
    with pytest.raises(ValueError, match="independent, optimal"):
        model(pairing="best")


# Learned variance


class Doubled(nn.Module):
    """Says nothing of the picture, and `share` of the variance everywhere."""

    def __init__(self, share):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1))
        self.second = nn.Parameter(torch.full((1,), 2.0 * share - 1))

    def forward(self, x, time, embedded):
        return torch.cat([0 * x + self.first, 0 * x + self.second], dim=1)


def stepped(share, steps=20, target="noise"):
    m = model(
        classes=0,
        schedule=schedules.Linear(steps, 1e-3, 0.3),
        target=target,
        times=times.Uniform(steps),
        learn_variance=True,
    )
    m.network = Doubled(share)
    return m


def test_learned_variance_spans_small_and_large():
    rng = lambda: Rng(range(3))  # noqa: E731
    for share, known in ((0.0, "small"), (1.0, "large")):
        m = stepped(share)
        options = {"solver": "ddpm", "steps": 7}
        learned = m.sample(Condition(3), rng(), variance="learned", **options)
        same = m.sample(Condition(3), rng(), variance=known, **options)
        torch.testing.assert_close(learned, same, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="trained with learn_variance"):
        model().sample(Condition(1), Rng([0]), solver="ddpm", variance="learned")
    with pytest.raises(ValueError, match="times of type"):
        model(learn_variance=True)
    with pytest.raises(ValueError, match="out_channels=2"):
        model(learn_variance=True, times=times.Uniform(10)).loss(batch())


def test_the_bound_teaches_the_variance_and_nothing_else():
    m = stepped(0.5)
    losses = m.loss(batch())
    assert losses["loss"] == losses["loss"].detach()
    first, second = torch.autograd.grad(losses["bound"], [m.network.first, m.network.second])
    assert first == 0 and second != 0
    assert losses["bound"].isfinite() and losses["bound"] > 0


def test_the_bound_in_the_loss_is_the_likelihoods():
    m = stepped(0.3, target="image")  # it expects 0, which lies within the bounds
    image = to_float((torch.arange(64) * 4).to(torch.uint8).view(4, *SHAPE))
    found = -m.log_prob(image) / 16 / math.log(2)
    # The loss meets one step at a time; over many it is the mean of all but L_T.
    n = 4000
    many = Batch(image.repeat(n // 4, 1, 1, 1), Condition(n), 0, Rng(range(10_000, 10_000 + n)))
    alpha, sigma = levels(m.schedule, 1.0)
    left = 0.5 * (alpha / sigma) ** 2 * image.square().mean() / math.log(2)
    expected = m.loss(many)["bound"].item() + left
    assert found.mean().item() == pytest.approx(float(expected), rel=0.15)


def test_labels_need_dropout_to_be_left_out():
    m = model(dropout=0.0, dequantise=True)
    assert isinstance(m.conditioner, Labels)
    with pytest.raises(ValueError, match="no labels"):
        m.log_prob(torch.zeros(1, *SHAPE))
