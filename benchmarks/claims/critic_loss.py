"""Does the critic's loss fall as pictures get better? Its rank correlation with FD over training.

The claim (Arjovsky et al. 2017, section 4.2; Gulrajani et al. 2017, section 5.3): a Wasserstein
critic's loss follows sample quality, an ordinary GAN's does not. Each recipe is trained by
`trilemma.train`, with probes evenly spread; at each probe FD-Lite0 of drawn pictures against the
test pictures is set beside the mean critic loss logged since the probe before. WGAN-GP's critic
minimises the negative distance, so there -loss (without the penalty) is the estimate.

    python benchmarks/claims/critic_loss.py --minutes 10 --probes 20
"""

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

import trilemma
from trilemma import data as pictures
from trilemma.metrics.features import extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.sampling import Trained


def spearman(a: list[float], b: list[float]) -> float:
    """Return the rank correlation of two sequences without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    """Train, correlate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--probes", type=int, default=20)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--data", default="fashion")
    options = parser.parse_args()
    see = extractor("lite0", "cpu")
    real = statistics(see(pictures.load(options.data, split="test").images).pooled)

    def probe(trained: Trained, elapsed: float) -> dict[str, float]:
        drawn = see(trained.sample(options.n), pooled_only=True).pooled
        return {"fd": frechet_distance(statistics(drawn), real)}

    print("| recipe | probes | FD first -> last | Spearman of critic loss and FD |")
    print("|---|---|---|---|")
    for name in ("wgan-gp", "dcgan"):
        out = Path(tempfile.mkdtemp()) / name
        length = {"budget": 60 * options.minutes, "probes": options.probes}
        changes = ["train.log_every=5", "train.grids=0", "train.watches=0"]
        trilemma.train(
            name, options.data, out=out, overrides=changes, probe=probe, quiet=True, **length
        )
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        at = [i for i, line in enumerate(lines) if "probe" in line]
        distances, losses = [], []
        for before, here in pairwise([-1, *at]):
            heard = [line for line in lines[before + 1 : here] if "critic/loss" in line]
            if name == "wgan-gp":
                estimates = [line["critic/real"] - line["critic/fake"] for line in heard]
            else:
                estimates = [line["critic/loss"] for line in heard]
            if estimates:
                losses.append(float(np.mean(estimates)))
                distances.append(lines[here]["probe"]["fd"])
        told = f"{len(losses)} | {distances[0]:.0f} -> {distances[-1]:.0f}"
        print(f"| {name} | {told} | {spearman(losses, distances):.2f} |", flush=True)


if __name__ == "__main__":
    main()
