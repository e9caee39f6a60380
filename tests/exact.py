"""A diffusion model and a classifier of a mixture of Gaussians, both exact."""

from __future__ import annotations

import torch
from torch import nn

from trilemma.codecs import Pixels
from trilemma.conditioning import Conditioner
from trilemma.diffusion.schedules import Straight
from trilemma.models.classifier import Classifier
from trilemma.models.diffusion import Diffusion
from trilemma.networks.layers import Embedded

SHAPE = (1, 1, 2)
MEANS = torch.tensor([[0.4, 0.1], [-0.3, 0.3], [0.0, -0.4]])  # of three classes, equally frequent
STD = 0.15


class Told(Conditioner):
    """Labels as they are: (B, 3) of 0 and 1, all 0 for nothing."""

    guidable = True

    def forward(self, condition, rng=None, image=None):
        label = condition.label
        if label is None:
            return Embedded(vector=torch.zeros(condition.count, 3))
        return Embedded(vector=torch.eye(3)[label])

    def nothing(self, condition):
        return Embedded(vector=torch.zeros(condition.count, 3))


class Mean(nn.Module):
    """The expected picture, as a network with the target `image`."""

    def __init__(self, schedule, std):
        super().__init__()
        self.schedule, self.std, self.calls = schedule, std, 0

    def forward(self, x, time, embedded):
        self.calls += 1
        alpha, sigma = (v[:, None] for v in self.schedule(time))
        x = x.flatten(1) * (alpha**2 + sigma**2).sqrt()  # the model scaled it
        log = logits(x, alpha, sigma, self.std)
        known = embedded.vector
        log = log.masked_fill((known == 0) & (known.sum(1, keepdim=True) > 0), -torch.inf)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        means = MEANS + gain[:, :, None] * (x[:, None] - alpha[:, :, None] * MEANS)  # (B, 3, 2)
        return (log.softmax(1)[:, :, None] * means).sum(1).view(-1, *SHAPE)


class Logits(nn.Module):
    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x, time):
        alpha, sigma = (v[:, None] for v in self.schedule(time))
        return logits(x.flatten(1) * (alpha**2 + sigma**2).sqrt(), alpha, sigma, STD)


def logits(x, alpha, sigma, std):
    """Log density of x_t (B, 2) under each class, but for a constant: (B, 3)."""
    distance = (x[:, None] - alpha[:, :, None] * MEANS).square().sum(2)
    return -distance / (2 * (alpha**2 * std**2 + sigma**2))


def model(schedule=None, std=STD):
    schedule = schedule or Straight()
    return Diffusion(Pixels(SHAPE), Mean(schedule, std), Told(), schedule, target="image").eval()


def classifier(schedule):
    return Classifier(Pixels(SHAPE), Logits(schedule), 3, schedule).eval()
