"""A mixture of discretized logistic distributions: what a pixel is, given those before it.

Salimans et al. (2017), "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture
Likelihood and Other Modifications". A pixel is a mixture of K logistic distributions, each
integrated over the width of an 8-bit level, the outermost to infinity (equations 1 and 2): with s
the logistic function, level v in [-1, 1] and half a width d = 1/255,

    P(v) = sum_k pi_k [s((v + d - mu_k) / sigma_k) - s((v - d - mu_k) / sigma_k)].

The channels of a pixel share the component, and a channel's mean is linear in the channels before
it (equation 3). A single logistic is `likelihoods.discretized_logistic`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilemma.batch import to_float, to_uint8
from trilemma.models.likelihoods import discretized_logistic

SHARPEST = -7.0  # least logarithm of a logistic's scale


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """Draw indices (...) from logits (..., V) by uniform numbers (...) in (0, 1).

    The index is where the cumulated probability passes the number: one number is enough for each
    draw. Temperature 0 takes the likeliest; `top_k` leaves only so many likeliest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    cumulated = (logits.float() / temperature).softmax(-1).cumsum(-1)
    return (cumulated < uniform[..., None] * cumulated[..., -1:]).sum(-1)


@dataclass(frozen=True)
class LogisticMixture:
    """A distribution over the 8-bit levels of the C channels of pixels, in [-1, 1].

    Attributes:
        logits: (B, H, W, K) of the components.
        mean: (B, H, W, K, C), before the channels before have their say.
        log_scale: (B, H, W, K, C).
        slope: (B, H, W, K, C (C - 1) / 2), in -1 to 1: of channel 0 on 1; of 0, 1 on 2; ...
    """

    logits: Tensor
    mean: Tensor
    log_scale: Tensor
    slope: Tensor

    @staticmethod
    def parameters(channels: int) -> list[int]:
        """Return how many numbers of each kind a component has."""
        return [1, channels, channels, channels * (channels - 1) // 2]

    @classmethod
    def of(cls, output: Tensor, channels: int) -> LogisticMixture:
        """Read a network's output (B, K sum(parameters), H, W)."""
        kinds = cls.parameters(channels)
        values = output.float().movedim(1, -1).unflatten(-1, (-1, sum(kinds)))  # (B, H, W, K, .)
        logits, mean, log_scale, slope = values.split(kinds, dim=-1)
        return cls(logits[..., 0], mean, (log_scale - 2).clamp(min=SHARPEST), slope.tanh())

    def _mean(self, channel: int, before: Tensor) -> Tensor:
        """Return a channel's mean (..., K) given the channels before it (..., 1 or K, channel)."""
        first = channel * (channel - 1) // 2
        slope = self.slope[..., first : first + channel]
        return self.mean[..., channel] + (slope * before).sum(-1)

    def log_prob(self, image: Tensor) -> Tensor:
        """Return the log probability (B, H, W) of pixels (B, C, H, W) on their levels, in nats."""
        x = image.movedim(1, -1)[..., None, :]  # (B, H, W, 1, C)
        mean = torch.stack([self._mean(c, x[..., :c]) for c in range(x.shape[-1])], dim=-1)
        joint = discretized_logistic(x, mean, self.log_scale).sum(-1)  # (B, H, W, K)
        return (self.logits.log_softmax(-1) + joint).logsumexp(-1)

    def sample(self, uniform: Tensor, temperature: float) -> Tensor:
        """Draw pixels (B, C, H, W) on their levels by uniform numbers (B, H, W, 1 + C).

        A logistic value, rounded to the nearest level, is the discretized distribution exactly.
        Temperature scales logits and logistics; at 0 it is the likeliest component's mean.
        """
        chosen = draw(self.logits, uniform[..., 0], temperature)[..., None, None]
        noise = temperature * torch.logit(uniform[..., 1:])
        x = uniform[..., :0]
        for c in range(self.mean.shape[-1]):
            mean = self._mean(c, x[..., None, :])[..., None].gather(-2, chosen)[..., 0]
            scale = self.log_scale[..., c : c + 1].gather(-2, chosen)[..., 0].exp()
            level = to_float(to_uint8(mean + scale * noise[..., c : c + 1]))
            x = torch.cat([x, level], dim=-1)
        return x.movedim(-1, 1)
