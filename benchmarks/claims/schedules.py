"""Claim 11: schedule and target decide how fast a network learns; one step draws only the mean.

Which learns fastest: Nichol, Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models",
section 3.2, put the cosine schedule before the linear one; Salimans, Ho (2022), "Progressive
Distillation", table 1, find noise, image and velocity much alike in many steps; Karras et al.
(2022), "Elucidating the Design Space of Diffusion-Based Generative Models", table 2, and Esser et
al. (2024), "Scaling Rectified Flow Transformers", table 1, put preconditioned targets on log-normal
and straight ones on logit-normal times first. The same network, optimizer and batch learn each on
Fashion-MNIST; the averaged weights are probed at the same numbers of images, by Euler's method on
one grid that means the same noise on every schedule. A step costs the same for all, so by the image
is by the minute; processor time of one thread is told all the same.

Why not in a single step: the best guess of x_0 by squared error is its mean given x_t (Vincent
2011, "A Connection Between Score Matching and Denoising Autoencoders"), and of noise alone that is
the mean of all pictures, of a class when it is told. So one call should draw the mean picture of
each class, the same for every noise; what makes kinds and edges are the calls in between, which
decide little by little. A trained run draws in 1, 2, 5, 10 and 50 calls: FD-Lite0, coverage;
sharpness, the variance of the Laplacian of the grey picture in [0, 1]; the root mean squared
difference from the mean training picture of its class; and how far pictures of a class are apart
(the deviation of a pixel within it), in grey levels.

    python benchmarks/claims/schedules.py --run runs/claims/triangle/quick-diffusion

Refuted if linear betas with the noise target are not behind the best at the end, or if none of
the best three is straight or preconditioned; of the single step, if its pictures are nearer to
those of 50 calls than to the mean of their class in how far they are apart, or in distance.
"""

from collections.abc import Sequence

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import Side
from matplotlib import pyplot
from torch import Tensor

import trilemma
from trilemma import data as pictures
from trilemma.data import Dataset

TINY = {"images": 64, "probes": 2, "n": 8, "steps": 2, "calls": [1, 3]}


def side(schedule: str, target: str, times: str, *more: str) -> Side:
    """Return `quick-diffusion` with another schedule, target and times."""
    parts = [f'model.schedule={{type="diffusion.schedules.{schedule}}}', f"model.target={target}"]
    times = f'model.times={{type="diffusion.times.{times}}}'
    return Side("quick-diffusion", [*parts, times, "train.schedule=constant", *more])


STEPS = 'Uniform", steps=1000'
SIDES = {
    "linear, noise": side('Linear"', "noise", STEPS),
    "linear, velocity": side('Linear"', "velocity", STEPS),
    "cosine, noise": side('Cosine"', "noise", STEPS),
    "cosine, image": side('Cosine"', "image", STEPS),
    "cosine, velocity": side('Cosine"', "velocity", STEPS),
    "straight": side('Straight"', "straight", 'Uniform"'),
    "straight, logit-normal": side('Straight"', "straight", 'LogitNormal"'),
    "VE, noise": side('VarianceExploding", smallest=0.01, largest="@size"', "noise", 'Uniform"'),
    "VE, preconditioned": side(
        'VarianceExploding", smallest=0.002, largest=80.0', "preconditioned",
        'LogNormal", mean=-1.2, std=1.2', "model.data_std=0.5",
    ),
}  # fmt: skip


def means(data: Dataset) -> Tensor:
    """Return the mean picture of each class (K, C, H, W), in grey levels."""
    assert data.label is not None
    images = torch.from_numpy(np.array(data.images)).float()
    label = torch.from_numpy(data.label)
    return torch.stack([images[label == k].mean(0) for k in range(len(data.label_names))])


def blur(images: Tensor, label: Tensor, mean: Tensor) -> dict[str, float]:
    """Return `sharpness`, `from_mean` and `apart` of uint8 images (N, C, H, W) of classes (N,)."""
    x = images.float()
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    edges = F.conv2d(x.mean(1, keepdim=True) / 255, kernel)
    within = [x[label == k].var(0).mean() for k in label.unique()]
    return {
        "sharpness": edges.flatten(1).var(1).mean().item(),
        "from_mean": (x - mean[label]).square().mean().sqrt().item(),
        "apart": torch.stack(within).mean().sqrt().item(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.options(__doc__)
    parser.add_argument("--run", required=True, help="of diffusion by class, to draw in few calls")
    parser.add_argument("--data", default="fashion-mnist", help="what it was trained on")
    parser.add_argument("--images", type=int, default=15_000, help="training of each combination")
    parser.add_argument("--probes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="of Euler's method, at a probe")
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 5, 10, 50])
    parser.add_argument("--n", type=int, default=1000, help="pictures drawn each time")
    given = common.parse(parser, TINY, argv)
    train, test = (pictures.load(given.data, split=s, multiple=4) for s in ("train", "test"))
    distance = common.Distance(test, given.features, given.reference)
    kept = common.Kept("schedules", given)

    mean = means(train)
    one = trilemma.load(given.run)
    label = torch.arange(given.n) % len(mean)
    for calls in given.calls:
        kept.draw(
            f"{calls} calls",
            lambda calls=calls: one.sample(given.n, solver="euler", steps=calls, guidance=1.0),
            lambda images: {**distance.scores(images), **blur(images, label, mean)},
            shown=20,
        )
    each = given.n // len(mean)
    rows = np.concatenate([np.flatnonzero(test.label == k)[:each] for k in range(len(mean))])
    real = torch.from_numpy(np.array(test.images[rows]))
    real_label = torch.from_numpy(test.label[rows])
    kept("real", lambda: blur(real, real_label, mean))

    probe = distance.probe(given.n, solver="euler", steps=given.steps, guidance=1.0)
    trained = common.learn("schedules", SIDES, train, probe, given)
    found = {name: common.probes(run) for name, run in trained.items()}
    kept.found["probes"] = found

    figure = pyplot.figure(figsize=(11, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.subplots()
    common.curves(axes, trained, "seen", "images trained on")
    axes.legend(fontsize=8)
    places = right.subplots(len(given.calls) + 1, 1)
    common.show(places[0], mean.round().byte(), "mean training picture of each class")
    for place, calls in zip(places[1:], given.calls, strict=True):
        few = kept.pictures(f"{calls} calls")
        common.show(place, few, f"{calls} call{'s' * (calls > 1)}, two noises")
    kept.save(given.out, figure)

    protocol = f"{given.data} at {train.shape[1]} pixels, {given.n} pictures drawn each time by "
    protocol += f"Euler's method without guidance, {len(test):,} test pictures."
    common.publish(
        f"{protocol} {given.images:,} images of training each, seed 0, constant rate; probes in "
        f"{given.steps} steps.",
        (
            "schedule, target",
            *(f"FD-Lite0 at {p['seen']:,} images" for p in found["straight"]),
            "coverage",
            "processor seconds",
        ),
        [
            (
                name,
                *(f"{p['fd']:.0f}" for p in probes),
                f"{probes[-1]['coverage']:.2f}",
                f"{probes[-1]['processor']:.0f}",
            )
            for name, probes in sorted(found.items(), key=lambda item: item[1][-1]["fd"])
        ],
    )
    print()
    common.publish(
        f"{protocol} {one.name} after {one.progress['seen']:,} images, in few calls.",
        ("calls", "FD-Lite0", "coverage", "sharpness", "from the class's mean", "apart in a class"),
        [
            (
                way.removesuffix(" calls"),
                *(f"{scores[s]:{form}}" if s in scores else "-" for s, form in FORMS.items()),
            )
            for way in [*(f"{calls} calls" for calls in given.calls), "real"]
            for scores in [kept.found[way]]
        ],
    )


FORMS = {"fd": ".0f", "coverage": ".2f", "sharpness": ".3f", "from_mean": ".1f", "apart": ".1f"}


if __name__ == "__main__":
    main()
