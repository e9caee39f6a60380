"""Gaussian data in two dimensions, where the exact denoiser and the exact flow are known."""

import torch

from trilemma.batch import Rng
from trilemma.diffusion import schedules

SCHEDULES = {
    "linear": schedules.Linear(),
    "quadratic": schedules.Quadratic(),
    "constant": schedules.Constant(),
    "cosine": schedules.Cosine(),
    "straight": schedules.Straight(),
    "sigmoid": schedules.Sigmoid(),
    "zero-terminal": schedules.ZeroTerminal(schedules.Linear()),
    "ve": schedules.VarianceExploding(),
    "vp": schedules.VariancePreserving(),
    "sub-vp": schedules.SubVP(),
}
MEAN = torch.tensor([0.4, -0.3], dtype=torch.float64)
ROOT = torch.tensor([[0.5, 0.0], [0.3, 0.2]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T


def levels(schedule, t):
    return (float(v) for v in schedule(torch.tensor(t, dtype=torch.float64)))


def exact(schedule):
    """The posterior mean of x_0 when the data are Gaussian."""

    def denoise(x, t):
        alpha, sigma = levels(schedule, t)
        eye = torch.eye(2, dtype=torch.float64)
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * eye)
        return MEAN + (x - alpha * MEAN) @ gain.T

    return denoise


def flow(schedule, x, start=1.0, end=0.0):
    """Where the probability flow takes x from one time to another: each axis is rescaled."""
    values, axes = torch.linalg.eigh(COVARIANCE)
    (alpha, sigma), (alpha_end, sigma_end) = (levels(schedule, t) for t in (start, end))
    variance = alpha**2 * values + sigma**2
    scale = ((alpha_end**2 * values + sigma_end**2) / variance).sqrt()
    return alpha_end * MEAN + (x - alpha * MEAN) @ (axes * scale) @ axes.T


def noise(n):
    return Rng(range(10**6, 10**6 + n)).normal(2).double()
