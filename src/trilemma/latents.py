"""What a frozen codec makes of the training pictures: computed once, memory-mapped from then on.

    $XDG_CACHE_HOME/trilemma/latents/<key>.npy        (~/.cache when unset; may be deleted)

One array (1 or 2, N, ...) of what the codec keeps of each picture, in the rows' order; a second one
of the pictures mirrored where training mirrors them. The key is a hash of the codec's weights, of
the data's fingerprint (which has size and split in it) and of whether pictures are mirrored: a
first stage that was trained on, or other pictures, have a file of their own. Like the cache of the
pictures it is written under a temporary name and renamed, so that all of it is there or nothing.

Pictures are encoded in the same groups and in float32 whatever the run, so a run finds the same
latents as one that computed them itself. It pays when every picture is seen again: a run that is
too short for that encodes its batches as they come.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from trilemma import checkpoint, distributed
from trilemma.batch import to_float
from trilemma.data import Dataset
from trilemma.data.cache import cache_root
from trilemma.errors import UserError
from trilemma.model import Frozen, Keeps
from trilemma.settings import Length

VERSION = 1  # of the file
GROUP = 64  # pictures encoded at once
SHARE = 0.1  # of a time budget that filling may take; else batches are encoded as they come


def keep(
    model: nn.Module,
    data: Dataset,
    flip: bool,
    length: Length,
    batch: int,
    where: torch.device,
    among: int | None = None,
) -> np.ndarray | None:
    """Return what the model's codec keeps of every picture (1 or 2, N, ...), computed if need be.

    All processes call it; the first of each machine computes.

    Args:
        model: on `where`, with the weights it trains with.
        data: the pictures.
        flip: of the mirrored pictures too.
        length: of the training.
        batch: pictures of a step.
        where: the device to compute on.
        among: pictures in all, where these are those of one size.

    Returns:
        None where the model's codec keeps nothing, or training is too short for it to pay.

    Raises:
        UserError: the file cannot be written.
    """
    codec = _keeping(model)
    sides, among = 2 if flip else 1, among or len(data)
    images = length.images or batch * (length.steps or 0)
    if codec is None or (length.seconds is None and images < sides * among):
        return None
    path = cache_root() / "latents" / f"{_key(codec, data, flip)}.npy"
    try:
        if distributed.local_rank() == 0 and not path.exists():
            share = SHARE * len(data) / among
            patience = math.inf if length.seconds is None else share * length.seconds
            _fill(path, codec, data, sides, where, patience)
    except OSError as error:
        raise UserError(
            f"latents cannot be kept in {path.parent}: {error.strerror or error}; set "
            "XDG_CACHE_HOME to a folder with room, or encode each batch anew: "
            "--set train.cache=false"
        ) from None
    finally:
        distributed.barrier()
    return np.load(path, mmap_mode="r") if path.exists() else None


def _keeping(module: nn.Module) -> Keeps | None:
    """Return the part that keeps something of pictures; what is frozen does not train."""
    for part in module.children():
        if isinstance(part, Keeps):
            return part
        found = None if isinstance(part, Frozen) else _keeping(part)
        if found is not None:
            return found
    return None


def _key(codec: Keeps, data: Dataset, flip: bool) -> str:
    assert isinstance(codec, nn.Module)
    digest = hashlib.sha256(json.dumps([VERSION, data.fingerprint, flip]).encode())
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _fill(
    path: Path, codec: Keeps, data: Dataset, sides: int, where: torch.device, patience: float
) -> None:
    """Write the file, or nothing if that would take more seconds than `patience`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = _groups(codec, data, sides, where)
    count = sides * -(-len(data) // GROUP)
    shown = track(
        groups,
        "encoding pictures",
        total=count,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    number, name = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
    draft = Path(name)
    try:
        with os.fdopen(number, "wb") as stream:
            for i, kept in enumerate(shown):
                if i == 0:
                    shape = (sides, len(data), *kept.shape[1:])
                    descr = np.lib.format.dtype_to_descr(kept.dtype)
                    header = {"descr": descr, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                    begun = time.perf_counter()  # the first group also warms up
                elif i == 1 and (time.perf_counter() - begun) * count > patience:
                    return
                stream.write(kept.tobytes())
        draft.chmod(0o644)  # mkstemp's files are the owner's alone
        checkpoint.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@torch.no_grad()
def _groups(codec: Keeps, data: Dataset, sides: int, where: torch.device) -> Iterator[np.ndarray]:
    """Yield what the codec keeps of groups of pictures, all as they are and then all mirrored."""
    for side in range(sides):
        for start in range(0, len(data), GROUP):
            image = to_float(data.tensor(slice(start, start + GROUP)))
            image = image.flip(-1) if side else image
            yield codec.keep(image.to(where)).cpu().numpy()
