"""Fine-tuning: what a trained model is worth when there are few pictures of the new kind.

Wang et al. (2018), "Transferring GANs: generating images from limited data", section 4: with few
pictures a network that has seen others learns faster and draws better than one that begins anew.
Hu et al. (2022), "LoRA", section 4: low-rank factors learn as well as all weights, and are few.

A model is trained on the kinds 0 to 7 of Fashion-MNIST. Then there are 200 pictures of kinds 8 and
9 (bags and ankle boots), by class: models learn from these for the same time of one processor core
(which other work on the machine does not spend), from scratch and by fine-tuning. A run of some
steps tells how many images fit into the time; the time that was then taken is in the table. Each
way is tried at several learning rates, as shares of the recipe's, and shown at the best, from
scratch as well. EfficientNet-Lite0 compares 1,000 drawn pictures with the test pictures of the two
kinds (Fréchet distance). Beside them stand the 200 pictures themselves, and the starting run as it
is, drawing its own kinds.

    python benchmarks/claims/finetuning.py
"""

import shutil
import time
from dataclasses import replace
from typing import Any

import common
import numpy as np
import torch
from matplotlib import pyplot

import trilemma
from trilemma import data as pictures
from trilemma import drawing
from trilemma.data import Dataset
from trilemma.sampling import Trained

RECIPE, KNOWN, NEW = "quick-diffusion", range(8), range(8, 10)
WAYS: dict[str, dict[str, Any] | None] = {
    "from scratch": None,
    "full": {"mode": "full"},
    "last layers": {"mode": "last"},
    "LoRA, rank 8": {"mode": "lora", "rank": 8},
}
RATES = {"lr": 8e-3, "adam_lr": 1e-3}  # the recipe's
SHORT, WARM = 10, 60  # steps by which speed is told, with and without those before


def of_kinds(data: Dataset, kinds: range, most: int | None = None) -> Dataset:
    """Return the first `most` pictures of some kinds, all of them if None."""
    assert data.label is not None
    rows = np.flatnonzero(np.isin(data.label, kinds))[:most]
    names = [data.label_names[kind] for kind in kinds]
    return replace(
        data,
        name=f"{data.name} {'+'.join(names)}",
        fingerprint=f"{data.fingerprint}-{kinds}-{most}",
        images=data.images[rows],
        label=data.label[rows] - kinds[0],
        label_names=names,
    )


def fit(data: Dataset, name: str, rate: float, **options: Any) -> tuple[Trained, float]:
    """Train anew into `runs/claims/finetuning`; return the model and the processor's seconds."""
    out = common.RUNS / "finetuning" / name
    shutil.rmtree(out, ignore_errors=True)
    changes = [f"train.optimizer.{key}={rate * value}" for key, value in RATES.items()]
    start = time.process_time()
    trained = trilemma.train(
        RECIPE, data, out=out, overrides=[*changes, "train.grids=0"], quiet=True, **options
    )
    return trained, time.process_time() - start


def steps_in(seconds: float, data: Dataset, **options: Any) -> int:
    """Return how many steps fit into so many seconds of the processor."""
    (_, few), (_, more) = (fit(data, "speed", 1.0, steps=n, **options) for n in (SHORT, WARM))
    return max(1, round(seconds / (more - few) * (WARM - SHORT)))


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument("--minutes", type=float, default=0.5, help="of a core, for each model")
    parser.add_argument("--start", type=float, default=3.0, help="minutes of the starting run")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--n", type=int, default=1000, help="pictures of each")
    given = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (pictures.load("fashion-mnist", split=split) for split in ("train", "test"))
    known, few = of_kinds(train, KNOWN), of_kinds(train, NEW, given.pictures)
    distance = common.Distance(of_kinds(test, NEW))
    first, seconds = fit(known, "start", 1.0, steps=steps_in(60 * given.start, known))
    common.tell("starting run", seen=first.progress["seen"], seconds=seconds)
    start_distance = distance(first.sample(given.n))
    rows, sheets = [], {"the pictures": few.tensor(slice(32))}
    for way, tune in WAYS.items():
        more = {} if tune is None else {"init": first.path, "tune": tune}
        steps = steps_in(60 * given.minutes, few, **more)
        tried = []
        for rate in given.rates:
            trained, seconds = fit(few, f"{way}-{rate:g}", rate, steps=steps, **more)
            drawn = trained.sample(given.n)
            tried.append((distance(drawn), rate, seconds, drawn))
            common.tell(f"{way}, rate {rate:g}", fd=tried[-1][0], steps=steps, seconds=seconds)
        best, rate, seconds, drawn = min(tried, key=lambda found: found[0])
        path = trained.path / ("lora.safetensors" if "LoRA" in way else "model.safetensors")
        others = ", ".join(f"{fd:.0f}" for fd, *_ in tried)
        images = trained.progress["seen"]
        size = f"{path.stat().st_size / 2**20:.2f} MiB"
        rows.append((way, f"{images:,}", f"{seconds:.0f}", f"{best:.0f} ({others})", size))
        sheets[way] = drawn[:32]
    figure, axes = pyplot.subplots(1, len(sheets), figsize=(13, 3), layout="constrained")
    for axis, (title, images) in zip(axes, sheets.items(), strict=True):
        axis.imshow(drawing.grid(images, 8), cmap="gray")
        axis.set(title=title, xticks=[], yticks=[])
    given.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out / "finetuning.png", dpi=120, bbox_inches="tight")
    common.publish(
        f"{given.minutes:g} minutes of a core for each model, after {given.start:g} for the "
        f"starting run ({first.progress['seen']:,} images of kinds 0 to 7), {len(few)} pictures "
        f"of {' and '.join(few.label_names)}, learning rates of {given.rates} times the recipe's, "
        f"in this order in brackets; FD-Lite0 of {given.n} to {len(of_kinds(test, NEW)):,} test "
        f"pictures; the pictures themselves score {distance(few.images):.0f}, the starting run "
        f"{start_distance:.0f}.",
        ("", "images", "seconds", "FD-Lite0", "file"),
        rows,
    )


if __name__ == "__main__":
    main()
