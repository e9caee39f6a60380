"""The Inception score, from any classifier's logits.

Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen 2016, "Improved Techniques for Training GANs",
section 4:

    exp( E_x KL( p(y|x) || p(y) ) )

High when each image is surely of some class and all classes appear: at best the number of classes.
It sees no training data, so it cannot tell that pictures look unlike them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inception_score(logits: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """Return mean and standard deviation over `splits` parts of logits (N, K), in their order."""
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} samples cannot be cut into {splits} parts")
    scores = []
    for part in logits.double().tensor_split(splits):
        log_p = part.log_softmax(1)  # (n, K)
        log_marginal = log_p.exp().mean(0).log()
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    values = torch.stack(scores)
    return values.mean().item(), values.std(correction=0).item()
