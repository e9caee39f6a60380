"""Speed of training and denoising with DiT-S/2 on 32 x 32 x 4 latents: ours against diffusers'.

Both sides do the same work on the same batch: a training step is the noise-prediction error, its
gradient, clipping to norm 1 and AdamW; denoising is one call of the network without gradients. The
sides take turns, round by round, in one process; the first rounds, which warm up, are not counted;
the median round is shown.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/transformer_speed.py              # on the CPU
    python benchmarks/transformer_speed.py --device cuda --compiled --width 768 --heads 12
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from unet_speed import compare

from trilemma import device
from trilemma.networks.dit import DiT
from trilemma.networks.layers import Embedded
from trilemma.optim import OPTIMIZERS
from trilemma.profile import flops

CLASSES = 10


@dataclass
class Side:
    """One contestant: a network, the number format it multiplies in, its optimizer."""

    name: str
    network: nn.Module
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    dtype: torch.dtype
    where: torch.device
    optimizer: torch.optim.Optimizer

    def train(self, x: Tensor, time: Tensor, label: Tensor, noise: Tensor) -> None:
        with device.autocast(self.dtype, self.where):
            output = self.call(x, time, label)
        F.mse_loss(output.float(), noise).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def denoise(self, x: Tensor, time: Tensor, label: Tensor, noise: Tensor) -> None:
        with device.autocast(self.dtype, self.where):
            self.call(x, time, label)


class Ours(nn.Module):
    """DiT with a vector for each class."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.network = DiT(4, 4, 32, args.patch, args.width, args.depth, args.heads)
        self.table = nn.Embedding(CLASSES + 1, args.width)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return self.network(x, time, Embedded(vector=self.table(label)))


def ours(args: argparse.Namespace, compiled: bool) -> Side:
    where = torch.device(args.device)
    network = Ours(args)
    dtype = device.dtype("auto", where)
    device.prepare(network, where, dtype)
    device.maybe_compile(network, "on" if compiled else "off", where)
    optimizer = OPTIMIZERS["adamw"](network.parameters(), lr=1e-4)
    name = f"ours ({dtype}{', compiled' if compiled else ''})".replace("torch.", "")
    return Side(name, network, network, dtype, where, optimizer)


def theirs(args: argparse.Namespace, dtype: torch.dtype, compiled: bool = False) -> Side:
    where = torch.device(args.device)
    network = DiTTransformer2DModel(
        num_attention_heads=args.heads,
        attention_head_dim=args.width // args.heads,
        in_channels=4,
        out_channels=4,
        num_layers=args.depth,
        sample_size=32,
        patch_size=args.patch,
        num_embeds_ada_norm=CLASSES,
    ).to(where)
    if compiled:
        network.compile()
    name = f"diffusers ({dtype}{', compiled' if compiled else ''})".replace("torch.", "")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def call(x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return network(x, 1000 * time, label).sample

    return Side(name, network, call, dtype, where, optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds not counted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true", help="also the compiled sides: minutes")
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    args = parser.parse_args()

    torch.manual_seed(0)
    where = torch.device(args.device)
    sides = [theirs(args, torch.float32), theirs(args, torch.bfloat16), ours(args, compiled=False)]
    if args.compiled:
        sides += [theirs(args, torch.bfloat16, compiled=True), ours(args, compiled=True)]
    shape = (args.batch, 4, 32, 32)
    batch = [torch.randn(shape), torch.rand(args.batch)]
    batch += [torch.randint(CLASSES, (args.batch,)), torch.randn(shape)]
    batch = [tensor.to(where) for tensor in batch]
    sizes = ", ".join(f"{sum(p.numel() for p in s.network.parameters()) / 1e6:.1f}" for s in sides)
    print(
        f"{device.name(where)}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}; "
        f"{sizes} M parameters (diffusers embeds time and class anew in each block); batch "
        f"{args.batch} of 4x32x32, median of {args.rounds} rounds"
    )
    median = compare(sides, batch, args.rounds, args.warmup, where)

    own = sides[2]
    for kind in ("train", "denoise"):
        count = flops(lambda kind=kind: getattr(own, kind)(*batch))
        speed = count / median[kind, own.name]
        print(f"\nours, {kind}: {count / 1e9:.0f} GFLOPs a batch, {speed / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
