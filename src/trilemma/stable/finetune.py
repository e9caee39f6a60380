"""A checkpoint fine-tuned on one's own captioned pictures: LoRA, or all weights of its network.

What does not learn is asked once and kept (`tunable`), so training takes the network alone.

A LoRA (Hu et al. 2022, `networks.lora`) is written as diffusers names it, `MODULE.lora_A.weight`
(r, in) and `MODULE.lora_B.weight` (out, r) with the scale in B, for `load_lora_weights`.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from trilemma import checkpoint, device, signals
from trilemma import data as data_sets
from trilemma.batch import Rng
from trilemma.data.buckets import turn
from trilemma.data.dataset import Dataset
from trilemma.errors import Interrupted, UserError
from trilemma.log import Log
from trilemma.networks import lora
from trilemma.networks.layers import Embedded
from trilemma.stable import files, load
from trilemma.stable.pipeline import StableDiffusion
from trilemma.stable.places import Place, gather
from trilemma.stable.tunable import Cache, Tunable, TunableUNet

log = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
STATE = Path("training", "state.safetensors")
ATTENTION = ("attention", "alone", "attn1", "attn2")
TROUBLE = 5  # steps without a finite loss, one after the other, after which training stops


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune.

    Attributes:
        steps: of the optimizer.
        batch: pictures in a step.
        rate: learning rate of AdamW; 1e-4 for a LoRA and 1e-5 for all weights if None.
        rank: of a LoRA's factors; None lets all weights learn.
        scale: of what the factors add.
        targets: the layers of a LoRA (`lora.named`); those of attention if not said.
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
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"rate is {self.rate}; expected a number above 0, such as 1e-4")
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"seed is {self.seed}; expected 0 to {(1 << 31) - 1}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 up to, not with, 1")


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
    model: Tunable,
    data: Dataset | Sequence[Dataset],
    out: Path,
    tuning: Tuning,
    precision: str = "auto",
    name: str = "",
    resume: bool = False,
    save_every: float = 60.0,
) -> Iterator[tuple[int, float]]:
    """Fine-tune a checkpoint's network; yields step and loss, and writes what was learned at last.

    Its state is saved meanwhile, and goes on bit for bit: what is drawn is a function of the step.

    Args:
        model: the checkpoint, whose network is changed.
        data: captioned pictures of a size that the checkpoint draws; of several sizes, one set for
            each, and each step takes its pictures from one.
        out: the folder for cache, log, state and result.
        tuning: how.
        precision: of the computation, as in recipes.
        name: of the checkpoint.
        resume: go on from the state in `out`.
        save_every: seconds between saves; more where a save takes more than a twentieth of them.

    Raises:
        UserError: pictures without captions, no layer that the targets name, five steps in a row
            without a finite loss, or a state that is not there, or of something else.
        Interrupted: by Ctrl-C or SIGTERM, after saving.
    """
    network, names = model.network, model.diffusers_places()
    where = next(network.parameters()).device
    kind, bad, begun = device.dtype(precision, where), 0, 0
    if not resume and (out / STATE).exists():
        raise UserError(
            f"{out} already holds a fine-tuning; add --resume to go on, or take another --out"
        )
    how = {k: v for k, v in asdict(tuning).items() if k not in ("steps", "recompute")}
    facts = {
        "tuning": {**how, "targets": list(tuning.targets)},
        "pictures": [one.fingerprint for one in ([data] if isinstance(data, Dataset) else data)],
        "checkpoint": name,
        "precision": next(k for k, v in device.FORMATS.items() if v == kind),
    }
    cache = Cache(out, model, data, kind, name)
    learning = _let_learn(network, tuning)
    rate = tuning.rate or (1e-5 if tuning.rank is None else 1e-4)
    optimizer = AdamW(learning.values(), lr=rate, weight_decay=0.01)
    if resume:
        begun = _restore(out, facts, learning, optimizer)
    network.train()
    network.recompute = tuning.recompute  # type: ignore[assignment]
    saved_at, took = time.monotonic(), 0.0
    lines = Log(out, "finetune", quiet=True, resumed_at=begun)
    with closing(lines), signals.caught() as asked:
        for step in range(begun, tuning.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / (tuning.warm_up + 1))
            with device.autocast(kind, where):
                loss = _loss(model, cache, tuning, step, where)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(learning.values(), 1.0)
            told = float(loss.detach())
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
            lines.write({"step": step + 1, "loss": told})
            now = time.monotonic()
            due = now - saved_at > max(save_every, 20 * took) or step + 1 == tuning.steps
            if (due or asked.is_set()) and not bad:
                _save_state(out, {**facts, "step": step + 1}, learning, optimizer)
                saved_at = time.monotonic()
                took = saved_at - now
            if asked.is_set():
                raise Interrupted(
                    f"stopped at step {step + 1}; the state is saved in {out}; add --resume to go "
                    "on"
                )
            yield step + 1, told
    network.eval()
    if tuning.rank is not None:
        write_lora(out / LORA_FILE, network, names, model.lora_prefix)


def _save_state(
    out: Path, facts: Mapping[str, Any], learning: Mapping[str, Tensor], optimizer: AdamW
) -> None:
    """Write what learns and the optimizer's state, all or nothing."""
    tensors: dict[str, Tensor] = {}
    state = {
        "learning": checkpoint.flatten("learning", dict(learning), tensors),
        "optimizer": checkpoint.flatten("optimizer", optimizer.state_dict(), tensors),
    }
    checkpoint.write(out / STATE, tensors, {**facts, "state": state})


def _restore(
    out: Path, facts: Mapping[str, Any], learning: Mapping[str, Tensor], optimizer: AdamW
) -> int:
    """Take up the state in a folder; return how many steps it has gone."""
    tensors, found = read_state(out)
    for key, value in facts.items():
        if found[key] != value:
            raise UserError(
                f"{out} was begun with another {key}: it is {value} now and was {found[key]}; "
                "resume with the same, or take another --out"
            )
    state = {k: checkpoint.unflatten(rest, tensors) for k, rest in found["state"].items()}
    with torch.no_grad():
        for name, value in state["learning"].items():
            learning[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return int(found["step"])


def read_state(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and facts of a fine-tuning's state; raises UserError if there is none."""
    if not (out / STATE).exists():
        raise UserError(f"there is nothing to resume in {out}; leave out --resume")
    return checkpoint.read(out / STATE)


def _let_learn(network: nn.Module, tuning: Tuning) -> dict[str, Tensor]:
    """Let a LoRA's factors learn, or all weights; return what learns by name, in float32."""
    if tuning.rank is None:
        for parameter in network.parameters():  # a copy: what the file holds is not written to
            parameter.data = parameter.data.float().clone()
        return {name: each.requires_grad_() for name, each in network.named_parameters()}
    network.requires_grad_(True)
    layers = lora.fitting(network, tuning.rank, tuning.targets)
    if not layers:
        raise UserError(
            f"no layer of this network is named {', '.join(tuning.targets)} and larger than "
            f"factors of rank {tuning.rank}"
        )
    torch.manual_seed(tuning.seed)
    lora.attach(network, layers, tuning.rank, tuning.scale)
    factors = {name: part.float() for name, _, part in lora.factors(network)}
    network.requires_grad_(False)
    return {
        f"{name}.{side}": getattr(part, side).requires_grad_()
        for name, part in factors.items()
        for side in ("down", "up")
    }


def _loss(model: Tunable, cache: Cache, tuning: Tuning, step: int, where: torch.device) -> Tensor:
    """Return the mean loss of the pictures of this step of the training order."""
    first = (tuning.seed << 32) + step * tuning.batch
    rng = Rng(range(first, first + tuning.batch), where)
    of, place = turn([len(texts) for texts in cache.texts], tuning.batch, tuning.seed, step)
    texts = cache.texts[of]
    pictures = order(len(texts), tuning.seed, place, tuning.batch)
    kept = (rng.uniform(1)[:, 0] >= tuning.dropout).tolist()
    captions = [texts[i] if keep else "" for i, keep in zip(pictures, kept, strict=True)]
    mean, deviation = (each.to(where) for each in cache.latents(pictures, of))
    x0 = mean + deviation * rng.normal(*mean.shape[1:])
    told = cache.embedded(captions)
    moved = {name: None if each is None else each.to(where) for name, each in vars(told).items()}
    return model.loss(x0, Embedded(**moved), rng).mean()


def tune(
    path: str | Path,
    source: str | Path,
    out: str | Path,
    tuning: Tuning,
    *,
    size: int | None = None,
    buckets: bool = False,
    device_name: str | None = None,
    precision: str = "auto",
    parts: str | Path | None = None,
    resume: bool = False,
) -> Iterator[tuple[int, float]]:
    """Fine-tune a checkpoint on captioned pictures; yields step and loss.

    What is learned is written into `out` at last: a LoRA, or, of all weights, a copy of the folder
    with them in the place of its own.

    Args:
        path: of the checkpoint, as `load.load` takes it; a folder, if all weights learn.
        source: the pictures, as `data.load` takes them.
        out: a folder.
        tuning: how.
        size: side of the pictures; the checkpoint's own if None.
        buckets: keep pictures near their proportions, in sizes of about that area
            (`data.buckets`); else squares are cut out of them.
        device_name: as of `load.load`.
        precision: of the computation; what learns is float32.
        parts: as of `load.load`.
        resume: go on from the state in `out`, in the number format that it was begun in.

    Raises:
        UserError: as `load.load`, `data.load` and `finetune`.
        Interrupted: as `finetune`.
    """
    path, out, whole = Path(path), Path(out), tuning.rank is None
    if out.is_file():
        raise UserError(f"{out} is a file; expected a folder for the result")
    if resume:
        precision = read_state(out)[1]["precision"]
    if whole and not path.is_dir():
        raise UserError(
            f"{path} is one file; all weights can be fine-tuned of a diffusers folder, and a LoRA "
            "of either"
        )
    kept, there = path.resolve(), out.resolve()
    if whole and (kept == there or kept in there.parents):
        raise UserError(f"{out} is the checkpoint itself, or in it; take another --out")
    if whole and not resume and (out / "model_index.json").exists():
        raise UserError(f"{out} holds a checkpoint, which would be overwritten; take another --out")
    told = "fp32" if whole else precision
    opened = load.load(path, device_name, precision=told, parts=parts, learns=True)
    model: Tunable = TunableUNet(opened) if isinstance(opened, StableDiffusion) else opened
    side, multiple = size or opened.size, opened.multiple
    if buckets:
        pictures = data_sets.load_buckets(source, side, multiple=multiple, channels=3)
    else:
        pictures = [data_sets.load(source, size=side, multiple=multiple, channels=3)]
    out.mkdir(parents=True, exist_ok=True)
    yield from finetune(model, pictures, out, tuning, precision, str(path.resolve()), resume)
    if whole:
        part = "unet" if isinstance(opened, StableDiffusion) else "transformer"
        shutil.copytree(
            path, out, dirs_exist_ok=True, ignore=lambda _, names: [n for n in names if n == part]
        )
        config = files.read_json(path / part / "config.json")
        write_network(out / part, model, config)


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
        at = f"{prefix}.{module}"
        down, up = part.down.detach(), part.scale * part.up.detach()
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
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checkpoint.put(path, plain, {"format": "pt"})
