"""Our solvers against diffusers' schedulers: the same denoiser, times, start and fresh noise.

The denoiser is a fixed smooth function of (x_t, log sigma / alpha) on the schedule of linear betas.
Our times are made of the levels that a scheduler chose (its spacing, its rounding of sigma), and
schedulers with a choice of the last step go to sigma = 0; where more was matched, the test says so.
"""

from __future__ import annotations

import math

import pytest
import torch

from trilemma.batch import Rng
from trilemma.diffusion import grids, schedules, solvers

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow

SCHEDULE = schedules.Linear()
SHAPE = (4, 6)


def draws(n=120):
    return [Rng(range(1000 * i, 1000 * i + SHAPE[0])).normal(SHAPE[1]).double() for i in range(n)]


IN, OUT, SHIFT = (2 * Rng([seed]).uniform(6, 6)[0].double() - 1 for seed in (1, 2, 3))
START = draws(1)[0]


class Given:
    """An Rng, or a stand-in for diffusers' randn_tensor, that gives the same noise to both."""

    def __init__(self):
        self.noise = iter(draws()[1:])

    def normals(self, draws, *shape):
        return self.noise

    def __call__(self, *arguments, dtype=torch.float64, **options):
        return next(self.noise).to(dtype)


def expected(x, ratio):
    """x_0 of variance-preserving x (4, 6) at sigma / alpha."""
    ratio = float(ratio)
    return 0.8 * torch.tanh(x.double() @ IN + math.log(ratio) * SHIFT[0] / 4) @ OUT / 2


def ours(name, times, noise=None, **own):
    def denoise(x, t):
        alpha, sigma = SCHEDULE(torch.tensor(t, dtype=torch.float64))
        return expected(x, sigma / alpha)

    times = torch.as_tensor(times, dtype=torch.float64)
    *_, last = solvers.SOLVERS[name].steps(denoise, START, times, SCHEDULE, noise, **own)
    return last


def noise_at(x, ratio):
    """What a network that predicts noise would say of variance-preserving x."""
    alpha = 1 / (1 + ratio**2) ** 0.5
    return (x - alpha * expected(x, ratio)) / (ratio * alpha)


def follow(scheduler, **options):
    """Follow a scheduler whose state is variance-preserving; return the end and sigma / alpha."""
    x, visited = START, []
    for t in scheduler.timesteps:
        kept = scheduler.alphas_cumprod[int(t)].double()
        ratio = float(((1 - kept) / kept) ** 0.5)
        visited.append(ratio)
        x = scheduler.step(noise_at(x, ratio), t, x, **options).prev_sample
    return x, visited


def follow_unscaled(scheduler):
    """Follow one whose state is x / alpha, and that chooses sigma / alpha itself."""
    first = float(scheduler.sigmas[0])
    x, visited = START * (1 + first**2) ** 0.5, []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        ratio = float(scheduler.sigmas[scheduler.step_index])
        visited.append(ratio)
        x = scheduler.step(noise_at(scaled, ratio), t, x).prev_sample
    return x, list(dict.fromkeys(visited))


def times_of(ratios):
    log_snr = -2 * torch.tensor(ratios, dtype=torch.float64).log()
    return torch.cat([SCHEDULE.time(log_snr), torch.zeros(1, dtype=torch.float64)])


def same(mine, theirs):
    torch.testing.assert_close(mine, theirs.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(variance, monkeypatch):
    scheduler = diffusers.DDPMScheduler(variance_type=f"fixed_{variance}", clip_sample=False)
    scheduler.set_timesteps(10)
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", Given())
    theirs, ratios = follow(scheduler)
    same(ours("ddpm", times_of(ratios), Given(), variance=variance), theirs)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta, spacing, monkeypatch):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddim, "randn_tensor", Given())
    theirs, ratios = follow(scheduler, eta=eta)
    same(ours("ddim", times_of(ratios), Given(), eta=eta), theirs)
    if spacing == "trailing":
        same(ours("ddim", grids.trailing(SCHEDULE, 10), Given(), eta=eta), theirs)


def test_dpmpp_2m():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(10)
    theirs, ratios = follow(scheduler)
    same(ours("dpmpp_2m", times_of(ratios)), theirs)


def test_dpmpp_2m_sde(monkeypatch):
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(10)
    module = diffusers.schedulers.scheduling_dpmsolver_multistep
    monkeypatch.setattr(module, "randn_tensor", Given())
    theirs, ratios = follow(scheduler)
    same(ours("dpmpp_2m_sde", times_of(ratios), Given()), theirs)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, variant):
    """Matched: bh1 ends at the first step's sigma; to sigma = 0 diffusers' gives no numbers."""
    options = {"final_sigmas_type": "sigma_min"} if variant == "bh1" else {}
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, **options
    )
    scheduler.set_timesteps(10)
    theirs, ratios = follow(scheduler)
    times = times_of(ratios)
    times[-1] = 0.001 if variant == "bh1" else 0
    same(ours("unipc", times, order=order, variant=variant), theirs)


def test_heun():
    """Matched: the unscaled frame, in which diffusers steps."""
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(10)
    theirs, ratios = follow_unscaled(scheduler)
    same(ours("heun", times_of(ratios), frame="unscaled"), theirs)


def test_euler_ancestral(monkeypatch):
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(10)
    module = diffusers.schedulers.scheduling_euler_ancestral_discrete
    monkeypatch.setattr(module, "randn_tensor", Given())
    theirs, ratios = follow_unscaled(scheduler)
    same(ours("euler_ancestral", times_of(ratios), Given()), theirs)


def test_euler():
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    theirs, ratios = follow_unscaled(scheduler)
    same(ours("euler", times_of(ratios)), theirs)


def test_lms():
    pytest.importorskip("scipy")
    scheduler = diffusers.LMSDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    theirs, ratios = follow_unscaled(scheduler)
    same(ours("lms", times_of(ratios)), theirs)


def test_pndm():
    """Matched: 50 steps, whose middles are whole steps of the schedule as diffusers needs."""
    scheduler = diffusers.PNDMScheduler(set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    theirs, _ = follow(scheduler)
    times = torch.cat([torch.arange(981, 0, -20) / 1000, torch.zeros(1)])
    same(ours("pndm", times), theirs)


def test_ipndm():
    """Matched: its sigmas are ours, from t = 0.6: near 1 its float32 alpha = sqrt(1 - sigma^2) is
    too coarse. It takes velocities.
    """
    times = torch.linspace(0.6, 0, 11, dtype=torch.float64)
    _, sigmas = SCHEDULE(times)
    scheduler = diffusers.IPNDMScheduler(trained_betas=sigmas.tolist())
    scheduler.set_timesteps(10)
    x = START
    for t, sigma in zip(scheduler.timesteps, sigmas.tolist(), strict=False):
        alpha = (1 - sigma**2) ** 0.5
        velocity = (noise_at(x, sigma / alpha) - sigma * x) / alpha
        x = scheduler.step(velocity, t, x).prev_sample
    same(ours("ipndm", times), x)
