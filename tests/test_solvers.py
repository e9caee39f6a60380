"""Laws of solvers and their grids, on Gaussian data with the exact denoiser."""

import math

import pytest
import torch

from gaussian import COVARIANCE, MEAN, SCHEDULES, exact, flow, levels, noise
from trilemma.batch import Rng
from trilemma.diffusion import grids, solvers


def run(name, schedule, steps, x, grid=None, **own):
    solver = solvers.SOLVERS[name]
    path = (grid or solver.grid)(schedule, steps)
    rng = Rng(range(len(x)))
    *_, last = solver.steps(exact(schedule), x, path, schedule, rng, **own)
    return last


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("grid", grids.GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_grids_fall_from_1_to_0(name, grid, steps):
    path = grids.GRIDS[grid](SCHEDULES[name], steps)
    assert len(path) == steps + 1 and path[0] == 1 and path[-1] == 0
    assert (path.diff() < 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver,order", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_solvers_converge_to_the_flow_at_their_order(name, solver, order):
    schedule, x = SCHEDULES[name], noise(64)
    target = flow(schedule, x)
    # Halving the steps must shrink the error 2^order times; the first and last step, of fixed
    # size on some grids, leave a floor that is far below. On ddim's own grid the last step, to
    # t = 0, is coarse in log-SNR: its order shows on another.
    grid = grids.even_log_snr if solver == "ddim" else None
    error = [
        (run(solver, schedule, n, x, grid) - target).abs().max().item() for n in (16, 32, 64, 128)
    ]
    assert error[-1] < (0.03 if order == 1 else 0.003)
    fall = math.log2(error[1] / error[-1]) / 2
    assert fall > order - 0.35, error


# Orders as the mathematics has them. pndm and ipndm are of order 2 for all that they remember: they
# average noises evenly over time, and step as if they had been averaged over sigma / alpha.
ORDERS = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("heun", {"frame": "unscaled"}, 2),
    ("pndm", {}, 2),
    ("ipndm", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_3m", {}, 3),
    *(("unipc", {"order": k}, k + 1) for k in (1, 2, 3)),
    *(("unipc", {"order": k, "variant": "bh1"}, k + 1) for k in (1, 2)),
    *(("adams_bashforth", {"order": k}, k) for k in (1, 2, 3, 4)),
    *(("lms", {"order": k}, k) for k in (1, 2, 3, 4)),
]


@pytest.mark.parametrize("name", ["linear", "straight"])
@pytest.mark.parametrize("solver,own,order", ORDERS)
def test_solvers_have_their_order(name, solver, own, order):
    # From one noise level inside the schedule to another. The steps begin with short ones, so that
    # a multistep method's beginning at order 1 adds nothing: the first is of size 1/n^2. Those that
    # need even times begin at 1/n, which costs an error of 1/n^2. A few more steps after the last
    # measured one keep that from being the solver's own last, which some take at a lower order.
    schedule = SCHEDULES[name]
    begin, end = schedule.time(torch.tensor([-3.0, 2.0], dtype=torch.float64)).tolist()
    x = noise(32)
    target = flow(schedule, x, begin, end)
    errors = []
    for n in (48, 96):
        z = torch.arange(n + 4, dtype=torch.float64) / n
        if solver in ("pndm", "ipndm"):
            path = begin + (end - begin) * z
        else:
            path = schedule.time(-3 + 5 * z**2)
        path = torch.cat([path, path.new_zeros(1)])
        states = solvers.SOLVERS[solver].steps(exact(schedule), x, path, schedule, None, **own)
        errors.append((list(states)[n - 1] - target).abs().max().item())
    assert order - 0.3 < math.log2(errors[0] / errors[1]) < order + 0.6, errors


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "solver", [name for name, solver in solvers.SOLVERS.items() if not solver.stochastic]
)
def test_solvers_reach_the_end_of_the_flow_on_their_own_grid(name, solver):
    schedule, x = SCHEDULES[name], noise(64)
    error = [(run(solver, schedule, n, x) - flow(schedule, x)).abs().max() for n in (16, 64)]
    assert error[1] < 0.55 * error[0], error
    coarse = name == "constant" and solvers.SOLVERS[solver].grid is grids.even_time
    assert error[1] < 0.1 or coarse, error  # the last of even times, of constant betas, is long


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "solver,own",
    [
        ("euler_ancestral", {}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_2m_sde", {"eta": 0.4}),
        ("heun", {"s_churn": 30.0}),
        ("ddpm", {}),
        ("ddim", {"eta": 0.5}),
        ("ddim", {"eta": 1.0}),
    ],
)
def test_stochastic_solvers_reach_mean_and_covariance(name, solver, own):
    n = 8000
    grid = grids.even_log_snr
    _, sigma = levels(SCHEDULES[name], 1.0)
    drawn = run(solver, SCHEDULES[name], 150, sigma * noise(n), grid=grid, **own)
    torch.testing.assert_close(drawn.mean(0), MEAN, rtol=0, atol=0.025)
    torch.testing.assert_close(drawn.T.cov(), COVARIANCE, rtol=0, atol=0.025)


def test_the_two_variances_bound_the_true_one():
    # Ho et al. 2020, section 3.2: the two choices are the lower and upper bound of the entropy.
    spread = {}
    for variance in ("small", "large"):
        for steps in (20, 300):
            drawn = run("ddpm", SCHEDULES["linear"], steps, noise(6000), variance=variance)
            spread[variance, steps] = drawn.T.cov().trace().item()
    true = COVARIANCE.trace().item()
    assert spread["small", 20] < 0.8 * true and spread["small", 20] < spread["small", 300]
    assert spread["large", 20] > spread["small", 20] + 0.1 * true
    assert abs(spread["small", 300] - true) < 0.05 and abs(spread["large", 300] - true) < 0.05


def test_ddim_with_eta_1_is_ddpm():
    x = noise(16)
    for schedule in SCHEDULES.values():
        a, b = run("ddim", schedule, 10, x, eta=1.0), run("ddpm", schedule, 10, x)
        torch.testing.assert_close(a, b)


def test_euler_is_ddim_on_the_same_times():
    x = noise(16)
    for schedule in SCHEDULES.values():
        a = run("ddim", schedule, 10, x, grid=grids.even_share)
        torch.testing.assert_close(a, run("euler", schedule, 10, x))


def test_euler_on_the_straight_schedule_is_the_plain_flow():
    schedule = SCHEDULES["straight"]
    x = expected = noise(16)
    path = torch.linspace(1, 0, 11, dtype=torch.float64).tolist()
    for t, t_next in zip(path, path[1:], strict=False):
        x0 = exact(schedule)(expected, t)
        velocity = (expected - (1 - t) * x0) / t - x0
        expected = expected + (t_next - t) * velocity
    torch.testing.assert_close(run("euler", schedule, 10, x), expected)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_solvers_yield_each_step_and_call_as_often_as_they_say(solver):
    calls = []

    def denoise(x, t):
        calls.append(t)
        return x * 0.5

    schedule = SCHEDULES["linear"]
    path = solvers.SOLVERS[solver].grid(schedule, 6)
    steps, _, each, extra, _ = solvers.SOLVERS[solver]
    states = list(steps(denoise, noise(2), path, schedule, Rng(range(2))))
    assert len(states) == 6
    assert len(calls) == 6 * each + extra


def test_multistep_methods_of_order_1_are_the_single_steps():
    x = noise(16)
    for schedule in SCHEDULES.values():
        euler = run("euler", schedule, 10, x)
        torch.testing.assert_close(run("adams_bashforth", schedule, 10, x, order=1), euler)
        same = run("lms", schedule, 10, x, grids.even_share, order=1)
        torch.testing.assert_close(same, euler)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_few_steps_from_pure_noise_stay_finite(solver, steps):
    drawn = run(solver, SCHEDULES["straight"], steps, noise(8))
    far = 30 if solver in ("langevin", "sde") else 8  # these need many steps
    assert drawn.isfinite().all() and (drawn - MEAN).abs().max() < far


def test_churn_adds_noise_between_its_bounds_alone():
    schedule, x = SCHEDULES["linear"], noise(4)
    still = run("heun", schedule, 12, x)
    assert not torch.allclose(run("heun", schedule, 12, x, s_churn=10.0), still)
    for bounds in ({"s_min": 1e6}, {"s_max": 1e-6}):
        torch.testing.assert_close(run("heun", schedule, 12, x, s_churn=10.0, **bounds), still)


@pytest.mark.parametrize(
    "solver,own,message",
    [
        ("ddpm", {"variance": "huge"}, "small, large or learned"),
        ("heun", {"frame": "round"}, "straight, unscaled"),
        ("unipc", {"variant": "bh3"}, "bh1 or bh2"),
        ("unipc", {"order": 4}, "1 to 3"),
        ("adams_bashforth", {"order": 5}, "1 to 4"),
        ("lms", {"order": 0}, "1 to 4"),
    ],
)
def test_wrong_options_name_the_right_ones(solver, own, message):
    with pytest.raises(ValueError, match=message):
        run(solver, SCHEDULES["linear"], 2, noise(2), **own)


def test_trailing_visits_whole_steps():
    path = grids.trailing(SCHEDULES["linear"], 7)
    assert torch.equal((path * 1000).round(), path * 1000)
    with pytest.raises(ValueError, match="1000 at most"):
        grids.trailing(SCHEDULES["linear"], 1001)


@pytest.mark.parametrize(
    "times", [[1.0, 0.5], [0.5, 0.7, 0.0], [2.0, 0.0], [0.0], [1.0, math.nan, 0.0]]
)
def test_times_that_do_not_fall_are_refused(times):
    with pytest.raises(ValueError, match="expected times that fall from 1 to 0"):
        grids.given(times, len(times) - 1)
    with pytest.raises(ValueError, match="2 steps, and steps is 5"):
        grids.given([1.0, 0.5, 0.0], 5)


@pytest.mark.parametrize("eta", [float("nan"), -1.0, "x"])
def test_a_solvers_numbers_are_0_or_more(eta):
    with pytest.raises(ValueError, match="'eta' is .*; expected 0 or more, such as 0.0"):
        solvers.check("ddim", {"eta": eta})
