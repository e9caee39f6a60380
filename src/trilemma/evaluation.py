"""Drawn images or a run against real images: a dictionary of numbers and their protocol.

A score on its own says nothing: it depends on the features, the resize, the number of images on
both sides and the real images chosen. All that is stored beside the scores as their protocol, and
`same_protocol` refuses to put scores of unlike protocols side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from trilemma import data as pictures
from trilemma import device, restoring, retrieval, sampling
from trilemma.batching import LARGEST, Batching
from trilemma.data import Dataset
from trilemma.errors import UserError
from trilemma.metrics import reference as references
from trilemma.metrics.features import Extractor, Features, Images, extractor
from trilemma.metrics.frechet import frechet_distance, rough, statistics
from trilemma.metrics.inception_score import inception_score
from trilemma.metrics.kernel import kernel_distance
from trilemma.metrics.likelihood import bits_per_dimension
from trilemma.metrics.neighbours import memorised, nearest
from trilemma.metrics.prdc import density_coverage, precision_recall
from trilemma.metrics.reading import read_images
from trilemma.metrics.reference import Reference
from trilemma.metrics.sliced import sliced_wasserstein
from trilemma.metrics.speed import speed
from trilemma.model import HasCostlyLikelihood, HasLikelihood
from trilemma.sampling import Trained

LIMIT = 50_000  # real images that the Fréchet distance looks at
BALLS = 10_000  # images on either side that precision, recall, density and coverage look at
LIKELY = 500  # real images whose likelihood is asked
HELD_OUT = 2000  # real images that tell how near to the training images unseen ones are
BATCH = 128

Subject = str | Path | Tensor | Trained
FeaturesLike = str | Extractor | Callable[[Tensor], Tensor]


def evaluate(
    what: Subject,
    data: str | Path | Dataset,
    *,
    n: int = 5000,
    split: str = "test",
    features: FeaturesLike = "lite0",
    seed: int = 0,
    training: Dataset | None = None,
    bits: bool = False,
    device_name: str | None = None,
    **sample_options: Any,
) -> dict[str, Any]:
    """Measure drawn images against real ones: quality, coverage, memorisation, speed.

    Args:
        what: a run folder or a trained model, which draws `n` images; or a folder, zip or `.npz` of
            drawn images, or a uint8 tensor (N, C, H, W), of which the first `n` are taken.
        data: the real images: a named data set, a folder or zip; a loaded Dataset; or an `.npz` of
            reference statistics.
        n: drawn images.
        split: of `data` to compare with; training images are always those of its train split.
        features: `lite0`, `inception:FILE`, `inception-tf:FILE`, `pixels`, or a function from uint8
            (B, C, H, W) to features (B, D).
        seed: of the first drawn image; image i has seed + i.
        training: the training images, when `data` is a loaded Dataset; None leaves out whether the
            model has memorised them.
        bits: tell the likelihood also where it takes tens to thousands of network calls for each
            picture, as of diffusion models.
        device_name: where the feature network runs; None picks the fastest there is.
        **sample_options: options for the model's `sample`, and `label`.

    Of a model that joins pictures and texts (`model.Matches`) it is measured how well they find
    each other, `retrieval.evaluate`; of one that enlarges, colours or fills holes, how near
    pictures of `data` that it restores come to themselves, `restoring.evaluate`.

    Returns:
        `scores`: by name, such as `fd-lite0`; `speed` if a model drew: see `metrics.speed.speed`;
        `likelihood` if the model tells any, and without `bits` if at once: see `likelihood`;
        `protocol`: what the scores depend on; `warnings`: a list of sentences.

    Raises:
        UserError: something given cannot be used.
    """
    if n < 2:
        raise UserError(f"n is {n}; a distance needs at least 2 images")
    what = _opened(what)
    if isinstance(what, Trained) and what.matches:
        return retrieval.evaluate(what, _as_trained(what, data, split))
    see = extractor(features, device_name)
    if isinstance(what, Trained) and (what.enlarges or what.repairs):
        chosen = {key: value for key, value in sample_options.items() if value is not None}
        real_ones = _as_trained(what, data, split)
        return restoring.evaluate(what, real_ones, see, n=n, seed=seed, track=_tracked, **chosen)
    if bits and not (isinstance(what, Trained) and isinstance(what.model, HasLikelihood)):
        raise UserError("a likelihood was asked for and what draws tells none; leave it out")
    images, sampling, cost = _images(what, n, seed, sample_options)
    real, held_out, trained_on = _real(data, split, training, tuple(images.shape[1:]), see)
    drawn = see(images)
    dims = len(real.statistics.mean), drawn.pooled.shape[1]
    if dims[0] != dims[1]:
        raise UserError(
            f"{data} has statistics of {dims[0]} numbers, and {see.name} gives {dims[1]}; take the "
            "features that the file was made with"
        )
    scores = score(drawn, real)
    if held_out is not None and trained_on is not None:
        scores["memorised"] = memorised(drawn.pooled, held_out, trained_on)
    protocol = real.protocol | {
        "n": len(images),
        "size": list(images.shape[1:]),
        "balls_n": _balls(drawn, real),
        "held_out_n": None if held_out is None else len(held_out),
        "training_n": None if trained_on is None else len(trained_on),
        "sampling": sampling,
    }
    named = {title(key, see.name): value for key, value in scores.items()}
    result: dict[str, Any] = {"scores": named}
    if cost is not None:
        result["speed"] = cost
    if isinstance(what, Trained) and (bits or _at_once(what)):
        if not isinstance(data, Dataset) and Path(data).suffix != ".npz":
            channels, height, _ = images.shape[1:]
            data = pictures.load(data, split=split, size=height, channels=channels)
        if isinstance(data, Dataset):
            result["likelihood"] = likelihood(what, data, bits)
    warnings = _warnings(protocol, n, scores)
    if isinstance(what, Trained) and what.data.get("buckets"):
        warnings.append(
            f"{what.name} learned from pictures near their own proportions (data.buckets); the "
            "scores are of squares that it draws, against squares cut out of the real ones"
        )
    return result | {"protocol": protocol, "warnings": warnings}


def score(drawn: Features, real: Reference, *, seed: int = 0) -> dict[str, float]:
    """Return all scores that the reference allows, of drawn images as the same extractor saw them.

    Keys: `fd`, `sfd`, `kd`, `kd_std`, `swd`, `inception_score`, `inception_score_std`, `precision`,
    `recall`, `density`, `coverage`. The last four look at equally many images on both sides.

    Args:
        drawn: features of the drawn images.
        real: the reference.
        seed: of random subsets and directions.
    """
    scores = {"fd": frechet_distance(statistics(drawn.pooled), real.statistics)}
    if drawn.spatial is not None and real.spatial is not None:
        scores["sfd"] = frechet_distance(statistics(drawn.spatial), real.spatial)
    if real.pooled is not None:
        scores["kd"], scores["kd_std"] = kernel_distance(drawn.pooled, real.pooled, seed=seed)
        scores["swd"] = sliced_wasserstein(drawn.pooled, real.pooled, seed=seed)
    if drawn.logits is not None and len(drawn) >= 10:
        both = inception_score(drawn.logits)
        scores["inception_score"], scores["inception_score_std"] = both
    count = _balls(drawn, real)
    if real.pooled is not None and count > 5:
        generator = torch.Generator().manual_seed(seed)
        some = real.pooled[torch.randperm(len(real.pooled), generator=generator)[:count]]
        few = drawn.pooled[:count]
        scores["precision"], scores["recall"] = precision_recall(some, few)
        scores["density"], scores["coverage"] = density_coverage(some, few)
    return scores


def _at_once(trained: Trained) -> bool:
    """Whether the model tells likelihoods in a few network calls."""
    model = trained.model
    return isinstance(model, HasLikelihood) and not isinstance(model, HasCostlyLikelihood)


def likelihood(trained: Trained, data: Dataset, costly: bool = False) -> dict[str, Any] | None:
    """Return the bits per dimension of the data's pictures under a model, with their protocol.

    None if the model tells no likelihoods, or only at the price of many network calls and not
    `costly`. Of a model with K classes p(x) is over equally frequent
    ones. The sum over all of them takes K passes of most models; its term of the picture's own
    class, log p(x) >= log p(x | y) - log K, takes one, and is off by log2(K) / D bits per dimension
    at most: 0.004 of ten classes on 28 x 28 pixels. Unlabelled data take all passes.

    Returns:
        `bits_per_dim`; `bits_error`, its standard error over pictures; `bits_are`: `exact`, `an
        upper bound`, or how much too high at most; `bits_of`: the pictures, evenly spread over the
        data.
    """
    model = trained.model
    if not isinstance(model, HasLikelihood) or not (costly or _at_once(trained)):
        return None
    rows = references.thinned(len(data), LIKELY)
    images, label, missed = data.tensor(rows), None, 0.0
    if trained.conditional and data.label_names == trained.data["label_names"]:
        label = data.condition(rows).label
        missed = math.log2(len(data.label_names)) / images[0].numel()
    where = trained.where
    with torch.no_grad(), device.autocast(trained.dtype, where):
        bits = bits_per_dimension(model, images, label, batch=BATCH, where=where) + missed
    exact = f"at most {missed:.2g} too high" if missed else "exact"
    return {
        "bits_per_dim": float(bits.mean()),
        "bits_error": float(bits.std() / len(bits) ** 0.5),
        "bits_are": "an upper bound" if model.bound else exact,
        "bits_of": f"{len(images)} pictures of {data.name}, {data.split}",
    }


def title(key: str, features: str) -> str:
    """Return the name under which a score on some features is quoted: `fd` is `fd-lite0`.

    On the FID's own features the field's names stand: `fid`, `kid`, `sfid`, `is`.
    """
    if key in ("precision", "recall", "density", "coverage", "memorised"):
        return key
    base, _, spread = key.partition("_std")
    base = {"kd": "kid", "inception_score": "is"}.get(base, base)
    if features != "inception":
        base = f"{base}-{features}"
    else:
        base = {"fd": "fid", "sfd": "sfid", "swd": "swd-inception"}.get(base, base)
    return base + ("-std" if key.endswith("_std") else "")


def frechet(images: Images, reference: Images, features: FeaturesLike = "lite0") -> float:
    """Return the Fréchet distance between two sets of uint8 images (N, C, H, W)."""
    see = extractor(features)
    a, b = (statistics(see(each, pooled_only=True).pooled) for each in (images, reference))
    return frechet_distance(a, b)


def nearest_neighbours(
    samples: Images,
    training: Dataset | Images,
    features: FeaturesLike = "lite0",
    *,
    k: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the k nearest training images to each sample: indices (N, k) and distances (N, k)."""
    see = extractor(features)
    if isinstance(training, Dataset):
        known = references.of_dataset(training, see, limit=len(training), pooled_only=True).pooled
        assert known is not None
    else:
        known = see(training, pooled_only=True).pooled
    return nearest(see(samples, pooled_only=True).pooled, known, k)


def same_protocol(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Refuse to compare two results of `evaluate` whose scores do not mean the same.

    How the images were drawn may differ: that is what a comparison compares.

    Raises:
        UserError: naming what differs.
    """
    a, b = first["protocol"], second["protocol"]
    keys = [key for key in {**a, **b} if key not in ("sampling", "data")]
    differ = [f"{key} is {a.get(key)} and {b.get(key)}" for key in keys if a.get(key) != b.get(key)]
    if differ:
        raise UserError(f"these scores cannot be compared: {'; '.join(differ)}")


def describe(result: Mapping[str, Any]) -> Table:
    """Return a result of `evaluate` as a table for the terminal."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in result["scores"].items():
        table.add_row(key, f"{value:.4g}")
    for key, value in result.get("likelihood", {}).items():
        table.add_row(key.replace("_", " "), _plain(value))
    for key, value in result.get("speed", {}).items():
        table.add_row(key.replace("_", " "), _plain(value), style="cyan")
    for key, value in result["protocol"].items():
        table.add_row(key.replace("_", " "), _plain(value), style="dim")
    for sentence in result["warnings"]:
        table.add_row("warning", sentence, style="yellow")
    return table


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _opened(what: Subject) -> Subject:
    """Return the trained model if `what` is the path of one, else `what`."""
    if isinstance(what, str | Path):
        path = Path(what)
        if path.suffix == ".safetensors" or (path / "model.safetensors").exists():
            return sampling.load(path)
    return what


def _as_trained(trained: Trained, data: str | Path | Dataset, split: str) -> Dataset:
    """Return the pictures as the model was trained on them, if they are not loaded yet."""
    if isinstance(data, Dataset):
        return data
    channels, size, _ = trained.data["shape"]
    chosen = trained.recipe.get("data", {})
    captions, tiles = chosen.get("captions", ()), chosen.get("tiles", False)
    asked: dict[str, Any] = {"captions": captions, "tiles": tiles}
    return pictures.load(data, split=split, size=size, channels=channels, **asked)


def _tracked(parts: Sequence[Tensor]) -> Iterable[Tensor]:
    """Show on a terminal how far drawing is."""
    screen = Console(stderr=True)
    return track(parts, "drawing", console=screen, transient=True, disable=not screen.is_terminal)


def _images(
    what: Subject, n: int, seed: int, options: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any], dict[str, Any] | None]:
    """Return the drawn images, how they were drawn, and what that cost if a model drew them."""
    if isinstance(what, Trained):
        return _draw(what, n, seed, options)
    if options:
        names = ", ".join(options)
        raise UserError(f"{names}: options for drawing, but these images are drawn already")
    if isinstance(what, Tensor):
        return what[:n], {"source": "tensor"}, None
    return read_images(what, n), {"source": str(what)}, None


def _draw(
    trained: Trained, n: int, seed: int, options: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    options = {key: value for key, value in options.items() if value is not None}
    batching = Batching(trained.where, options.get("batch"))
    screen = Console(stderr=True)
    batches = track(
        trained.batches(n, seed=seed, **(options | {"batch": batching})),
        "drawing",
        total=-(-n // (options.get("batch") or LARGEST)),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
    images = torch.cat(list(batches))
    cost = speed(
        trained.model,
        lambda count: trained.sample(count, seed=seed, **(options | {"batch": count})),
        sorted({1, min(batching.size, n)}),
    )
    chosen = {key: value for key, value in options.items() if key not in ("batch", "label", "text")}
    label, labelled = options.get("label"), trained.conditional or options.get("classifier")
    sampling = {
        "recipe": trained.name,
        "seen": trained.progress["seen"],
        "seeds": [seed, seed + n - 1],
        "labels": ("in turn" if label is None else label) if labelled else None,
    }
    if trained.reads:
        sampling["texts"] = _asked(trained, options.get("text"))
    return images, sampling | trained.options(chosen), cost


def _asked(trained: Trained, text: str | Sequence[str] | None) -> str:
    """Say which texts a model is asked for."""
    if text is None:
        return f"{len(trained.data.get('captions', []))} captions of training pictures in turn"
    return text if isinstance(text, str) else f"{len(text)} given, in turn"


def _real(
    data: str | Path | Dataset,
    split: str,
    training: Dataset | None,
    shape: tuple[int, ...],
    see: Extractor,
) -> tuple[Reference, Tensor | None, Tensor | None]:
    """Return the reference, and the features of held-out and of training images if known."""
    if isinstance(data, str | Path) and Path(data).suffix == ".npz":
        return references.load(data, see), None, None
    if isinstance(data, Dataset):
        held_out = data if data.split == "test" else None
    else:
        channels, height, width = shape
        if height != width:
            raise UserError(
                f"the drawn images are {width}x{height}; expected squares, as are cut out of the "
                "real ones"
            )
        loaded = {
            part: pictures.load(data, split=part, size=height, channels=channels)
            for part in {split, "train", "test"}
        }
        data, training, held_out = loaded[split], loaded["train"], loaded["test"]
    real = references.of_dataset(data, see, limit=LIMIT, pooled_only=False)
    if training is None or held_out is None or not len(held_out) or not len(training):
        return real, None, None

    def pooled(dataset: Dataset, limit: int) -> Tensor | None:
        if dataset is data and real.pooled is not None and len(dataset) <= LIMIT:
            return real.pooled[torch.from_numpy(references.thinned(len(dataset), limit))]
        return references.of_dataset(dataset, see, limit=limit, pooled_only=True).pooled

    return real, pooled(held_out, HELD_OUT), pooled(training, len(training))


def _balls(drawn: Features, real: Reference) -> int:
    return 0 if real.pooled is None else min(len(drawn), len(real.pooled), BALLS)


def _warnings(protocol: Mapping[str, Any], asked: int, scores: Mapping[str, float]) -> list[str]:
    said = []
    n, real = protocol["n"], protocol["reference_n"]
    if n < asked:
        said.append(f"{asked} images were asked for, and there are {n}")
    said += rough(n, real or n)
    if protocol["reference_size"] not in (None, protocol["size"]):
        said.append(f"images of {protocol['size']} against real ones {protocol['reference_size']}")
    if "coverage" not in scores:
        said.append("precision, recall, density, coverage need the real images or more of them")
    return said
