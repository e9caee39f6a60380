"""Speed of training and denoising with the DDPM CIFAR-10 U-Net: ours against diffusers'.

Both sides do the same work on the same batch: a training step is the noise-prediction error of
Ho et al. 2020, its gradient, clipping to norm 1 and AdamW; denoising is one call of the network
without gradients. The sides take turns, round by round, in one process; the first rounds, which
compile and warm up, are not counted; the median round is shown.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/unet_speed.py                    # each side at its defaults
    python benchmarks/unet_speed.py --compiled         # and both sides tuned and compiled
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from trilemma import device
from trilemma.networks.unet import UNet
from trilemma.optim import OPTIMIZERS
from trilemma.profile import flops

WHERE = torch.device("cpu")


@dataclass
class Side:
    """One contestant: a network, the number format it multiplies in, its optimizer."""

    name: str
    network: nn.Module
    call: Callable[[Tensor, Tensor], Tensor]
    dtype: torch.dtype
    optimizer: torch.optim.Optimizer

    def train(self, x: Tensor, time: Tensor, noise: Tensor) -> None:
        with device.autocast(self.dtype, WHERE):
            output = self.call(x, time)
        F.mse_loss(output.float(), noise).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def denoise(self, x: Tensor, time: Tensor, noise: Tensor) -> None:
        with device.autocast(self.dtype, WHERE):
            self.call(x, time)


def ours(compiled: bool) -> Side:
    network = UNet(in_channels=3, out_channels=3)
    dtype = device.dtype("auto", WHERE)
    device.prepare(network, WHERE, dtype)
    device.maybe_compile(network, "on" if compiled else "auto", WHERE)
    optimizer = OPTIMIZERS["adamw"](network.parameters(), lr=2e-4)
    name = "ours, compiled" if compiled else "ours"
    return Side(name, network, network, dtype, optimizer)


def theirs(name: str, head: int, tuned: bool = False) -> Side:
    network = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=head,
    )
    if tuned:
        network.to(memory_format=torch.channels_last)
        network.compile()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4)
    dtype = torch.bfloat16 if tuned else torch.float32
    return Side(name, network, lambda x, t: network(x, 1000 * t).sample, dtype, optimizer)


def contestants(compiled: bool) -> list[Side]:
    sides = [
        theirs("diffusers, its defaults (heads of 8 channels)", head=8),
        theirs("diffusers, attention as in DDPM (one head)", head=256),
        ours(compiled=False),
    ]
    if compiled:
        sides += [theirs("diffusers, bf16, channels last, compiled", head=8, tuned=True)]
        sides += [ours(compiled=True)]
    return sides


def rate(work: Callable[[], object], operations: float, seconds: float = 2.0) -> float:
    """Return the best rate of `work`, in operations per second."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return operations / best


def matrix_rate(dtype: torch.dtype) -> float:
    """Return the processor's rate of matrix products, of the shape that a 3x3 convolution has."""
    a, b = torch.randn(4096, 2304).to(dtype), torch.randn(256, 2304).to(dtype)
    return rate(lambda: a @ b.T, 2 * 4096 * 2304 * 256)


def convolution_rate(dtype: torch.dtype) -> float:
    """Return the rate of the network's commonest convolution, 256 channels at 16x16."""
    x = torch.randn(16, 256, 16, 16).to(dtype).to(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    return rate(lambda: F.conv2d(x, w, padding=1), 2 * 16 * 16 * 16 * 256 * 256 * 9)


def compare(
    sides: Sequence[Any], batch: Sequence[Tensor], rounds: int, warmup: int, where: torch.device
) -> dict[tuple[str, str], float]:
    """Print how fast each side trains and denoises, by turns; return the median seconds."""
    took: dict[tuple[str, str], list[float]] = {}
    for kind in ("train", "denoise"):
        for round in range(-warmup, rounds):
            for side in sides:
                device.synchronize(where)
                start = time.perf_counter()
                getattr(side, kind)(*batch)
                device.synchronize(where)
                if round >= 0:
                    took.setdefault((kind, side.name), []).append(time.perf_counter() - start)
    median = {key: statistics.median(value) for key, value in took.items()}

    print("\n| | training, images/s | ratio | denoising, images/s | ratio |")
    print("|---|---|---|---|---|")
    for side in sides:
        cells = [side.name]
        for kind in ("train", "denoise"):
            seconds = median[kind, side.name]
            ratio = median[kind, sides[0].name] / seconds
            cells += [f"{len(batch[0]) / seconds:.1f}", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |")
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds not counted")
    parser.add_argument("--compiled", action="store_true", help="also the compiled sides: minutes")
    args = parser.parse_args()

    torch.manual_seed(0)
    sides = contestants(args.compiled)
    sizes = {sum(p.numel() for p in side.network.parameters()) for side in sides}
    assert len(sizes) == 1, f"the networks differ in size: {sizes}"
    shape = (args.batch, 3, 32, 32)
    batch = torch.randn(shape), torch.rand(args.batch), torch.randn(shape)
    print(
        f"{device.name(WHERE)}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}; {sizes.pop() / 1e6:.1f} M parameters, "
        f"batch {args.batch} of 3x32x32, median of {args.rounds} rounds"
    )
    median = compare(sides, batch, args.rounds, args.warmup, WHERE)

    print("\n| bfloat16 | billion operations per second |")
    print("|---|---|")
    print(f"| matrix product 4096x2304x256 | {matrix_rate(torch.bfloat16) / 1e9:.0f} |")
    peak = convolution_rate(torch.bfloat16)
    print(f"| 3x3 convolution, 256 channels at 16x16 | {peak / 1e9:.0f} |")
    own = sides[2]
    for kind, word in (("train", "training"), ("denoise", "denoising")):
        count = flops(partial(getattr(own, kind), *batch))
        speed = count / median[kind, own.name]
        print(
            f"| ours, {word}: {count / 1e9:.0f} billion operations a batch | {speed / 1e9:.0f}, "
            f"{speed / peak:.0%} of the convolution |"
        )


if __name__ == "__main__":
    main()
