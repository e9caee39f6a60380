"""Laws of the metrics, each on data where the answer is known."""

import math

import pytest
import torch
from torch import nn

from trilemma.memory import peak_memory
from trilemma.metrics import neighbours
from trilemma.metrics.frechet import Statistics, frechet_distance, statistics
from trilemma.metrics.inception_score import inception_score
from trilemma.metrics.kernel import kernel_distance, mmd2
from trilemma.metrics.neighbours import memorised, nearest
from trilemma.metrics.prdc import density_coverage, precision_recall
from trilemma.metrics.sliced import sliced_wasserstein
from trilemma.metrics.speed import foresee, network_calls, speed

TEN = list(range(10))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def covariance(dim):
    root = torch.randn(dim, dim, dtype=torch.float64)
    return root @ root.T / dim


def mixture(count, modes):
    """Draw from flat Gaussians far apart; `modes` lists which of the ten."""
    which = torch.tensor(modes)[torch.arange(count) % len(modes)]
    return torch.cat([100 * torch.eye(10)[which], torch.randn(count, 2)], dim=1)


# Fréchet distance


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    a, b = torch.rand(2, 12, dtype=torch.float64) + 0.1
    shift = torch.randn(12, dtype=torch.float64)
    zero = torch.zeros_like(shift)
    found = frechet_distance(
        Statistics(zero, basis @ a.diag() @ basis.T), Statistics(shift, basis @ b.diag() @ basis.T)
    )
    expected = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert found == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_distance_of_any_gaussians_is_the_trace_formula():
    a, b = covariance(9), covariance(9)
    zero = torch.zeros(9, dtype=torch.float64)
    root = torch.linalg.eigvals(a @ b).real.sqrt().sum()  # eigenvalues of (a b)^(1/2)
    expected = (a.trace() + b.trace() - 2 * root).item()
    found = frechet_distance(Statistics(zero, a), Statistics(zero, b))
    assert found == pytest.approx(expected, rel=1e-9)
    assert found == pytest.approx(
        frechet_distance(Statistics(zero, b), Statistics(zero, a)), rel=1e-12
    )


@pytest.mark.parametrize("count", [3, 20, 500])
def test_frechet_distance_to_itself_is_zero(count):
    seen = statistics(torch.randn(count, 40) @ torch.randn(40, 40))
    assert frechet_distance(seen, seen) < 1e-9 * seen.covariance.trace()


def test_frechet_distance_holds_where_the_covariance_is_singular():
    x, y = torch.randn(10, 64), 2 * torch.randn(7, 64) + 1
    centred = [(z.double() - z.double().mean(0)) / math.sqrt(len(z) - 1) for z in (x, y)]
    root = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (x.double().mean(0) - y.double().mean(0)).square().sum()
    expected += sum(c.square().sum() for c in centred) - 2 * root
    found = frechet_distance(statistics(x), statistics(y))
    assert found == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_samples_approaches_that_of_their_gaussians():
    a, b = covariance(5), covariance(5)
    zero, shift = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    truth = frechet_distance(Statistics(zero, a), Statistics(shift, b))
    x = torch.randn(200_000, 5, dtype=torch.float64) @ torch.linalg.cholesky(a).T
    y = torch.randn(200_000, 5, dtype=torch.float64) @ torch.linalg.cholesky(b).T + 1
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(truth, rel=0.02)


def test_statistics_are_the_unbiased_ones():
    x = torch.randn(30, 4, dtype=torch.float64)
    seen = statistics(x)
    assert torch.allclose(seen.covariance, torch.cov(x.T))
    assert torch.allclose(seen.mean, x.mean(0))


def test_frechet_distance_refuses_unlike_features_and_single_samples():
    with pytest.raises(ValueError, match="3 and of 4"):
        frechet_distance(statistics(torch.randn(5, 3)), statistics(torch.randn(5, 4)))
    with pytest.raises(ValueError, match="at least 2"):
        statistics(torch.randn(1, 3))


# Kernel distance


def test_kernel_distance_is_the_sum_over_pairs():
    x, y = torch.randn(2, 6, 3).double()
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(6) for j in range(6)]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / 30
    expected -= 2 * sum(k(x[i], y[j]) for i, j in pairs) / 36
    assert mmd2(x, y).item() == pytest.approx(expected.item(), rel=1e-12)


def test_kernel_distance_is_unbiased_at_small_samples():
    values = torch.stack([mmd2(*torch.randn(2, 10, 4)) for _ in range(500)])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean()) < 4 * error
    shifted = torch.stack([mmd2(torch.randn(10, 4), torch.randn(10, 4) + 1) for _ in range(500)])
    many = mmd2(torch.randn(4000, 4), torch.randn(4000, 4) + 1)
    error = shifted.std() / math.sqrt(len(shifted))
    assert abs(shifted.mean() - many) < 4 * error + 0.05 * many


def test_kernel_distance_over_subsets_tells_its_spread_and_repeats():
    x, y = torch.randn(400, 8), torch.randn(300, 8) + 0.5
    value, spread = kernel_distance(x, y, subsets=20, size=100)
    assert value > 0 and 0 < spread
    assert (value, spread) == kernel_distance(x, y, subsets=20, size=100)
    assert kernel_distance(x[:300], y, size=1000)[1] == 0  # one subset: everything
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(x, y[:1])


# Inception score


def test_inception_score_counts_the_classes_when_sure():
    logits = 100 * torch.eye(5)[torch.randperm(500) % 5]
    mean, spread = inception_score(logits, splits=1)
    assert mean == pytest.approx(5, rel=1e-9) and spread == 0
    assert inception_score(logits[:1].expand(50, -1))[0] == pytest.approx(1)
    assert inception_score(torch.zeros(50, 5))[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="3 samples"):
        inception_score(logits[:3])


# Sliced Wasserstein distance


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_dimension():
    x, shift = torch.randn(200, 8), torch.full((8,), 3.0)
    found = sliced_wasserstein(x, x + shift, directions=8000)
    assert found == pytest.approx(shift.norm().item() / math.sqrt(8), rel=0.03)
    assert sliced_wasserstein(x, x[torch.randperm(200)]) < 1e-6


def test_sliced_wasserstein_is_exact_on_a_line_at_unequal_counts():
    a, b = torch.randn(6, 1), torch.randn(4, 1)
    spread_a, spread_b = a.repeat_interleave(2, 0), b.repeat_interleave(3, 0)  # 12 of each
    expected = (spread_a.sort(0).values - spread_b.sort(0).values).square().mean().sqrt().item()
    assert sliced_wasserstein(a, b, directions=3) == pytest.approx(expected, rel=1e-5)


# Precision, recall, density, coverage


def test_a_collapsed_model_is_precise_and_covers_one_mode():
    real, drawn = mixture(1000, TEN), mixture(1000, [3])
    precision, recall = precision_recall(real, drawn)
    _, coverage = density_coverage(real, drawn)
    assert precision > 0.9
    assert recall == pytest.approx(0.1, abs=0.02)
    assert coverage == pytest.approx(0.1, abs=0.02)


def test_a_missing_mode_is_missed_by_recall_and_coverage():
    real, drawn = mixture(1000, TEN), mixture(1000, TEN[:9])
    usual = precision_recall(real, mixture(1000, TEN))[1]
    covered = density_coverage(real, mixture(1000, TEN))[1]
    assert min(usual, covered) > 0.9
    assert precision_recall(real, drawn)[1] == pytest.approx(0.9 * usual, abs=0.03)
    assert density_coverage(real, drawn)[1] == pytest.approx(0.9 * covered, abs=0.03)


def test_junk_lowers_precision_and_not_coverage():
    real, drawn = mixture(1000, TEN), mixture(1000, TEN)
    drawn[:500] += 1000
    precision, _ = precision_recall(real, drawn)
    density, coverage = density_coverage(real, drawn)
    assert precision == pytest.approx(0.5, abs=0.05)
    assert density == pytest.approx(0.5, abs=0.1)
    assert coverage > 0.75


def test_equal_distributions_score_as_theory_says():
    real, drawn = torch.randn(2, 2000, 4)
    density, coverage = density_coverage(real, drawn, k=5)
    assert density == pytest.approx(1, abs=0.1)
    assert coverage == pytest.approx(1 - 0.5**5, abs=0.03)  # Naeem et al., equation 7, large N
    assert precision_recall(real, real) == (1, 1)


def test_scores_by_balls_equal_their_definitions(monkeypatch):
    real, drawn = torch.randn(60, 3), torch.randn(40, 3) * 1.3
    monkeypatch.setattr(neighbours, "_PAIRS", 100)  # a few rows at a time
    distance = torch.cdist(drawn, real)
    radius = lambda x, k: torch.cdist(x, x).sort(1).values[:, k]  # noqa: E731
    found = precision_recall(real, drawn, k=3)
    assert found[0] == pytest.approx((distance <= radius(real, 3)).any(1).float().mean().item())
    inside = distance <= radius(drawn, 3)[:, None]
    assert found[1] == pytest.approx(inside.any(0).float().mean().item())
    inside = distance <= radius(real, 5)
    density, coverage = density_coverage(real, drawn, k=5)
    assert density == pytest.approx(inside.sum().item() / (5 * 40))
    assert coverage == pytest.approx(inside.any(0).float().mean().item())


# Neighbours


@pytest.mark.parametrize("pairs", [1, 70, 2**20])
def test_blocked_distances_equal_the_full_ones(monkeypatch, pairs):
    monkeypatch.setattr(neighbours, "_PAIRS", pairs)
    a, b = torch.randn(23, 6) + 5, torch.randn(31, 6) + 5
    full = torch.cdist(a.double(), b.double())
    index, distance = nearest(a, b, 4)
    expected = full.topk(4, largest=False)
    assert torch.equal(index, expected.indices)
    assert torch.allclose(distance.double(), expected.values, atol=1e-5)
    index, distance = nearest(a, a, 2, same=True)
    assert (index != torch.arange(23)[:, None]).all()
    assert torch.allclose(distance, torch.cdist(a, a).sort(1).values[:, 1:3], atol=1e-5)
    with pytest.raises(ValueError, match="22"):
        nearest(a, a, 23, same=True)


def test_memorised_sees_copies_and_lets_unseen_images_pass():
    training, held_out, fresh = torch.randn(3, 2000, 8)
    assert memorised(training[:500], held_out, training) == 1
    assert memorised(training[:500] + 1e-3, held_out, training) == 1
    assert memorised(fresh, held_out, training) == pytest.approx(0.05, abs=0.02)
    half = torch.cat([training[:1000], fresh[:1000]])
    assert memorised(half, held_out, training) == pytest.approx(0.525, abs=0.02)


# Speed


class Toy(nn.Module):
    """Calls one network thrice an image, the second time doubled as guidance does."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 2)

    def draw(self, count):
        x = self.network(torch.zeros(count, 4))
        x = self.network(torch.cat([x, x]))[:count]
        return self.decoder(x)


def test_calls_are_counted_by_image_and_the_hooks_go_away():
    model = Toy()
    with network_calls(model) as calls:
        model.draw(5)
    assert calls == {"network": 15, "decoder": 5}
    model.draw(5)
    assert calls == {"network": 15, "decoder": 5}


def test_speed_reports_what_drawing_costs(monkeypatch):
    monkeypatch.setattr("trilemma.metrics.speed._SECONDS", 0.01)
    model = Toy()
    cost = speed(model, model.draw, [1, 64])
    assert cost["calls"] == 3 and cost["parameters"] == 20 + 10 and cost["batch"] == 64
    assert set(cost["by_batch"]) == {"1", "64"}
    assert cost["images_per_second"] == cost["by_batch"]["64"] > cost["by_batch"]["1"] > 0


class Clock:
    """A clock that stands still but for drawing: a batch of s pictures takes once + each * s."""

    def __init__(self, once, each):
        self.now, self.once, self.each, self.drawn = 0.0, once, each, []

    def perf_counter(self):
        return self.now

    def draw(self, size):
        self.drawn.append(size)
        self.now += self.once + self.each * size


@pytest.mark.parametrize(
    ("once", "each", "batch"),
    [(0.001, 0.0001, 128), (20.0, 0.01, 128), (0.5, 0.5, 32), (1.0, 7.0, 4), (0.0, 40.0, 1)],
)
def test_slow_models_are_timed_in_smaller_batches(monkeypatch, once, each, batch):
    clock = Clock(once, each)
    monkeypatch.setattr("trilemma.metrics.speed.time", clock)
    cost = speed(Toy(), clock.draw, [1, 128], longest=30.0)
    assert cost["batch"] == batch and set(cost["by_batch"]) == {"1", str(batch)}
    assert cost["images_per_second"] == pytest.approx(batch / (once + each * batch))
    if batch > 1:
        assert foresee(clock.draw, torch.device("cpu"), 1e9) == pytest.approx((once, each))


def test_speed_draws_no_more_than_it_needs(monkeypatch):
    clock = Clock(0.5, 0.5)
    monkeypatch.setattr("trilemma.metrics.speed.time", clock)
    speed(Toy(), clock.draw, [1, 128], longest=30.0)
    assert sum(clock.drawn) < 80  # 40 seconds at two pictures a second


def test_speed_draws_no_more_at_a_time_than_memory_has_room_for(monkeypatch):
    monkeypatch.setattr("trilemma.metrics.speed._SECONDS", 0.01)
    monkeypatch.setattr("trilemma.memory.available", lambda: 4000)
    sizes = []

    def peak(draw, where):  # an image takes 100 bytes
        draw()
        return 100 * sizes[-1]

    monkeypatch.setattr("trilemma.metrics.speed.peak_memory", peak)
    model = Toy()

    def draw(count):
        sizes.append(count)
        model.draw(count)

    cost = speed(model, draw, [1, 128], longest=30.0)
    assert max(sizes) == cost["batch"] == cost["room"] == 20 and cost["memory"] == 2000


def test_speed_halves_what_finds_no_room_on_a_gpu(monkeypatch):
    monkeypatch.setattr("trilemma.metrics.speed._SECONDS", 0.01)
    model = Toy()

    def draw(count):
        if count > 40:
            raise torch.OutOfMemoryError("no room")
        model.draw(count)

    cost = speed(model, draw, [1, 128])
    assert cost["batch"] == cost["room"] == 32


def test_peak_memory_sees_what_was_taken_and_given_back():
    found = peak_memory(lambda: torch.ones(50_000_000).sum(), torch.device("cpu"))
    if found is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 190e6 < found < 300e6
