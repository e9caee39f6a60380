"""How well pictures are found by texts, texts by pictures, and classes by their names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def recalls(similarity: Tensor, right: Tensor, at: Sequence[int] = (1, 5, 10)) -> list[float]:
    """Return, for each k of `at`, the share of queries with a right answer among the k nearest.

    Of queries that are equally near to several answers the first counts as nearest. Where there are
    fewer than k answers, all are among the k.

    Args:
        similarity: of queries and answers, (Q, A).
        right: (Q, A), True where the answer is right; queries without any are left out.
        at: the numbers of answers looked at.
    """
    asked = right.any(1)
    if not asked.any():
        raise ValueError("no query has a right answer")
    nearest = similarity[asked].argsort(stable=True, dim=1, descending=True)[:, : max(at)]
    found = right[asked].gather(1, nearest)
    return [float(found[:, :k].any(1).float().mean()) for k in at]


def accuracy(similarity: Tensor, label: Tensor) -> float:
    """Return the share of pictures whose class's name is the nearest of all.

    Args:
        similarity: of pictures and classes, (N, K).
        label: (N,) the right class.
    """
    return float((similarity.argmax(1) == label).float().mean())


def class_vectors(prompts: Tensor) -> Tensor:
    """Return a unit vector (K, D) for each class: the mean of its prompts' (K, P, D), normalised.

    Radford et al. 2021, section 3.1.4, "prompt ensembling".
    """
    return torch.nn.functional.normalize(prompts.mean(1), dim=1)
