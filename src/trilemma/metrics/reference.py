"""Reference statistics: real images as an extractor saw them, kept in a file.

The file is the `.npz` of the field: `mu` and `sigma` of the pooled features, `mu_s` and `sigma_s`
of the spatial ones (guided-diffusion's names), and besides `features` (N, D) themselves, which
precision, coverage and neighbours need, and `protocol`, a JSON text. Files of other tools are read
too: with only `mu` and `sigma` they give a Fréchet distance and no more, and with `arr_0`, uint8
images (N, H, W, C), everything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilemma.data import Dataset
from trilemma.errors import UserError
from trilemma.metrics.features import Extractor, Features, hash_file
from trilemma.metrics.frechet import Statistics, statistics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Real images as an extractor saw them.

    Attributes:
        statistics: of the pooled features.
        spatial: of the spatial features, or None.
        pooled: the pooled features (N, D), or None when only their statistics are known.
        protocol: the extractor's, and `data`, `fingerprint`, `split`, `reference_n`,
            `reference_size`.
    """

    statistics: Statistics
    spatial: Statistics | None
    pooled: Tensor | None
    protocol: dict[str, Any]


def of_features(seen: Features, protocol: dict[str, Any]) -> Reference:
    """Return the reference that features make."""
    spatial = None if seen.spatial is None else statistics(seen.spatial)
    return Reference(statistics(seen.pooled), spatial, seen.pooled, protocol)


def of_dataset(dataset: Dataset, see: Extractor, *, limit: int, pooled_only: bool) -> Reference:
    """Return the reference of a data set's pictures, from the cache if it is there.

    Args:
        dataset: the pictures.
        see: the extractor; one without a known hash of its weights is not cached.
        limit: pictures at most; more are thinned out evenly.
        pooled_only: leave the spatial features out.
    """
    count = min(limit, len(dataset))
    protocol = see.protocol | {
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "split": dataset.split,
        "reference_n": count,
        "reference_size": list(dataset.shape),
    }
    # The name that the pictures were asked for by does not change what they are.
    identity = {key: value for key, value in protocol.items() if key != "data"}
    text = json.dumps(identity | {"pooled_only": pooled_only}, sort_keys=True)
    path = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
    if see.weights is not None and path.exists():
        return load(path, see, protocol)
    whole = count == len(dataset)
    images = dataset.images if whole else dataset.images[thinned(len(dataset), limit)]
    reference = of_features(see(images, pooled_only=pooled_only), protocol)
    if see.weights is not None:
        try:
            save(reference, path)
        except OSError as error:
            log.warning("the reference statistics are not kept: %s", error)
    return reference


def thinned(count: int, limit: int) -> np.ndarray:
    """Return the rows that stay when `count` are thinned out evenly to at most `limit`."""
    limit = min(count, limit)
    return np.arange(limit) * count // limit


def cache_folder() -> Path:
    """Return the folder of cached references; it may be deleted at any time."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "trilemma" / "reference"


def save(reference: Reference, path: str | Path) -> None:
    """Write a reference as `.npz`, all or nothing."""
    path = Path(path)
    arrays = {
        "mu": reference.statistics.mean.numpy(),
        "sigma": reference.statistics.covariance.numpy(),
        "protocol": np.array(json.dumps(reference.protocol)),
    }
    if reference.spatial is not None:
        arrays["mu_s"] = reference.spatial.mean.numpy()
        arrays["sigma_s"] = reference.spatial.covariance.numpy()
    if reference.pooled is not None:
        arrays["features"] = reference.pooled.numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
    np.savez(temporary, allow_pickle=False, **arrays)
    os.replace(temporary, path)


def load(path: str | Path, see: Extractor, protocol: dict[str, Any] | None = None) -> Reference:
    """Read a reference for use with an extractor.

    Args:
        path: the `.npz`.
        see: the extractor that the other side is seen by.
        protocol: to be stated; None states the file's own, or its name and hash.

    Raises:
        UserError: it holds no statistics, or those of another extractor.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            held = dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as .npz: {error}") from None
    said = json.loads(str(held["protocol"])) if "protocol" in held else None
    if said is not None:
        for key, value in see.protocol.items():
            if said[key] != value:
                raise UserError(
                    f"{path} was made with {key} {said[key]}, not {value}; use the same extractor"
                )
    if protocol is None:
        facts = {"data": path.name, "fingerprint": hash_file(path), "split": None}
        protocol = said or see.protocol | facts | {"reference_n": None, "reference_size": None}
    pooled = torch.from_numpy(held["features"]) if "features" in held else None
    own, own_spatial = _held(held, "mu", "sigma"), _held(held, "mu_s", "sigma_s")
    if "arr_0" in held:
        images = torch.from_numpy(held["arr_0"]).permute(0, 3, 1, 2)
        size = {"reference_n": len(images), "reference_size": list(images.shape[1:])}
        seen = of_features(see(images), protocol | size)
        # Statistics beside images are of a larger set than these, but mostly of Inception's.
        if own is None or own.mean.shape != seen.statistics.mean.shape:
            return seen
        return Reference(own, own_spatial, seen.pooled, protocol)
    if own is None:
        names = ", ".join(held) or "nothing"
        raise UserError(f"{path} holds {names}; expected mu and sigma, or images as arr_0")
    return Reference(own, own_spatial, pooled, protocol)


def _held(held: dict[str, np.ndarray], mean: str, covariance: str) -> Statistics | None:
    if mean not in held or covariance not in held:
        return None
    return Statistics(*(torch.from_numpy(held[key]).double() for key in (mean, covariance)))
