"""Laws of schedules, targets, weights and guidance."""

import math

import pytest
import torch

from gaussian import SCHEDULES
from trilemma.batch import Rng
from trilemma.diffusion import guidance, schedules, targets, times, weights


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_to_noise_strictly_falls(name):
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    log_snr = SCHEDULES[name].log_snr(t)
    assert (log_snr.diff()[1:-1] < 0).all() and log_snr[0] == torch.inf
    alpha, sigma = SCHEDULES[name](t[:1])
    assert (alpha, sigma) == (1, 0)


@pytest.mark.parametrize("name", ["linear", "quadratic", "constant", "cosine"])
def test_whole_steps_are_the_cumulated_products(name):
    schedule = SCHEDULES[name]
    betas = {
        "linear": torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64),
        "quadratic": torch.linspace(0.01, 0.02**0.5, 1000, dtype=torch.float64) ** 2,
        "constant": torch.full((1000,), 0.01, dtype=torch.float64),
    }
    if name == "cosine":
        f = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
        beta = [min(1 - f[k] / f[k - 1], 0.999) for k in range(1, 1001)]
        betas["cosine"] = torch.tensor(beta, dtype=torch.float64)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = schedule(t)
    torch.testing.assert_close(alpha**2, (1 - betas[name]).cumprod(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))


def test_sigmoid_is_the_papers():
    # Jabri et al. 2022: gamma(t) = (s(end) - s(t)) / (s(end) - s(start))
    k = torch.arange(1, 1000, dtype=torch.float64)
    start, end = torch.tensor([-3.0, 3.0], dtype=torch.float64).sigmoid()
    alpha, _ = SCHEDULES["sigmoid"](k / 1000)
    gamma = (end - torch.sigmoid(6 * k / 1000 - 3)) / (end - start)
    torch.testing.assert_close(alpha**2, gamma, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine", "quadratic"])
def test_zero_terminal_is_algorithm_1(name):
    k = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, _ = SCHEDULES[name](k)
    expected = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    found, sigma = schedules.ZeroTerminal(SCHEDULES[name])(k)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    assert (found[-1], sigma[-1]) == (0, 1)
    torch.testing.assert_close(found**2 + sigma**2, torch.ones_like(k))


def test_the_sdes_are_the_papers():
    # Song et al. 2021, eq. 29, by integrating beta and g^2 numerically.
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for name in ("vp", "sub-vp"):
        alpha, sigma = SCHEDULES[name](t)
        integral = torch.cumulative_trapezoid(0.1 + 19.9 * t, t)
        torch.testing.assert_close(alpha[1:], (-integral / 2).exp(), rtol=1e-6, atol=0)
        variance = 1 - (-integral).exp()
        if name == "sub-vp":
            variance = variance**2
        torch.testing.assert_close(sigma[1:] ** 2, variance, rtol=1e-6, atol=0)
    _, sigma = SCHEDULES["ve"](t)
    assert float(sigma[-1]) == pytest.approx(50)
    geometric = 0.01 * 5000**t
    assert (sigma[20_000:] / geometric[20_000:] - 1).abs().max() < 0.02
    one, _ = SCHEDULES["vp"](torch.tensor([0.25, 1.0]))
    many, _ = schedules.Linear(100_000, 0.1 / 1e5, 20 / 1e5)(torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(one, many, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", [schedules.VarianceExploding, schedules.VariancePreserving])
def test_ends_in_the_wrong_order_are_refused(kind):
    with pytest.raises(ValueError, match="expected 0 <"):
        kind(2.0, 1.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_inverts_log_snr(name):
    t = torch.linspace(0.001, 0.999, 777, dtype=torch.float64)
    schedule = SCHEDULES[name]
    torch.testing.assert_close(schedule.time(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-9)
    ends = schedule.time(torch.tensor([torch.inf, -torch.inf], dtype=torch.float64))
    assert ends.tolist() == [0, 1]


def test_schedules_follow_the_type_and_shape_of_t():
    for schedule in SCHEDULES.values():
        alpha, sigma = schedule(torch.rand(3, 1))
        assert alpha.dtype == sigma.dtype == torch.float32 and alpha.shape == (3, 1)


def test_betas_outside_0_1_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        schedules.Betas(torch.tensor([0.1, 1.0]))


@pytest.mark.parametrize("target", targets.TARGETS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_target_recovers_the_picture(name, target):
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)[:, None]
    alpha, sigma = SCHEDULES[name](t)
    x0, e = Rng(range(25)).normal(6).double(), Rng(range(50, 75)).normal(6).double()
    ab = a, b = targets.TARGETS[target](alpha, sigma)
    recovered = targets.clean(alpha * x0 + sigma * e, a * x0 + b * e, alpha, sigma, ab)
    torch.testing.assert_close(recovered, x0, rtol=1e-6, atol=1e-6)


def test_guidance_of_gaussian_classes_moves_the_mean():
    # With class means +-m of equal covariance, guided x_0 is the conditional plus (w-1) times
    # the difference; w=1 is the conditional itself, w=0 the unconditional.
    given, without = torch.tensor([2.0]), torch.tensor([1.0])
    for scale, expected in [(0.0, 1.0), (1.0, 2.0), (3.0, 4.0)]:
        denoise = guidance.classifier_free(lambda x, t: (given, without), scale)
        assert denoise(torch.zeros(1), 0.5).item() == expected
    clip = guidance.clipped(lambda x, t: 3 * x, -1.0, 1.0)
    assert clip(torch.tensor([-1.0, 0.1, 1.0]), 0.5).tolist() == pytest.approx([-1.0, 0.3, 1.0])


def test_times():
    rng = Rng(range(20000))
    straight = SCHEDULES["straight"]
    t = times.Uniform()(rng, straight)
    assert abs(t.mean() - 0.5) < 0.01 and 0 < t.min() and t.max() < 1
    t = times.Uniform(steps=4)(rng, straight)
    assert t.unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    t = times.LogitNormal(0.5, 2.0)(rng, straight).logit()
    assert abs(t.mean() - 0.5) < 0.05 and abs(t.std() - 2) < 0.05


def importance(root, rounds=6, history=4, even=0.0):
    """Times that were told losses of a root mean square at each step, in random order."""
    sampler = times.Importance(len(root), history, even)
    order = torch.Generator().manual_seed(0)
    t = torch.arange(1, len(root) + 1) / len(root)
    for _ in range(rounds):
        for step in torch.randperm(len(root), generator=order).split(3):
            sign = torch.where(torch.rand(len(step), generator=order) < 0.5, -1.0, 1.0)
            sampler.tell(t[step], sign * root[step])
        sampler.update()
    return sampler


def test_importance_is_even_until_every_step_has_its_history():
    root = torch.tensor([1.0, 2.0, 3.0, 10.0])
    for rounds in range(4):
        sampler = importance(root, rounds)
        assert sampler.known == float(rounds >= 4)
        assert sampler.probabilities().tolist() == [0.25] * 4 and sampler.visited == 1
    sampler = importance(root, 4)
    assert sampler.known == 1
    torch.testing.assert_close(sampler.probabilities(), root.double() / 16)
    assert sampler.visited == pytest.approx(16**2 / (4 * 114))
    drawn = sampler(Rng(range(20000)), None)
    shares = torch.bincount((drawn * 4).long() - 1, minlength=4) / 20000
    torch.testing.assert_close(shares, root / 16, rtol=0, atol=0.015)


def test_importance_forgets_all_but_the_last_losses():
    sampler = importance(torch.ones(3), history=2)
    sampler.tell(torch.tensor([1, 1, 1, 1, 2]) / 3, torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0]))
    sampler.tell(torch.tensor([2, 2]) / 3, torch.tensor([math.nan, 3.0]))
    sampler.update()
    assert [sorted(row) for row in sampler.losses.abs().tolist()] == [[7, 8], [3, 9], [1, 1]]


@pytest.mark.parametrize("even", [0.0, 0.1, 1.0])
def test_a_loss_drawn_by_importance_is_unbiased_and_varies_least(even):
    mean = torch.tensor([1000.0, 30.0, 4.0, 1.0, 1.0])
    sampler = importance(mean, even=even)
    every = torch.arange(1, 6) / 5
    estimate = sampler.weight(every).double() * mean  # at each step
    chance = sampler.probabilities()
    assert chance.sum() == pytest.approx(1)
    assert (chance * estimate).sum() == pytest.approx(mean.double().mean().item())
    variance = (chance * estimate.square()).sum() - mean.double().mean() ** 2
    evenly = mean.double().square().mean() - mean.double().mean() ** 2
    assert variance < {0.0: 1e-6, 0.1: 0.15, 1.0: 1.0 + 1e-6}[even] * evenly


def test_several_processes_share_one_history(monkeypatch):
    t, loss = torch.tensor([1, 2, 1, 3, 1, 1]) / 3, torch.arange(6.0)
    alone, shared = times.Importance(3, 2), times.Importance(3, 2)
    alone.tell(t, loss)
    alone.update()
    others = iter([torch.tensor([2, 0, 0]), loss[3:]])  # steps and losses of the second process
    monkeypatch.setattr(times.distributed, "gather", lambda own: torch.stack([own, next(others)]))
    shared.tell(t[:3], loss[:3])
    shared.update()
    assert torch.equal(alone.losses, shared.losses) and torch.equal(alone.told, shared.told)


def test_importance_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="history 0 and even 0.001; expected at least 1"):
        times.Importance(10, 0)


def test_min_snr_weights():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    alpha, sigma = SCHEDULES["cosine"](t)
    snr = (alpha / sigma) ** 2
    weigh = weights.MinSNR(5.0)
    weight = {name: weigh(alpha, sigma, f(alpha, sigma)) for name, f in targets.TARGETS.items()}
    torch.testing.assert_close(weight["image"], snr.clamp(max=5))
    torch.testing.assert_close(weight["noise"], snr.clamp(max=5) / snr)
    torch.testing.assert_close(weight["velocity"], snr.clamp(max=5) / (snr + 1))


@pytest.mark.parametrize(
    "name,at2,at_half", [("l2", 4, 0.25), ("l1", 2, 0.5), ("huber", 1.5, 0.125)]
)
def test_losses(name, at2, at_half):
    loss = weights.LOSSES[name](torch.tensor([2.0, 0.5]), torch.zeros(2))
    assert loss.tolist() == [at2, at_half]
