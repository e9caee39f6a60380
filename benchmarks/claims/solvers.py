"""Claim 7: with the right solver 10 to 20 network calls draw as well as 1,000 steps of DDPM.

Song, Meng, Ermon (2021), "Denoising Diffusion Implicit Models", table 1: DDIM needs 10 to 50 steps
where DDPM needs 1,000. Lu et al. (2022), "DPM-Solver++", and Zhao et al. (2023), "UniPC": 10 to 20
calls of the network suffice. Which solver is best at a number of calls depends on its grid as well,
so each has its own.

One trained model draws the same seeds with every solver at every number of calls, and
EfficientNet-Lite0 compares the pictures with all test pictures (Fréchet distance). A solver that
takes several calls a step has as many steps as fit. Without guidance, unless a scale is given.

    python benchmarks/claims/solvers.py --run runs/claims/triangle/quick-diffusion
"""

import common

import trilemma
from trilemma import data as pictures
from trilemma.diffusion.solvers import SOLVERS


def steps_of(name: str, calls: int) -> int:
    """Return how many steps a solver takes with at most so many calls; 0 where not one fits."""
    return max((calls - SOLVERS[name].extra) // SOLVERS[name].calls, 0)


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument("--run", required=True, help="of a diffusion model")
    parser.add_argument("--data", default="fashion-mnist", help="what it was trained on")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--long", type=int, default=1000, help="calls of ddpm beside them; 0: none")
    parser.add_argument("--solvers", nargs="*", default=list(SOLVERS))
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--n", type=int, default=1000, help="pictures of each")
    given = parser.parse_args()
    trained = trilemma.load(given.run)
    side = trained.data["shape"][1]
    test = pictures.load(given.data, split="test", size=side)
    distance = common.Distance(test)
    found: dict[tuple[str, int], float] = {}
    for name in given.solvers:
        for calls in [*given.calls, *[given.long] * (name == "ddpm" and given.long > 0)]:
            steps = steps_of(name, calls)
            if not steps:
                continue
            drawn = trained.sample(given.n, solver=name, steps=steps, guidance=given.guidance)
            found[name, calls] = distance(drawn)
            common.tell(f"{name}, {calls} calls, {steps} steps", fd=found[name, calls])
    columns = sorted({calls for _, calls in found})
    real = pictures.load(given.data, split="train", size=side).images[: given.n]
    common.publish(
        f"{trained.name} after {trained.progress['seen']:,} images, guidance {given.guidance:g}, "
        f"seeds 0 to {given.n - 1}; FD-Lite0 to {len(test):,} test pictures, {given.n} real "
        f"training pictures score {distance(real):.0f}.",
        ("solver", *(f"{calls} calls" for calls in columns)),
        [
            (name, *(f"{found[at]:.0f}" if (at := (name, c)) in found else "-" for c in columns))
            for name in given.solvers
        ],
    )


if __name__ == "__main__":
    main()
