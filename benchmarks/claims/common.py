"""What the scripts of this folder share: options, progress, resumable training, the table.

A script prints its table with its protocol on standard output and saves one picture; what is known
while it runs goes to standard error. Trained runs are kept under `runs/claims`: a script that was
stopped goes on where it was, and one that has come to its end only measures again; those that keep
what they measured there, too (`Kept`), measure again when `runs/claims/CLAIM/found.json` is gone.

Time is processor time, which other work on the machine does not spend: run with one thread
(OMP_NUM_THREADS=1), for the time of several adds up.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import trilemma
from trilemma import checkpoint, device
from trilemma.batch import Condition
from trilemma.data import Dataset, batches
from trilemma.drawing import grid
from trilemma.metrics.features import extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.metrics.prdc import density_coverage, precision_recall
from trilemma.metrics.reference import of_dataset
from trilemma.profile import flops
from trilemma.sampling import Trained

matplotlib.use("Agg")

RUNS = Path("runs/claims")


def options(doc: str) -> argparse.ArgumentParser:
    """Return the options of every script, to which it adds its own."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("docs/claims"), help="where the picture is put"
    )
    return parser


def parse(
    parser: argparse.ArgumentParser, tiny: Mapping[str, Any], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read the options; with `--tiny`, `tiny` takes the place of the defaults."""
    parser.add_argument(
        "--tiny", action="store_true", help="next to nothing of all, to see that the script runs"
    )
    parser.add_argument("--features", default="lite0", help="of the distance")
    parser.add_argument("--reference", type=int, default=10_000, help="test pictures at most")
    if parser.parse_known_args(argv)[0].tiny:
        parser.set_defaults(features="pixels", reference=16, **tiny)
    return parser.parse_args(argv)


Probe = Callable[[Trained, float], dict[str, float]]


def train(
    recipe: str, data: Dataset | Path, claim: str, name: str, *, probe: Probe | None = None,
    **more: Any,
) -> Trained:  # fmt: skip
    """Train a recipe into `runs/claims`, or go on with it; `more` as `trilemma.train` takes it.

    Beside what a probe measures stands `processor`: seconds of training up to there.
    """
    length = f"{more['images']}" if "images" in more else f"{more['budget']:g}s"
    out = RUNS / claim / f"{name}-{length}"
    trained = trilemma.train(
        recipe,
        data,
        out=out,
        resume=(out / "training").exists(),
        quiet=True,
        probe=None if probe is None else _timed(probe, out),
        **more,
    )
    tell(f"{name} trained", **trained.progress)
    return trained


def _timed(probe: Probe, out: Path) -> Probe:
    """Measure the processor time between probes, that of probes left out.

    Where a run is gone on with, the pictures since the last probe that an earlier process has
    trained on are taken to have cost as much each as those of this one.
    """
    spent, last, began = 0.0, 0, 0
    if (out / "training").exists():
        began = checkpoint.read_model(out)[1]["progress"]["seen"]
        for line in lines(out):
            if "probe" in line and line["seen"] <= began:
                spent, last = line["probe"].get("processor", 0.0), line["seen"]
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer imports a compiler, for seconds
    mark = time.process_time()

    def timed(trained: Trained, elapsed: float) -> dict[str, float]:
        nonlocal spent, last, began, mark
        seen = trained.progress["seen"]
        spent += (time.process_time() - mark) * (seen - last) / max(seen - began, 1)
        found = {**probe(trained, elapsed), "processor": spent}
        last = began = seen
        mark = time.process_time()
        return found

    return timed


def probes(trained: Trained) -> list[dict[str, float]]:
    """Return what was measured at each probe of a run, with `seen`."""
    return [{"seen": line["seen"], **line["probe"]} for line in log(trained) if "probe" in line]


class Distance:
    """What pictures (N, C, H, W), uint8, score beside the test pictures of a data set.

    Args:
        test: the test pictures.
        features: what sees them.
        limit: test pictures at most.
    """

    def __init__(self, test: Dataset, features: str = "lite0", limit: int = 10_000) -> None:
        self.see = extractor(features)
        self.real = of_dataset(test, self.see, limit=limit, pooled_only=True)

    def __call__(self, images: np.ndarray | torch.Tensor) -> float:
        """Return the Fréchet distance: FD-Lite0 with the features of that name."""
        seen = self.see(images, pooled_only=True).pooled
        return frechet_distance(statistics(seen), self.real.statistics)

    def scores(self, images: np.ndarray | torch.Tensor) -> dict[str, float]:
        """Return `fd` to all test pictures; `precision`, `recall` (k = 3) and `coverage` (k = 5)
        to as many of them as are given.
        """
        seen, real = self.see(images, pooled_only=True).pooled, self.real.pooled
        assert real is not None
        some = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
        some = some[: len(seen)]
        precision, recall = precision_recall(some, seen)
        return {
            "fd": frechet_distance(statistics(seen), self.real.statistics),
            "precision": precision,
            "recall": recall,
            "coverage": density_coverage(some, seen)[1],
        }

    def probe(self, n: int, **options: Any) -> Probe:
        """Return what scores n pictures of a model while it trains; options of `sample`."""

        def probe(trained: Trained, elapsed: float) -> dict[str, float]:
            found = self.scores(trained.sample(n, **options))
            tell(f"{trained.name}, {trained.progress['seen']:,} images", **found)
            return found

        return probe


class Kept:
    """What a script has measured, kept in `runs/claims/CLAIM`, so that it can go on.

    What was found with other options, or of runs that have changed since, is thrown away.

    Args:
        claim: the claim's name.
        given: the script's options; `out` changes nothing of what is found.
    """

    def __init__(self, claim: str, given: argparse.Namespace) -> None:
        self.folder = RUNS / claim
        self.folder.mkdir(parents=True, exist_ok=True)
        asked = {key: value for key, value in vars(given).items() if key != "out"}
        self.asked = json.loads(json.dumps(asked, default=str))
        file = self.folder / "found.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        self.of = {"asked": self.asked, "weights": weights(given)}
        same = all(before.get(key) == value for key, value in self.of.items())
        self.found: dict[str, Any] = before["found"] if same else {}

    def __call__(self, part: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return what `measure` finds, or has found."""
        if part not in self.found:
            self.found[part] = measure()
            tell(part, **self.found[part])
            whole = json.dumps({**self.of, "found": self.found}, indent=1)
            checkpoint.write_text(self.folder / "found.json", whole)
        return self.found[part]

    def draw(
        self,
        part: str,
        draw: Callable[[], torch.Tensor],
        score: Callable[[torch.Tensor], dict[str, float]],
        shown: int = 10,
    ) -> dict[str, float]:
        """Return what pictures score, which are drawn if need be; the first are kept."""

        def measure() -> dict[str, float]:
            start = time.process_time()
            images = draw()
            seconds = time.process_time() - start
            np.save(self.folder / f"{part}.npy", images[:shown].numpy())
            return {**score(images), "drawing": seconds}

        return self(part, measure)

    def pictures(self, part: str) -> torch.Tensor:
        """Return the first pictures of a part."""
        return torch.from_numpy(np.load(self.folder / f"{part}.npy"))

    def save(self, out: Path, figure: Figure) -> None:
        """Write what was found and the figure into `out`."""
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / f"{self.folder.name}.png", dpi=100)
        whole = {"options": self.asked, "found": self.found}
        (out / f"{self.folder.name}.json").write_text(json.dumps(whole, indent=1) + "\n")


def weights(given: argparse.Namespace) -> dict[str, str]:
    """Return a digest of the weights of each run that the options name."""
    found = {}
    for key, value in vars(given).items():
        file = checkpoint.model_file(str(value))
        if file.suffix == ".safetensors" and file.is_file():
            found[key] = checkpoint.digest(checkpoint.read_model(file)[0])
    return found


class Side(NamedTuple):
    """One of those that are compared: a recipe with changes."""

    recipe: str
    changes: Sequence[str] = ()
    seed: int = 0


def learn(
    claim: str,
    sides: Mapping[str, Side],
    data: Dataset,
    probe: Probe,
    given: argparse.Namespace,
) -> dict[str, Trained]:
    """Train each side on as many images, probed at the same of them; by name."""
    trained = {}
    for name, side in sides.items():
        trained[name] = train(
            side.recipe,
            data,
            claim,
            name.replace(",", "").replace(" ", "-"),
            seed=side.seed,
            images=given.images,
            probe=probe,
            probes=given.probes,
            overrides=["train.grids=0", "train.watches=0", *side.changes],
        )
    return trained


def step_times(trained: Mapping[str, Trained], data: Dataset, rounds: int) -> dict[str, float]:
    """Return each model's processor milliseconds an image forth and back, the median of turns."""
    batch = next(batches(data, 32, seed=0))
    models = {}
    for name, one in trained.items():
        models[name] = copy.deepcopy(one.model).requires_grad_(True).train()
    where = torch.device("cpu")
    dtype = device.dtype("auto", where)
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):  # the first warms up
        for name, model in models.items():
            (phase,) = model.phases()
            start = time.process_time()
            with device.autocast(dtype, where):
                loss = phase.loss(batch)["loss"]
            loss.backward()
            taken[name].append(time.process_time() - start)
    return {name: 1000 * np.median(times[1:]) / len(batch) for name, times in taken.items()}


def operations(trained: Trained) -> float:
    """Return the FLOPs of one picture of a class through the network of a diffusion model."""
    x, model = torch.zeros(1, *trained.data["shape"]), trained.model
    with torch.no_grad():
        embedded = model.conditioner(Condition(1, torch.zeros(1, dtype=torch.int64)))
        return flops(lambda: model.network(x, torch.full((1,), 0.5), embedded))


def parameters(trained: Trained) -> int:
    """Return the number of parameters of the network of a diffusion model."""
    return sum(p.numel() for p in trained.model.network.parameters())


def curves(axes: Axes, trained: Mapping[str, Trained], over: str, label: str) -> None:
    """Draw the distance at each probe over `seen` or `processor`."""
    for name, one in trained.items():
        found = probes(one)
        axes.plot([f[over] for f in found], [f["fd"] for f in found], "o-", label=name, ms=3)
    axes.set(xlabel=label, ylabel="FD-Lite0", yscale="log")


def board(strips: int) -> tuple[Figure, list[Axes], list[Axes]]:
    """Return a figure, two plots side by side in it, and places for strips of pictures below."""
    figure = pyplot.figure(figsize=(12, 5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, 1))
    plots, places = above.subplots(1, 2), below.subplots(1, strips, squeeze=False)
    return figure, list(plots), list(places[0])


def show(axes: Axes, images: torch.Tensor, title: str, columns: int = 10) -> None:
    """Lay pictures (N, C, H, W) out on axes."""
    axes.imshow(np.asarray(grid(images, columns)), cmap="gray", vmin=0, vmax=255)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def log(trained: Trained) -> list[dict[str, Any]]:
    """Return the lines of a run's log, also of what was trained before it was gone on with."""
    assert trained.path is not None
    return lines(trained.path)


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the log in a run folder."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def tell(what: str, **numbers: float) -> None:
    """Write numbers to standard error as soon as they are known."""
    told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    print(f"{time.strftime('%H:%M:%S')} {what}: {told}", file=sys.stderr, flush=True)


def publish(protocol: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a markdown table under its protocol and the machine."""
    where = device.name(device.pick())
    print(f"{protocol} {where}, {torch.get_num_threads()} threads, torch {torch.__version__}.\n")
    for cells in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(cells)} |")
