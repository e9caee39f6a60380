"""Images or a run against a reference: a dict of numbers, each with the protocol it came from."""

from __future__ import annotations

from trilemma.metrics.features import Images, extractor
from trilemma.metrics.frechet import frechet_distance, statistics


def frechet(images: Images, reference: Images) -> float:
    """Return FD-Lite0 between two sets of uint8 images (N, C, H, W)."""
    see = extractor("lite0")
    a, b = (statistics(see(each).pooled) for each in (images, reference))
    return frechet_distance(a, b)
