"""Inverting a generator: the latent, and the label, whose picture comes nearest to a given one.

A GAN maps latents to pictures and has no way back. For a picture x it is found by search,

    z*, y*  =  argmin |G(z, y) - x|^2      over labels y and latents z with  | |z| - sqrt(D) | <= 2,

as Zhu, Kraehenbuehl, Shechtman, Efros (2016), "Generative Visual Manipulation on the Natural Image
Manifold", and Creswell, Bharath (2018), "Inverting the Generator of a Generative Adversarial
Network", do. G has learned to map z ~ N(0, I), whose length is that near to sqrt(D) in all but one
draw of 200; elsewhere its pictures mean little, so a step that leaves this shell is led back to it.

The distance has many local minima. So the search begins at the nearest of many random starts, which
take the labels in turn, and goes on in rounds: some steps of Adam, keep the best, go on with fewer
and for longer. The learning rate falls to 0 along a cosine over all rounds together. The starts
come from one fixed stream: a picture's latent is the same each time, whatever pictures are beside
it, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trilemma.batch import Rng
from trilemma.networks.layers import check_shape

STARTS = 1024
ROUNDS = ((8, 30), (2, 60), (1, 200))  # candidates of each picture, steps with each
RATE = 0.1
SLACK = 2.0  # of a latent's length, either way
AT_ONCE = 128  # pictures drawn in one call

Draw = Callable[[Tensor, Tensor], Tensor]
"""Latents (N, D) and labels (N, K) to images (N, C, H, W), each from its own row alone."""


def invert(draw: Draw, image: Tensor, latent: int, classes: int = 0, attributes: int = 0) -> Tensor:
    """Find the latents and labels whose pictures come nearest to images (B, C, H, W) in [-1, 1].

    Args:
        draw: the generator.
        image: to find.
        latent: D.
        classes: that labels are one-hot rows of; each is tried, and one of them is found.
        attributes: where there are no classes, the length of the labels. They begin at random, each
            0 or 1, and then move with the latents, within [0, 1].

    Returns:
        (B, D + K) float32, latents and then labels; K is `classes`, or else `attributes`.

    Raises:
        ValueError: the images are not of the shape of those drawn.
    """
    rng = Rng([0], image.device)
    starts = _on_shell(rng.normal(STARTS, latent)[0])
    if classes:
        turns = torch.arange(STARTS, device=image.device) % classes
        starts = torch.cat([starts, F.one_hot(turns, classes)], dim=1)
    elif attributes:
        starts = torch.cat([starts, rng.uniform(STARTS, attributes)[0].round()], dim=1)
    moving = latent if classes else starts.shape[1]
    with torch.autocast(image.device.type, enabled=False):
        parts = [draw(part[:, :latent], part[:, latent:]) for part in starts.split(AT_ONCE)]
        drawn = torch.cat(parts).float()
        check_shape("pictures", image, *drawn.shape[1:])
        distance = torch.cdist(image.float().flatten(1), drawn.flatten(1))  # (B, S)
        found = starts.expand(len(image), -1, -1)
        past, total = 0, sum(steps for _, steps in ROUNDS)
        for keep, steps in ROUNDS:
            best = distance.topk(keep, dim=1, largest=False).indices  # (B, keep)
            found = found.gather(1, best[:, :, None].expand(-1, -1, starts.shape[1]))
            times = [(past + i) / total for i in range(steps)]
            rates = [RATE * (1 + math.cos(math.pi * t)) / 2 for t in times]
            past += steps
            at_once = max(1, AT_ONCE // keep)
            pairs = zip(image.split(at_once), found.split(at_once), strict=True)
            moved = [_descend(draw, x, points, latent, moving, rates) for x, points in pairs]
            found, distance = (torch.cat(each) for each in zip(*moved, strict=True))
    return found[:, 0]


def split(
    point: Tensor, latent: int, classes: int = 0, attributes: int = 0
) -> tuple[Tensor, Tensor]:
    """Return latents (B, D) and labels (B, K) of what `invert` found, or of walks and sums of it.

    Classes become shares that add up to 1, attributes are brought into [0, 1].

    Raises:
        ValueError: points of another shape than (B, D + K).
    """
    check_shape("latents", point, latent + (classes or attributes))
    label = point[:, latent:].clamp(0, 1)
    if classes:
        label = label / label.sum(1, keepdim=True).clamp(min=1e-6)
    return point[:, :latent], label


def _descend(
    draw: Draw, image: Tensor, points: Tensor, latent: int, moving: int, rates: list[float]
) -> tuple[Tensor, Tensor]:
    """Move the candidates (B, k, D + K) of images (B, ...); return them and their distances (B, k).

    A step of Adam for each rate; of a candidate its first `moving` numbers move.
    """
    shape = points.shape
    points = points.flatten(0, 1).clone()
    target = image.float().repeat_interleave(shape[1], dim=0)
    low = torch.where(target > -1, -torch.inf, -1.0)  # blacker than black is black, and no error
    high = torch.where(target < 1, torch.inf, 1.0)

    def distance() -> Tensor:
        drawn = draw(points[:, :latent], points[:, latent:]).float().clamp(low, high)
        return (drawn - target).square().flatten(1).sum(1)

    adam = torch.optim.Adam([points], betas=(0.9, 0.99))
    for rate in rates:
        adam.param_groups[0]["lr"] = rate
        points.requires_grad_()
        with torch.enable_grad():
            (points.grad,) = torch.autograd.grad(distance().sum(), points)
        points.requires_grad_(False)
        points.grad[:, moving:] = 0
        adam.step()
        points[:, :latent] = _on_shell(points[:, :latent])
        points[:, latent:].clamp_(0, 1)
    return points.view(shape), distance().view(shape[:2])


def _on_shell(latent: Tensor) -> Tensor:
    """Bring latents (N, D) to the nearest lengths at which G has learned."""
    radius = math.sqrt(latent.shape[1])
    length = latent.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return latent * (length.clamp(max(radius - SLACK, 0), radius + SLACK) / length)
