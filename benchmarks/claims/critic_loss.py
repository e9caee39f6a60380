"""Claim 2: WGAN-GP's critic tells how good the pictures are, an ordinary GAN's does not.

Arjovsky, Chintala, Bottou (2017), "Wasserstein GAN", section 4.2 and figures 3 and 4; Gulrajani et
al. (2017), "Improved Training of Wasserstein GANs", on meaningful loss curves. A critic's loss
estimates a distance between real and drawn pictures:

    WGAN-GP          W  = E D(x) - E D(G(z))             the loss without its penalty, less its sign
    non-saturating   JS = log 2 - loss / 2               figure 4's estimate

Each recipe is trained with probes evenly spread; at each, FD-Lite0 of drawn pictures against the
test pictures is set beside the mean estimate logged since the probe before. An estimate that tells
quality falls as FD does: its rank correlation with FD (Spearman) is near 1. Both fall at first
whatever happens, so the correlation is shown for the last two thirds of the probes, too.

The non-saturating side is `dcgan` without what would move its loss by itself: smoothed and flipped
labels, and the noise that fades.

    python benchmarks/claims/critic_loss.py
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import common
import numpy as np
from matplotlib import pyplot

from trilemma import data as pictures

Line = dict[str, Any]
SMALL = [  # both sides: networks for minutes on a CPU
    "train.batch=64", "train.optimizer.lr=2e-4", "train.log_every=5", "train.grids=0",
    "train.watches=0", "model.generator.channels=32", "model.critic.channels=32",
]  # fmt: skip
SIDES: dict[str, tuple[str, list[str], Callable[[Line], float]]] = {
    "WGAN-GP": (
        "wgan-gp",
        ["model.share=1", "train.optimizer.betas=[0.0,0.9]"],  # the paper's
        lambda line: line["critic/real"] - line["critic/fake"],
    ),
    "non-saturating": (
        "dcgan",
        ["model.smooth=0", "model.flip=0", "model.noise=0", "model.augment=off"],
        lambda line: math.log(2) - line["critic/loss"] / 2,
    ),
}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation of two sequences without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def trace(lines: list[Line], estimate: Callable[[Line], float]) -> np.ndarray:
    """Return images, mean estimate since the probe before, and FD of each probe: (3, P)."""
    at = [i for i, line in enumerate(lines) if "probe" in line]
    found = []
    for before, here in pairwise([-1, *at]):
        heard = [estimate(line) for line in lines[before + 1 : here] if "critic/loss" in line]
        if heard:
            found.append((lines[here]["seen"], np.mean(heard), lines[here]["probe"]["fd"]))
    return np.array(found).T


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument("--images", type=int, default=60_000, help="training of each side")
    parser.add_argument("--data", default="fashion")
    parser.add_argument("--probes", type=int, default=12)
    parser.add_argument("--n", type=int, default=1000, help="pictures drawn at a probe")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train, test = (pictures.load(given.data, split=s, multiple=4) for s in ("train", "test"))
    probe = common.Distance(test).probe(given.n)

    rows = []
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for left, (side, (recipe, changes, estimate)) in zip(axes, SIDES.items(), strict=True):
        trained = common.train(
            recipe, train, "critic_loss", f"{recipe}-seed{given.seed}", seed=given.seed,
            images=given.images, overrides=[*SMALL, *changes], probe=probe, probes=given.probes,
        )  # fmt: skip
        images, estimates, distances = trace(common.log(trained), estimate)
        later = slice(len(images) // 3, None)
        correlation = spearman(estimates, distances)
        afterwards = spearman(estimates[later], distances[later])
        common.tell(side, spearman=correlation, later=afterwards)
        rows.append(
            (
                side,
                f"{distances[0]:.0f} to {distances[-1]:.0f}",
                f"{estimates[0]:.3g} to {estimates[-1]:.3g}",
                f"{correlation:.2f} ({len(images)})",
                f"{afterwards:.2f} ({len(images[later])})",
            )
        )
        left.plot(images, distances, "C0o-")
        left.set(title=side, xlabel="images trained on", yscale="log")
        left.set_ylabel("FD-Lite0", color="C0")
        right = left.twinx()
        right.plot(images, estimates, "C1s-")
        right.set_ylabel("critic's estimate", color="C1")
    given.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out / "critic_loss.png", dpi=150)
    common.publish(
        f"{given.data} at {train.shape[1]} pixels, {given.images:,} images a side, seed "
        f"{given.seed}; {given.n} drawn and {len(test)} test pictures at a probe.",
        ("side", "FD-Lite0", "estimate", "Spearman (probes)", "last two thirds"),
        rows,
    )


if __name__ == "__main__":
    main()
