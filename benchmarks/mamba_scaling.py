"""Time and memory of Mamba and DiT as the number of tokens grows.

Networks of about equal parameters, depth and width, each in a process of its own for each number of
tokens, so that its peak memory is its own. Pictures are of patch-sized steps: 16 x 16 to 128 x 128
tokens. A training step is the network's output squared and its gradient, one picture, the best of a
few rounds.

    python benchmarks/mamba_scaling.py
    python benchmarks/mamba_scaling.py --sides 16 32 64 --width 256 --depth 4
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from torch import nn

from trilemma import device
from trilemma.metrics.speed import peak_memory
from trilemma.networks.dit import DiT
from trilemma.networks.mamba import Mamba

PATCH = 2


def build(name: str, side: int, width: int, depth: int) -> nn.Module:
    pixels = PATCH * side
    if name == "DiT":  # a DiT block has about as many parameters as two of Mamba's
        return DiT(4, 4, pixels, PATCH, width, depth, width // 64)
    return Mamba(4, 4, pixels, PATCH, width, 2 * depth, state=32)


def measure(name: str, side: int, width: int, depth: int, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    where = torch.device("cpu")
    network, dtype = build(name, side, width, depth), device.dtype("auto", where)
    device.prepare(network, where, dtype)
    x, at = torch.randn(1, 4, PATCH * side, PATCH * side), torch.rand(1)

    def train() -> None:
        with device.autocast(dtype, where):
            out = network(x, at)
        out.float().square().mean().backward()

    def draw() -> None:
        with torch.inference_mode(), device.autocast(dtype, where):
            network(x, at)

    told: dict[str, float] = {"parameters": sum(p.numel() for p in network.parameters())}
    for kind, work in (("draw", draw), ("train", train)):
        told[f"{kind}_memory"] = peak_memory(work, where) or 0
        best = float("inf")
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - start)
        told[kind] = best
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, side = args.one
        print(json.dumps(measure(name, int(side), args.width, args.depth, args.rounds)))
        return
    print(
        "| tokens | network | parameters | drawing, ms | MiB | training, ms | MiB |\n"
        "|---|---|---|---|---|---|---|"
    )
    for side in args.sides:
        for name in ("DiT", "Mamba"):
            command = [sys.executable, __file__, "--one", name, f"{side}"]
            command += ["--width", f"{args.width}", "--depth", f"{args.depth}"]
            command += ["--rounds", f"{args.rounds}"]
            told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            cells = [f"{side**2}", name, f"{told['parameters']:,}"]
            for kind in ("draw", "train"):
                memory = told[f"{kind}_memory"] / 2**20
                cells += [f"{1000 * told[kind]:.0f}", f"{memory:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
