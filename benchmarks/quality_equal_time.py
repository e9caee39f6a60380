"""Quality after equal training time: `quick-diffusion` against the usual first diffusion model.

The other side is the class-conditioned U-Net of Hugging Face's diffusion-models-class, unit 2:
diffusers' UNet2DModel of 32-64-64 channels with attention on the lower two levels, the class as an
embedding of 4 numbers in 4 more input channels, the squared cosine schedule and noise target,
float32, Adam 1e-3, batch 128. Ours is the packaged recipe at its defaults, by `trilemma.train`.

Both sides train for the same wall-clock time on all cores, one after the other in one process, on
the same pictures; probes and setting up are not training time. Each then draws as many pictures of
every class with the same number of network calls a picture: theirs by DDIM, ours by the recipe's
solver and guidance, which takes two calls a step. EfficientNet-Lite0 compares them with the test
pictures: the Fréchet distance to all of them, recall (k = 3) and coverage (k = 5) to as many as
were drawn. Last, the sides take turns at drawing, for the speed.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/quality_equal_time.py --minutes 10
"""

import argparse
import platform
import statistics as numbers
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

import trilemma
from trilemma import data as pictures
from trilemma.batch import to_float, to_uint8
from trilemma.data import Dataset
from trilemma.drawing import grid
from trilemma.metrics.features import extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.metrics.prdc import density_coverage, precision_recall
from trilemma.sampling import Trained

ROUNDS = 3


class Judge:
    """Compares drawn pictures with the test pictures."""

    def __init__(self, test: Dataset, n: int) -> None:
        self.see = extractor("lite0", "cpu")
        pooled = self.see(test.images).pooled
        self.real = statistics(pooled)
        order = torch.randperm(len(pooled), generator=torch.Generator().manual_seed(0))
        self.some = pooled[order[:n]]

    def __call__(self, drawn: Tensor) -> dict[str, float]:
        seen = self.see(drawn).pooled
        return {
            "fd": frechet_distance(statistics(seen), self.real),
            "recall": precision_recall(self.some, seen)[1],
            "coverage": density_coverage(self.some, seen)[1],
        }


class ClassConditionedUnet(nn.Module):
    """The other side's network."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.label = nn.Embedding(classes, 4)
        self.network = UNet2DModel(
            sample_size=shape[1],
            in_channels=shape[0] + 4,
            out_channels=shape[0],
            layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        planes = self.label(label)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.network(torch.cat([x, planes], 1), time).sample


def train_theirs(train: Dataset, seconds: float) -> tuple[ClassConditionedUnet, int]:
    """Return the other side's network and how many images it has seen."""
    torch.manual_seed(0)
    net = ClassConditionedUnet(train.shape, len(train.label_names))
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    images, labels = torch.tensor(np.asarray(train.images)), torch.tensor(train.label)
    seen, start = 0, time.perf_counter()
    while True:
        for index in torch.randperm(len(images)).split(128):
            x = to_float(images[index])
            noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
            output = net(scheduler.add_noise(x, noise, t), t, labels[index])
            optimizer.zero_grad()
            F.mse_loss(output, noise).backward()
            optimizer.step()
            seen += len(x)
            if time.perf_counter() - start > seconds:
                return net.eval(), seen


@torch.inference_mode()
def draw_theirs(net: ClassConditionedUnet, train: Dataset, n: int, calls: int) -> Tensor:
    """Draw uint8 pictures with the other side's network, the classes in turn."""
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(calls)
    generator, parts = torch.Generator().manual_seed(0), []
    for label in (torch.arange(n) % len(train.label_names)).split(128):
        x = torch.randn(len(label), *train.shape, generator=generator)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t, label), t, x).prev_sample
        parts.append(to_uint8(x))
    return torch.cat(parts)


def tell(what: str, scores: dict[str, float]) -> None:
    """Print scores as soon as they are known: a run takes half an hour."""
    told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    print(f"{time.strftime('%H:%M:%S')} {what}: {told}", file=sys.stderr, flush=True)


def speeds(sides: list[Callable[[int], Tensor]], n: int) -> list[float]:
    """Return each side's images per second, the median of rounds taken in turn."""
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for side, times in zip(sides, taken, strict=True):
            start = time.perf_counter()
            side(n)
            times.append(time.perf_counter() - start)
    return [n / numbers.median(times) for times in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="training time of each side")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--n", type=int, default=2000, help="pictures each side draws")
    parser.add_argument("--calls", type=int, default=50, help="network calls for each picture")
    parser.add_argument("--probes", type=int, default=5, help="looks at ours while it trains")
    parser.add_argument("--speed-n", type=int, default=128, help="pictures of a round for speed")
    parser.add_argument("--out", type=Path, help="where sample grids are put")
    options = parser.parse_args()
    n, calls, seconds = options.n, options.calls, 60 * options.minutes

    train, test = (pictures.load(options.data, split=s) for s in ("train", "test"))
    judge = Judge(test, n)
    floor = judge(torch.tensor(np.asarray(train.images[:n])))
    tell("real pictures", floor)

    def draw(trained: Trained, n: int) -> Tensor:
        guided = trained.options({})["guidance"] != 1
        return trained.sample(n, steps=calls // 2 if guided else calls)

    trace: list[tuple[float, dict[str, float]]] = []

    def probe(trained: Trained, elapsed: float) -> dict[str, float]:
        trace.append((elapsed, judge(draw(trained, n))))
        tell(f"ours after {elapsed:.0f} s", trace[-1][1])
        return trace[-1][1]

    with tempfile.TemporaryDirectory() as folder:
        ours = trilemma.train(
            "quick-diffusion",
            train,
            out=Path(folder) / "run",
            budget=seconds,
            overrides=["train.grids=0"],
            probe=probe,
            probes=options.probes,
            quiet=True,
        )
    drawn_ours = draw(ours, n)
    final = judge(drawn_ours)
    tell(f"ours at the end, {ours.progress['seen']} images", final)

    net, seen_theirs = train_theirs(train, seconds)
    drawn_theirs = draw_theirs(net, train, n, calls)
    theirs = judge(drawn_theirs)
    tell(f"theirs at the end, {seen_theirs} images", theirs)
    rate_theirs = seen_theirs / seconds
    rate_ours = ours.progress["seen"] / ours.progress["elapsed"]
    speed_ours, speed_theirs = speeds(
        [
            lambda n: draw(ours, n),
            lambda n: draw_theirs(net, train, n, calls),
        ],
        options.speed_n,
    )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        grid(drawn_ours[:100], 10).save(options.out / "ours.png")
        grid(drawn_theirs[:100], 10).save(options.out / "theirs.png")

    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__},")
    print(f"diffusers {diffusers.__version__}; {options.data}, {options.minutes:g} minutes each,")
    print(f"{n} pictures with {calls} network calls, {len(test)} test pictures\n")
    print("| | ours | diffusers | ratio |\n|---|---|---|---|")
    rows = [
        ("training, images/s", rate_ours, rate_theirs),
        ("FD-Lite0", final["fd"], theirs["fd"]),
        ("recall", final["recall"], theirs["recall"]),
        ("coverage", final["coverage"], theirs["coverage"]),
        ("sampling, images/s", speed_ours, speed_theirs),
    ]
    for name, a, b in rows:
        ratio = f"{a / b:.2f}" if b else "-"  # after seconds of training they may recall nothing
        print(f"| {name} | {a:.3g} | {b:.3g} | {ratio} |")
    print(
        f"\nReal training pictures: FD-Lite0 {floor['fd']:.1f}, recall {floor['recall']:.2f}, ",
        end="",
    )
    print(f"coverage {floor['coverage']:.2f}.\n")
    print("| minutes of ours | FD-Lite0 | recall | coverage |\n|---|---|---|---|")
    for elapsed, scores in trace:
        row = f"{scores['fd']:.1f} | {scores['recall']:.2f} | {scores['coverage']:.2f}"
        print(f"| {elapsed / 60:.1f} | {row} |")
    reached = next((elapsed for elapsed, scores in trace if scores["fd"] <= theirs["fd"]), None)
    when = (
        "not at any probe" if reached is None else f"at the probe after {reached / 60:.1f} minutes"
    )
    print(f"\nTheir final FD-Lite0 of {theirs['fd']:.1f} was reached by ours {when}.")


if __name__ == "__main__":
    main()
