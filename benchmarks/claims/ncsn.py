"""Claim 13: after equal training DDPM draws better than NCSN with annealed Langevin dynamics.

Song, Ermon (2019), "Generative Modeling by Estimating Gradients of the Data Distribution", table 1:
NCSN has an FID of 25.3 on CIFAR-10; Ho, Jain, Abbeel (2020), "Denoising Diffusion Probabilistic
Models", table 1: 3.17. Both learn the noise on pictures at many levels. DDPM differs in what it
adds noise to, the picture shrinking as the noise grows, and in its sampler, which follows from its
training where Langevin moves must come to rest at each level.

The recipe `ncsn` against `quick-diffusion` made a DDPM: linear betas in 1,000 steps and the noise
target. Same network, optimizer, batch and number of images, so the same training time, which is
told as processor time; other work may run beside it. Each draws by its own sampler at its own
number of network calls: annealed Langevin dynamics, 5 moves at 50 levels, and the 1,000 steps of
DDPM. To tell training from sampling, DDPM with as many calls as Langevin and both by DDIM in 20.

    OMP_NUM_THREADS=1 python benchmarks/claims/ncsn.py

Refuted if NCSN by Langevin dynamics has the smaller distance.
"""

from collections.abc import Sequence

import common
from common import Side
from matplotlib import pyplot

from trilemma import data as pictures

TINY = {"images": 64, "n": 8, "levels": 2, "long": 3}
SIDES = {
    "NCSN": Side("ncsn"),
    "DDPM": Side(
        "quick-diffusion",
        [
            'model.schedule={type="diffusion.schedules.Linear"}',
            'model.times={type="diffusion.times.Uniform", steps=1000}',
            "model.target=noise",
        ],
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.options(__doc__)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=30_000, help="training of each side")
    parser.add_argument("--levels", type=int, default=50, help="of Langevin, 5 calls each")
    parser.add_argument("--long", type=int, default=1000, help="steps of DDPM")
    parser.add_argument("--n", type=int, default=500, help="pictures drawn by each way")
    given = common.parse(parser, {**TINY, "probes": 1}, argv)
    given.probes = 1
    train, test = (pictures.load(given.data, split=s, multiple=4) for s in ("train", "test"))
    distance = common.Distance(test, given.features, given.reference)
    kept = common.Kept("ncsn", given)

    trained = common.learn("ncsn", SIDES, train, lambda trained, elapsed: {}, given)
    seconds = {name: common.probes(one)[-1]["processor"] for name, one in trained.items()}
    kept.found["processor"] = seconds
    calls = 5 * given.levels
    ways = [
        ("NCSN", "langevin", given.levels, calls, {"grid": "even_time"}),
        ("NCSN", "ddim", 20, 20, {"grid": "even_time"}),
        ("DDPM", "ddpm", given.long, given.long, {}),
        ("DDPM", "ddpm", calls, calls, {}),
        ("DDPM", "ddim", 20, 20, {}),
    ]
    rows, shown = [], []
    for name, solver, steps, calls, options in ways:
        part = f"{name} by {solver}, {calls} calls"
        scores = kept.draw(
            part,
            lambda name=name, solver=solver, steps=steps, options=options: trained[name].sample(
                given.n, solver=solver, steps=steps, guidance=1.0, **options
            ),
            distance.scores,
            shown=20,
        )
        shown.append(part)
        rows.append(
            (
                name,
                f"{seconds[name]:.0f}",
                solver,
                f"{calls:,}",
                f"{scores['fd']:.0f}",
                *(f"{scores[s]:.2f}" for s in ("precision", "recall", "coverage")),
                f"{given.n / scores['drawing']:.3g}",
            )
        )
    real = kept("real", lambda: distance.scores(train.images[: given.n]))
    scored = (f"{real[s]:.2f}" for s in ("precision", "recall", "coverage"))
    rows.append(("real training pictures", "", "", "", f"{real['fd']:.0f}", *scored, ""))

    figure, axes = pyplot.subplots(len(shown), 1, figsize=(6, 1.6 * len(shown)))
    for left, part in zip(axes, shown, strict=True):
        common.show(left, kept.pictures(part), part)
    figure.tight_layout()
    kept.save(given.out, figure)
    common.publish(
        f"{given.data} at {train.shape[1]} pixels, {given.images:,} images of training each, seed "
        f"0; {given.n} pictures drawn without guidance, {len(test):,} test pictures.",
        (
            "model",
            "processor seconds of training",
            "sampler",
            "calls",
            "FD-Lite0",
            "precision",
            "recall",
            "coverage",
            "pictures/s of processor time",
        ),
        rows,
    )


if __name__ == "__main__":
    main()
