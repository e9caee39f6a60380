"""A checkpoint fine-tuned on one's own captioned pictures: LoRA, or all weights of its network.

What does not learn is asked once: each picture's latents (mean and deviation, so that training
draws anew each time) and each different caption's embedding are computed before training and kept
in files beside the result, of which training reads the rows of a batch. The text encoders and the
autoencoder are then no longer needed.

A LoRA (Hu et al. 2022, `networks.lora`) is written as diffusers names it, `MODULE.lora_A.weight`
(r, in) and `MODULE.lora_B.weight` (out, r) with the scale in B, for `load_lora_weights`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trilemma import checkpoint, device
from trilemma.batch import Rng, to_float
from trilemma.data.dataset import Dataset
from trilemma.errors import UserError
from trilemma.networks import lora
from trilemma.networks.layers import Embedded
from trilemma.stable.places import Place, gather

log = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ("q", "k", "v", "out")
TROUBLE = 5  # steps without a finite loss, one after the other, after which training stops


class Tunable(Protocol):
    """A checkpoint that can be fine-tuned.

    Attributes:
        network: what learns; `recompute` says whether it keeps activations (`networks.mmdit`).
        lora_prefix: what diffusers puts before the names of the network's layers.
    """

    network: nn.Module
    lora_prefix: str

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation (B, C, h, w) of the latents of images in [-1, 1]."""
        ...

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return texts as the network reads them."""
        ...

    def loss(self, x0: Tensor, text: Embedded, rng: Rng) -> Tensor:
        """Return the loss (B,) of latents x0 (B, C, h, w), noise and times drawn from `rng`."""
        ...

    def diffusers_places(self) -> Mapping[str, Place]:
        """Return where each weight of the network stands in diffusers' layout."""
        ...


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune.

    Attributes:
        steps: of the optimizer.
        batch: pictures in a step.
        rate: learning rate of AdamW; 1e-4 for a LoRA and 1e-5 for all weights if None.
        rank: of a LoRA's factors; None lets all weights learn.
        scale: of what the factors add.
        targets: the layers of a LoRA (`lora.named`).
        dropout: share of captions that are left out, which guidance needs.
        warm_up: steps in which the rate rises to `rate`.
        seed: of all that is drawn.
        recompute: keep only each block's input, and compute the block again for its gradient.

    Raises:
        ValueError: a number that is out of its range.
    """

    steps: int = 1000
    batch: int = 1
    rate: float | None = None
    rank: int | None = 16
    scale: float = 1.0
    targets: Sequence[str] = ATTENTION
    dropout: float = 0.1
    warm_up: int = 20
    seed: int = 0
    recompute: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or (self.rank or 1) < 1:
            raise ValueError(
                f"steps {self.steps}, batch {self.batch} and rank {self.rank}; expected 1 or more"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 up to, not with, 1")


class Cache:
    """Latents and embedded captions of a data set, in files that are mapped into memory.

    Args:
        folder: of the files; what is there of the same pictures and captions is not made again.
        model: makes them.
        data: pictures with captions.

    Raises:
        UserError: the pictures have no captions.
    """

    def __init__(self, folder: Path, model: Tunable, data: Dataset) -> None:
        if data.text is None:
            raise UserError(
                f"{data.name} has no captions; put NAME.txt beside each picture, or a metadata.csv "
                "with the columns file_name and text"
            )
        captions = sorted({"", *data.text})
        self.rows = {caption: row for row, caption in enumerate(captions)}
        self.text, self.folder = data.text, folder / "cache"
        told = {"pictures": data.fingerprint, "captions": captions}
        index = self.folder / "index.json"
        if not index.exists() or json.loads(index.read_text()) != told:
            self.folder.mkdir(parents=True, exist_ok=True)
            index.unlink(missing_ok=True)
            self._fill("latents", len(data), lambda i: _stacked(model, data, i))
            self._fill(
                "vector", len(captions), lambda i: _numbers(model.embed([captions[i]]).vector)
            )
            self._fill(
                "tokens", len(captions), lambda i: _numbers(model.embed([captions[i]]).tokens)
            )
            index.write_text(json.dumps(told))
        self.files = {path.stem: np.load(path, mmap_mode="r") for path in self.folder.glob("*.npy")}

    def _fill(self, name: str, count: int, make: Callable[[int], np.ndarray | None]) -> None:
        """Write `count` rows to a file of that name, one by one; none where there are none."""
        path = self.folder / f"{name}.npy"
        path.unlink(missing_ok=True)
        file = None
        for row in range(count):
            made = make(row)
            if made is None:
                return
            if file is None:
                shape = (count, *made.shape)
                file = np.lib.format.open_memmap(path, "w+", made.dtype, shape)
            file[row] = made
        assert file is not None
        file.flush()

    def __len__(self) -> int:
        return len(self.text)

    def latents(self, pictures: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return mean and deviation (B, C, h, w) of the latents of these pictures."""
        mean, deviation = torch.from_numpy(self.files["latents"][list(pictures)]).unbind(1)
        return mean, deviation

    def embedded(self, captions: Sequence[str]) -> Embedded:
        """Return captions of the data set, or "", as the network reads them."""
        rows = [self.rows[caption] for caption in captions]
        told = {
            name: torch.from_numpy(self.files[name][rows]).float()
            for name in ("vector", "tokens")
            if name in self.files
        }
        return Embedded(**told)


@torch.no_grad()
def _stacked(model: Tunable, data: Dataset, row: int) -> np.ndarray:
    where = next(model.network.parameters()).device
    moments = model.moments(to_float(data.tensor([row])).to(where))
    return torch.cat(moments).float().cpu().numpy()


@torch.no_grad()
def _numbers(made: Tensor | None) -> np.ndarray | None:
    """Return one row as numpy has it; bfloat16, which it has not, as float32."""
    if made is None:
        return None
    half = made.dtype == torch.float16
    return (made if half else made.float())[0].cpu().numpy()


def order(count: int, seed: int, start: int, size: int) -> list[int]:
    """Return which of `count` pictures are at places start to start + size of the training order.

    One permutation after another, each a function of the seed and its number.
    """
    found = []
    for place in range(start, start + size):
        epoch, at = divmod(place, count)
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        found.append(int(torch.randperm(count, generator=generator)[at]))
    return found


def finetune(
    model: Tunable, data: Dataset, out: Path, tuning: Tuning, precision: str = "auto"
) -> Iterator[tuple[int, float]]:
    """Fine-tune a checkpoint's network; yields step and loss, and writes what was learned at last.

    Args:
        model: the checkpoint, whose network is changed.
        data: captioned pictures of a size that the checkpoint draws.
        out: the folder for cache, log and result.
        tuning: how.
        precision: of the computation, as in recipes.

    Raises:
        UserError: pictures without captions, no layer that the targets name, or five steps in a row
            without a finite loss.
    """
    cache, network = Cache(out, model, data), model.network
    names, where = model.diffusers_places(), next(network.parameters()).device
    learning = _let_learn(network, tuning)
    rate = tuning.rate or (1e-5 if tuning.rank is None else 1e-4)
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.01)
    kind, bad = device.dtype(precision, where), 0
    network.train()
    network.recompute = tuning.recompute  # type: ignore[assignment]
    with open(out / "log.jsonl", "a") as written:
        for step in range(tuning.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / (tuning.warm_up + 1))
            with device.autocast(kind, where):
                loss = _loss(model, cache, tuning, step * tuning.batch, where)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(learning, 1.0)
            told = float(loss)
            if math.isfinite(told) and bool(norm.isfinite()):
                optimizer.step()
                bad = 0
            else:
                bad += 1
                log.warning("step %d: loss %s, gradient %s; skipped", step + 1, told, float(norm))
                if bad == TROUBLE:
                    raise UserError(
                        f"{TROUBLE} steps in a row had no finite loss or gradient; lower the rate, "
                        "or compute in float32"
                    )
            optimizer.zero_grad()
            written.write(json.dumps({"step": step + 1, "loss": told}) + "\n")
            yield step + 1, told
    network.eval()
    if tuning.rank is not None:
        write_lora(out / LORA_FILE, network, names, model.lora_prefix)


def _let_learn(network: nn.Module, tuning: Tuning) -> list[nn.Parameter]:
    """Let a LoRA's factors learn, or all weights; return them. Factors are float32."""
    if tuning.rank is None:
        return [parameter.requires_grad_() for parameter in network.parameters()]
    network.requires_grad_(True)
    layers = lora.fitting(network, tuning.rank, tuning.targets)
    if not layers:
        raise UserError(
            f"no layer of this network is named {', '.join(tuning.targets)} and larger than factors "
            f"of rank {tuning.rank}"
        )
    torch.manual_seed(tuning.seed)
    lora.attach(network, layers, tuning.rank, tuning.scale)
    factors = [part.float() for _, _, part in lora.factors(network)]
    network.requires_grad_(False)
    return [p.requires_grad_() for part in factors for p in (part.down, part.up)]


def _loss(model: Tunable, cache: Cache, tuning: Tuning, start: int, where: torch.device) -> Tensor:
    """Return the mean loss of the pictures from this place of the training order on."""
    rng = Rng([(tuning.seed << 32) + start + i for i in range(tuning.batch)], where)
    pictures = order(len(cache), tuning.seed, start, tuning.batch)
    kept = (rng.uniform(1)[:, 0] >= tuning.dropout).tolist()
    captions = [cache.text[i] if keep else "" for i, keep in zip(pictures, kept, strict=True)]
    mean, deviation = (each.to(where) for each in cache.latents(pictures))
    x0 = mean + deviation * rng.normal(*mean.shape[1:])
    told = cache.embedded(captions)
    moved = {name: None if each is None else each.to(where) for name, each in vars(told).items()}
    return model.loss(x0, Embedded(**moved), rng).mean()


def write_lora(path: Path, network: nn.Module, names: Mapping[str, Place], prefix: str) -> None:
    """Write a network's factors as diffusers names them.

    Args:
        path: of the file.
        network: with factors.
        names: where its weights stand in diffusers' layout.
        prefix: before the names.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer, part in lora.factors(network):
        module = names[f"{name}.weight"].name.removesuffix(".weight")
        at, down, up = f"{prefix}.{module}", part.down, part.scale * part.up
        if isinstance(layer, nn.Conv2d):
            down = down.view(len(down), layer.in_channels // layer.groups, *layer.kernel_size)
            up = up[:, :, None, None]
        tensors[f"{at}.lora_A.weight"], tensors[f"{at}.lora_B.weight"] = down, up
    _save(path, tensors)


def write_network(folder: Path, model: Tunable, config: Mapping[str, Any]) -> None:
    """Write a network as a folder that diffusers reads, such as `transformer`.

    Args:
        folder: of `config.json` and the weights.
        model: whose network it is, without factors.
        config: diffusers' configuration of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = gather(model.network.state_dict(), model.diffusers_places())
    _save(folder / "diffusion_pytorch_model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as others' programs expect them, all or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, temporary, metadata={"format": "pt"})
    checkpoint.replace(temporary, path)
