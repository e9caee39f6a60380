"""What a model that joins pictures and texts is for: finding, naming, and how well it does both.

Vectors of pictures are kept in the cache, one file for each model, under the hash of the picture's
file: a folder that was searched before is searched again at once, wherever its pictures lie now.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from trilemma import device
from trilemma.batch import to_float
from trilemma.data import Dataset
from trilemma.data.cache import cache_root, digest_of
from trilemma.data.decode import decode
from trilemma.data.listing import Source, Unusable
from trilemma.data.named import find
from trilemma.drawing import grid
from trilemma.errors import UserError
from trilemma.metrics.reference import thinned
from trilemma.metrics.retrieval import accuracy, class_vectors, recalls
from trilemma.model import Matches
from trilemma.sampling import Trained

AT = (1, 5, 10)
LIMIT = 5000  # pictures that retrieval is measured on: its table grows with their square
TEMPLATES = ("{}", "a picture of {}")
BATCH = 128
SHOWN = 128  # pixels of the pictures on a sheet

Progress = Callable[[Any], Any]
"""Goes through a sequence, and may show how far it has come."""


def _model(trained: Trained) -> Matches:
    if not isinstance(trained.model, Matches):
        raise UserError(
            f"{trained.name} knows nothing of words; searching needs a run of the recipe clip, or "
            "a Hugging Face folder of a CLIP"
        )
    return trained.model


def embed_images(trained: Trained, images: Tensor) -> Tensor:
    """Map pictures, uint8 (N, C, H, W) of the model's shape, to unit vectors (N, D) on the CPU."""
    model, where = _model(trained), trained.where
    vectors = []
    with torch.inference_mode(), device.autocast(trained.dtype, where):
        for part in images.split(BATCH):
            vectors.append(model.embed_images(to_float(part.to(where))).float().cpu())
    return torch.cat(vectors)


def embed_texts(trained: Trained, texts: Sequence[str]) -> Tensor:
    """Map texts to unit vectors (N, D) on the CPU."""
    model, where = _model(trained), trained.where
    with torch.inference_mode(), device.autocast(trained.dtype, where):
        parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        return torch.cat([model.embed_texts(part).float().cpu() for part in parts])


def zero_shot(
    trained: Trained, images: Tensor, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Return the cosines (N, K) of pictures, uint8 (N, C, H, W), and classes known by name only.

    Args:
        trained: the model.
        images: the pictures.
        names: of the K classes.
        templates: sentences, the name at `{}`; a class's vector is the mean of theirs.
    """
    return embed_images(trained, images) @ _of_classes(trained, names, templates).T


def _of_classes(trained: Trained, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the vectors (K, D) of classes."""
    sentences = [template.format(name) for name in names for template in templates]
    prompts = embed_texts(trained, sentences).unflatten(0, (len(names), len(templates)))
    return class_vectors(prompts)


def evaluate(trained: Trained, data: Dataset) -> dict[str, Any]:
    """Measure how well captions and pictures find each other, and classes by their names.

    Recall at k is the share of texts (pictures) with a right picture (text) among the k nearest.
    Equal captions are one text, right for all their pictures; a picture has all its captions.

    Returns:
        `scores`, `protocol` and `warnings`, as `evaluation.evaluate`.

    Raises:
        UserError: the data have neither captions nor classes, or another shape.
    """
    _model(trained)
    if list(data.shape) != list(trained.data["shape"]):
        raise UserError(
            f"{data.name} has pictures of {data.shape} and the model knows {trained.data['shape']}"
        )
    rows = thinned(len(data), LIMIT)
    images = embed_images(trained, data.tensor(rows))
    scores: dict[str, float] = {}
    protocol: dict[str, Any] = {"data": data.name, "split": data.split, "pictures": len(rows)}
    warnings = []
    if data.text is not None:
        captions = data.captions or [[text] for text in data.text]
        told = [[text for text in captions[row] if text] for row in rows]
        texts = list(dict.fromkeys(text for each in told for text in each))
        place = {text: i for i, text in enumerate(texts)}
        right = torch.zeros(len(rows), len(texts), dtype=torch.bool)
        for i, each in enumerate(told):
            right[i, [place[text] for text in each]] = True
        if texts:
            similarity = images @ embed_texts(trained, texts).T
            for way, values in (
                ("text to image", recalls(similarity.T, right.T, AT)),
                ("image to text", recalls(similarity, right, AT)),
            ):
                scores |= {f"{way}, recall@{k}": v for k, v in zip(AT, values, strict=True)}
            protocol["texts"] = len(texts)
            protocol["by chance, recall@1"] = float(right.float().mean())
    if data.label is not None and len(data.label_names) > 1:
        vectors = _of_classes(trained, data.label_names, TEMPLATES)
        label = torch.from_numpy(np.asarray(data.label)[rows])
        scores["zero-shot accuracy"] = accuracy(images @ vectors.T, label)
        most = float(label.bincount().max() / len(label))
        protocol |= {"classes": len(data.label_names), "most frequent class": most}
        protocol["prompts"] = list(TEMPLATES)
    if not scores:
        raise UserError(
            f"{data.name} has neither captions nor classes; retrieval needs one of them"
        )
    if len(rows) < len(data):
        warnings.append(f"measured on {len(rows)} of {len(data)} pictures, evenly spread")
    return {"scores": scores, "protocol": protocol, "warnings": warnings}


def search(
    trained: Trained,
    source: str | Path,
    *,
    text: str | None = None,
    image: str | Path | None = None,
    n: int = 20,
    progress: Progress = iter,
) -> tuple[list[tuple[str, float]], Image.Image, dict[str, str]]:
    """Find the pictures that are nearest to a text or to a picture.

    Args:
        trained: a model that joins pictures and texts.
        source: a folder, zip or parquet file of pictures, or a named set.
        text: what to look for; or:
        image: a picture file to look for the like of.
        n: how many to find.
        progress: wraps the parts of the work, to show how far it has come.

    Returns:
        Names and cosines, the nearest first; a sheet of these pictures, row by row; path -> reason
        of files that cannot be used.

    Raises:
        UserError: neither or both of text and image are given, or there is nothing to search in.
    """
    if (text is None) == (image is None):
        raise UserError("give either a text or a picture to search by")
    if n < 1:
        raise UserError(f"n is {n}; expected at least 1")
    if text is not None:
        asked = embed_texts(trained, [text])[0]
    else:
        path = Path(cast(str, image)).expanduser()
        try:
            asked = embed_images(trained, _stacked([_pixels(trained, path.read_bytes())]))[0]
        except (OSError, Unusable) as error:
            raise UserError(f"{path} cannot be used: {error}") from None
    files = find(source)
    listing = files.listing()
    items = [item.path for item in listing.items]
    skipped = dict(listing.unusable)
    names, vectors = _embed_listing(trained, files, items, skipped, progress)
    if not names:
        told = next((f"{name}: {reason}" for name, reason in skipped.items()), "no pictures")
        raise UserError(f"{source} holds no picture that can be used ({told})")
    cosine = vectors @ asked
    best = cosine.argsort(descending=True, stable=True)[:n].tolist()
    shown = [decode(files.read(names[i]), SHOWN, "white") for i in best]
    pixels = [np.broadcast_to(each, (3, SHOWN, SHOWN)) for each in shown]
    sheet = grid(_stacked(pixels), min(5, len(best)))
    return [(names[i], float(cosine[i])) for i in best], sheet, skipped


def _pixels(trained: Trained, content: bytes | np.ndarray) -> np.ndarray:
    """Decode a picture as for training: uint8 (C, H, W); raises Unusable."""
    shape = tuple(trained.data["shape"])
    return np.broadcast_to(decode(content, shape[1], "white", grey=shape[0] == 1), shape)


def _embed_listing(
    trained: Trained,
    files: Source,
    items: Sequence[str],
    skipped: dict[str, str],
    progress: Progress,
) -> tuple[list[str], Tensor]:
    """Return the names of the pictures that can be used and their vectors, from the cache or new.

    Adds to `skipped` what cannot be used.
    """
    kept = _Kept(trained)
    digests: dict[str, str] = {}
    try:
        for start in progress(range(0, len(items), BATCH)):
            new: dict[str, np.ndarray] = {}
            for name in items[start : start + BATCH]:
                try:
                    content = files.read(name)
                    digest = digest_of(content)
                    if digest not in kept.vectors and digest not in new:
                        new[digest] = _pixels(trained, content)
                except Unusable as error:
                    skipped[name] = str(error)
                else:
                    digests[name] = digest
            if new:
                kept.add(list(new), embed_images(trained, _stacked(list(new.values()))))
    finally:
        kept.save()
    vectors = [kept.vectors[digest] for digest in digests.values()]
    return list(digests), torch.from_numpy(np.stack(vectors)) if vectors else torch.empty(0)


def _stacked(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures))


class _Kept:
    """The vectors that a model has made, by the SHA-256 of the picture's file; on disk.

    A file that is damaged, or was written for other weights, is begun anew.
    """

    def __init__(self, trained: Trained) -> None:
        digest = hashlib.sha256(repr(sorted(trained.recipe["model"].items())).encode())
        for name, tensor in sorted(trained.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.path = cache_root() / "embeddings" / f"{digest.hexdigest()[:32]}.safetensors"
        self.vectors: dict[str, np.ndarray] = {}
        self._changed = False
        try:
            stored = load_file(self.path)
            names = [row.tobytes().hex() for row in stored["sha256"]]
            self.vectors = dict(zip(names, stored["vector"], strict=True))
        except (OSError, SafetensorError, KeyError, ValueError):
            pass  # none yet, or damaged

    def add(self, digests: Sequence[str], vectors: Tensor) -> None:
        """Keep vectors (N, D)."""
        self.vectors.update(zip(digests, vectors.numpy(), strict=True))
        self._changed = True

    def save(self) -> None:
        """Write what is new; a cache that cannot be written is done without."""
        if not self._changed:
            return
        names = np.array([np.frombuffer(bytes.fromhex(d), np.uint8) for d in self.vectors])
        draft = self.path.with_name(f".{uuid4().hex}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"sha256": names, "vector": np.stack(list(self.vectors.values()))}, draft)
            draft.replace(self.path)
        except (OSError, SafetensorError):
            draft.unlink(missing_ok=True)
