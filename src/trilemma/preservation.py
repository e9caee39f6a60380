"""Prior preservation: pictures of the model one begins with, to learn from beside one's own.

A model tuned on a handful of pictures forgets what else it could. Ruiz et al. 2023, "DreamBooth:
Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation", equation 2, add to the
loss on the subject `weight` times that on pictures which the model drew before it was tuned. Here
the same is done with any loss that is a mean over a batch: a share of every batch, weight / (1 +
weight), is drawn pictures. They are drawn once, and kept in the run.

Classes are those of the data and those of the first model. Pictures without classes become a class
of their own, named after their folder, beside the model's: the subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from trilemma import checkpoint, recipe, sampling
from trilemma.batch import Batch, Condition, Rng, to_float, to_uint8
from trilemma.data import Dataset, batches
from trilemma.errors import UserError

FILE = "preserved.safetensors"  # in the run's folder


def classes_of(init: str | Path) -> list[str]:
    """Return the classes of the model to begin with; raises UserError if it reads attributes."""
    _, about = checkpoint.read_model(init)
    if recipe.find(about["recipe"]["model"], "attributes"):
        raise UserError(
            f"{init} draws by attributes, for which prior preservation is not made; leave "
            "--preserve out"
        )
    by_class = recipe.find(about["recipe"]["model"], "classes")
    return about["data"]["label_names"] if by_class else []


def with_classes(data: Dataset, known: Sequence[str]) -> Dataset:
    """Return the data with the classes of the model to begin with after their own.

    Raises:
        UserError: the data have classes and the model has none.
    """
    if data.label is not None and not known:
        raise UserError(
            f"{data.name} has classes and the model to begin with knows none, so what it draws has "
            "none; give the pictures in one folder without class folders, or leave --preserve out"
        )
    if not known:
        return data
    names, label = data.label_names, data.label
    if label is None:
        names, label = [Path(data.name).stem], np.zeros(len(data), np.int64)
    names = [*names, *(name for name in known if name not in names)]
    return replace(data, label=label, label_names=names)


def draw(init: str | Path, count: int, out: Path, seed: int, device_name: str | None) -> None:
    """Draw pictures from the model to begin with, each class in turn, and keep them in a run.

    Raises:
        UserError: it draws none of its own.
    """
    trained = sampling.load(init, device_name)
    images, labels = trained.sample(count, seed=seed), trained.labels(count, None)
    tensors = {"images": images} | ({} if labels is None else {"label": labels})
    facts = {"from": str(init), "seed": seed, "label_names": trained.data["label_names"]}
    checkpoint.write(out / FILE, tensors, facts)


def kept(out: Path, data: Dataset) -> Dataset:
    """Return a run's drawn pictures, in the shape and with the classes of its data.

    Raises:
        UserError: they are not there, or are grey and the data coloured or the other way round.
    """
    tensors, facts = checkpoint.read(out / FILE)
    images, label = tensors["images"], tensors.get("label")
    if images.shape[1] != data.shape[0]:
        raise UserError(
            f"{facts['from']} draws pictures of {images.shape[1]} channels and {data.name} has "
            f"{data.shape[0]}; prior preservation needs as many, grey or coloured"
        )
    if images.shape[1:] != data.shape:
        larger = F.interpolate(to_float(images), data.shape[1:], mode="bicubic", antialias=True)
        images = to_uint8(larger)
    rows = None
    if label is not None:
        place = np.array([data.label_names.index(name) for name in facts["label_names"]])
        rows = place[label.numpy()]
    return Dataset(
        name=f"pictures of {facts['from']}",
        split="train",
        fingerprint="",
        images=images.numpy(),
        label=rows,
        label_names=data.label_names,
        text=None if data.text is None else [""] * len(images),
    )


def share(size: int, weight: float, world: int) -> int:
    """Return how many pictures of a step are drawn ones: the same for each process, 1 at least.

    Raises:
        UserError: a process's share of a step is a single picture.
    """
    each = size // world
    if each < 2:
        raise UserError(f"a batch of {each} has no room for a drawn picture; set train.batch=8")
    return world * min(max(round(each * weight / (1 + weight)), 1), each - 1)


def mixed(
    data: Dataset,
    out: Path,
    size: int,
    weight: float,
    *,
    seed: int,
    start: int,
    flip: bool,
    rank: int,
    world: int,
) -> Iterator[Batch]:
    """Return training batches without end, in each some drawn pictures after those of the data.

    Arguments as `data.batches`, `out` the run with the drawn pictures and `weight` that of the loss
    on them; as there, a batch is a function of seed and position.

    Raises:
        UserError: as `kept` and `share`, at the call.
    """
    drawn, count = kept(out, data), share(size, weight, world)
    step, rest = start // size, size - count
    own = batches(data, rest, seed=seed, start=step * rest, flip=flip, rank=rank, world=world)
    other = batches(
        drawn, count, seed=seed + 1, start=step * count, flip=flip, rank=rank, world=world
    )
    return _together(own, other, start, size)


def _together(
    own: Iterator[Batch], other: Iterator[Batch], start: int, size: int
) -> Iterator[Batch]:
    for ours, theirs in zip(own, other, strict=True):
        one, two = ours.condition, theirs.condition
        condition = Condition(
            one.count + two.count,
            label=_joined(one.label, two.label),
            text=None if one.text is None or two.text is None else [*one.text, *two.text],
        )
        image = torch.cat([ours.image, theirs.image])
        seeds = torch.cat([ours.rng.seeds, theirs.rng.seeds])
        yield Batch(image, condition, start, Rng(seeds))
        start += size


def _joined(one: torch.Tensor | None, two: torch.Tensor | None) -> torch.Tensor | None:
    return None if one is None or two is None else torch.cat([one, two])
