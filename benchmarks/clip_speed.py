"""Speed of training CLIP on small pictures: ours against OpenCLIP's model in a plain loop.

Both sides have towers of the same sizes, see the same pictures and captions of the emoji, and take
the same step: contrastive loss, gradient, AdamW. OpenCLIP's runs at its defaults, in float32 and
also in bfloat16, its captions split into tokens beforehand; ours runs as `trilemma train` runs it,
and splits them in each step. Its texts are as long as the longest of the batch; once more with all
of them at the full context, as OpenCLIP's are, to tell what of the gain that is. The sides take
turns, round by round, in one process; the first rounds are not counted; the median round is shown.

    python -m pip install open-clip-torch
    python benchmarks/clip_speed.py
    python benchmarks/clip_speed.py --device cuda --batch 512 --width 512 --depth 12 --size 64
"""

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from trilemma import data, device
from trilemma.batch import Batch
from trilemma.models.clip import CLIP
from trilemma.networks.text import TextTransformer
from trilemma.networks.vit import VisionTransformer
from trilemma.optim import OPTIMIZERS
from trilemma.tokenizer import Tokenizer

CONTEXT = 77
UNUSED = ("torchvision", "torchvision.ops", "torchvision.ops.misc", "wcwidth")


@dataclass
class Side:
    """One contestant: a model, its loss on a batch, its optimizer."""

    name: str
    model: nn.Module
    loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer

    def step(self, batch: Batch) -> None:
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def ours(args: argparse.Namespace, full: bool) -> Side:
    where = torch.device(args.device)
    sizes = args.width, args.depth, args.heads
    model = CLIP(
        VisionTransformer((3, args.size, args.size), args.patch, *sizes),
        TextTransformer(*sizes, context=CONTEXT),
        dim=args.width,
    ).train()
    if full:
        model.tokens = partial(Tokenizer(CONTEXT), full=True)
    dtype = device.dtype("auto", where)
    device.prepare(model, where, dtype)

    def loss(batch: Batch) -> Tensor:
        with device.autocast(dtype, where):
            return model.loss(batch)["loss"]

    name = f"ours ({dtype}{f', {CONTEXT} tokens' if full else ''})".replace("torch.", "")
    return Side(name, model, loss, OPTIMIZERS["adamw"](model.parameters(), lr=1e-4))


def theirs(args: argparse.Namespace, dtype: torch.dtype) -> Side:
    where = torch.device(args.device)
    clip, losses = open_clip("model"), open_clip("loss")
    sizes = {"width": args.width, "layers": args.depth}
    head = args.width // args.heads
    model = clip.CLIP(
        args.width,
        clip.CLIPVisionCfg(image_size=args.size, patch_size=args.patch, head_width=head, **sizes),
        clip.CLIPTextCfg(context_length=CONTEXT, heads=args.heads, **sizes),
    ).to(where)
    contrast = losses.ClipLoss()
    tokens = open_clip("tokenizer").SimpleTokenizer()
    known: dict[str, Tensor] = {}

    def loss(batch: Batch) -> Tensor:
        texts = batch.condition.text or []
        for text in texts:
            if text not in known:  # before the rounds that count: they repeat the first batches
                known[text] = tokens([text])[0]
        ids = torch.stack([known[text] for text in texts]).to(where)
        with device.autocast(dtype, where):
            return contrast(*model(batch.image, ids)[:3])

    name = f"open_clip ({dtype})".replace("torch.", "")
    return Side(name, model, loss, torch.optim.AdamW(model.parameters(), lr=1e-4))


def open_clip(module: str) -> ModuleType:
    """Import a module of open_clip; where torchvision is not there, without what goes unused."""
    if importlib.util.find_spec("torchvision") is not None or "open_clip" in sys.modules:
        return importlib.import_module(f"open_clip.{module}")
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        sys.exit("open_clip is not there: python -m pip install open-clip-torch")
    package = sys.modules["open_clip"] = ModuleType("open_clip")
    package.__path__ = [str(Path(found.origin).parent)]
    for name in UNUSED:
        stub = sys.modules[name] = ModuleType(name)
        stub.__dict__.update(FrozenBatchNorm2d=nn.BatchNorm2d, wcwidth=len, wcswidth=len)
    try:
        importlib.import_module("open_clip.utils")
        importlib.import_module("open_clip.tokenizer")
    finally:
        for name in UNUSED:
            del sys.modules[name]
    return importlib.import_module(f"open_clip.{module}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()

    where = torch.device(args.device)
    sides = [theirs(args, torch.float32), theirs(args, torch.bfloat16)]
    sides += [ours(args, full=True), ours(args, full=False)]
    stream = data.batches(data.load("emoji", size=args.size), args.batch, seed=0)
    some = [next(stream).to(where) for _ in range(2)]
    counts = ", ".join(f"{sum(p.numel() for p in s.model.parameters()) / 1e6:.1f}" for s in sides)
    print(
        f"{device.name(where)}, {torch.get_num_threads()} threads; torch {torch.__version__}; "
        f"{counts} M parameters; batch {args.batch} of 3x{args.size}x{args.size}, "
        f"patch {args.patch}, width {args.width}, depth {args.depth}; "
        f"median of {args.rounds} rounds"
    )
    took: dict[str, list[float]] = {side.name: [] for side in sides}
    for round in range(-args.warmup, args.rounds):
        for side in sides:
            device.synchronize(where)
            start = time.perf_counter()
            side.step(some[round % len(some)])
            device.synchronize(where)
            if round >= 0:
                took[side.name].append(time.perf_counter() - start)
    print("\n| | training, images/s | ratio |")
    print("|---|---|---|")
    base = statistics.median(took[sides[0].name])
    for name, seconds in took.items():
        middle = statistics.median(seconds)
        print(f"| {name} | {args.batch / middle:.1f} | {base / middle:.2f} |")
    ratio = base / middle
    print(f"\n{ratio:.2f} times {sides[0].name}; target 1.3: {'yes' if ratio >= 1.3 else 'NO'}")


if __name__ == "__main__":
    main()
