"""How an error counts: the loss of one number, and the weight of a time.

A weight w(SNR) in front of the squared error of x_0 is turned by the target's formula
x_0 = (b x_t - sigma F) / (b alpha - a sigma) into one in front of the error of F, w times
(sigma / (b alpha - a sigma))^2. Min-SNR: Hang et al. 2023, "Efficient Diffusion Training via
Min-SNR Weighting Strategy", eq. 7: w = min(SNR, gamma).

A learned weight: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", eq. 21, takes the error e at time t as one of many tasks, each with an uncertainty u(t)
learned beside the network,

    loss = w e / exp(u(t)) + u(t),

which is least when exp(u) is the mean error at t: then all times pull alike, however large their
errors are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.diffusion.targets import Coefficients
from trilemma.networks.layers import sinusoidal


def _l2(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target, reduction="none")


def _l1(output: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(output, target, reduction="none")


def _huber(output: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(output, target, reduction="none")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": _l2, "l1": _l1, "huber": _huber}
"""Name -> (output, target) -> elementwise loss."""


class Even:
    """Errors of F count alike at all times."""

    def __call__(self, alpha: Tensor, sigma: Tensor, ab: Coefficients) -> Tensor | float:
        """Return 1."""
        return 1.0


class MinSNR:
    """Errors of x_0 count by min(SNR, gamma).

    Args:
        gamma: the largest weight.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        self.gamma = gamma

    def __call__(self, alpha: Tensor, sigma: Tensor, ab: Coefficients) -> Tensor | float:
        """Return the weight of an error of F at (alpha, sigma), in their shape."""
        a, b = ab
        snr = (alpha / sigma) ** 2
        return snr.clamp(max=self.gamma) * (sigma / (b * alpha - a * sigma)) ** 2


class Uncertainty(nn.Module):
    """The learned log of the mean error at a time: u(t), linear in sines and cosines of t.

    Args:
        features: their number.
    """

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        self.features = features
        self.linear = nn.Linear(features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Return u (B,) at times t (B,) in [0, 1]."""
        return self.linear(sinusoidal(1000 * t, self.features)).squeeze(1).float()
