"""Claim 12: time and memory of Mamba grow with the number of tokens, those of DiT with its square.

Gu, Dao (2023), "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"; Hu et al.
(2024), "ZigMa: A DiT-style Zigzag Mamba Diffusion Model", on pictures.

Networks of about equal parameters, depth and width, each in a process of its own for each number of
tokens, so that its peak memory is its own. Pictures are of patch-sized steps: 16 x 16 to 128 x 128
tokens. A training step is the network's output squared and its gradient, one picture, the best of a
few rounds, or of as many as begin within five seconds. Time is processor time: that of several
threads adds up, so give it one. What was measured is kept under `runs/claims`, and a script that
was stopped goes on.

    OMP_NUM_THREADS=1 python benchmarks/mamba_scaling.py
    python benchmarks/mamba_scaling.py --sides 16 32 64 --width 256 --depth 4

Refuted if from the last but one number of tokens to the last (four times as many) Mamba's time or
memory grows more than fivefold, or DiT's time less than eightfold; or if Mamba is behind DiT still
at the largest. Attention that keeps no matrix of weights is linear in memory, too: forwards DiT's
may be."""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from torch import nn

from trilemma import device
from trilemma.memory import peak_memory
from trilemma.networks.dit import DiT
from trilemma.networks.mamba import Mamba

matplotlib.use("Agg")

PATCH = 2
PATIENCE = 5.0  # seconds after which no other round begins
MEASURES = {  # name -> (what the table calls it, its unit)
    "draw": ("drawing, ms", 1e-3),
    "draw_memory": ("MiB", 2**20),
    "train": ("training, ms", 1e-3),
    "train_memory": ("MiB", 2**20),
}
KEPT = Path("runs/claims/mamba_scaling/found.json")


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
        took: list[float] = []
        while len(took) < rounds and sum(took) < PATIENCE:
            start = time.process_time()
            work()
            took.append(time.process_time() - start)
        told[kind] = min(took)
    return told


def draw(path: Path, found: dict[str, dict[str, float]]) -> None:
    """Draw time and memory over the number of tokens, both in logarithms."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for kind, line in (("draw", "o--"), ("train", "o-")):
        for color, name in enumerate(("DiT", "Mamba")):
            mine = {int(key.split()[1]): told for key, told in found.items() if name in key}
            tokens = [side**2 for side in mine]
            label = f"{name}, {'one call' if kind == 'draw' else 'training step'}"
            times = [1000 * told[kind] for told in mine.values()]
            axes[0].plot(tokens, times, f"C{color}{line}", label=label)
            memory = [told[f"{kind}_memory"] / 2**20 for told in mine.values()]
            axes[1].plot(tokens, memory, f"C{color}{line}")
    axes[0].set(xlabel="tokens", ylabel="ms of processor time", xscale="log", yscale="log")
    axes[1].set(xlabel="tokens", ylabel="MiB at the peak", xscale="log", yscale="log")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of the table; in brackets the power of the tokens by which each grew."""
    titles = " | ".join(title for title, _ in MEASURES.values())
    lines = [f"| tokens | network | parameters | {titles} |", "|---|---|---|---|---|---|---|"]
    before: dict[str, tuple[int, dict[str, float]]] = {}
    for key, told in found.items():
        name, side = key.split()
        tokens = int(side) ** 2
        cells = [f"{tokens:,}", name, f"{told['parameters']:,}"]
        for kind, (_, unit) in MEASURES.items():
            cells.append(f"{told[kind] / unit:.0f}")
            if name in before and told[kind] and before[name][1][kind]:
                fewer, less = before[name]
                power = math.log(told[kind] / less[kind]) / math.log(tokens / fewer)
                cells[-1] += f" ({power:.2f})"
        before[name] = tokens, told
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/claims"))
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        name, side = args.one
        print(json.dumps(measure(name, int(side), args.width, args.depth, args.rounds)))
        return
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    asked = {"width": args.width, "depth": args.depth, "rounds": args.rounds}
    before = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    kept = before["found"] if before.get("options") == asked else {}
    found: dict[str, dict[str, float]] = {}
    for side in args.sides:
        for name in ("DiT", "Mamba"):
            command = [sys.executable, __file__, "--one", name, f"{side}"]
            command += [f"--{key}={value}" for key, value in asked.items()]
            key = f"{name} {side}"
            if key not in kept:
                print(f"{name}, {side**2} tokens", file=sys.stderr, flush=True)
                run = subprocess.run(command, check=True, capture_output=True)
                kept[key] = json.loads(run.stdout)
                KEPT.write_text(json.dumps({"options": asked, "found": kept}))
            found[key] = kept[key]
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "mamba_scaling.png", found)
    whole = json.dumps({"options": asked, "found": found}, indent=1)
    (args.out / "mamba_scaling.json").write_text(whole + "\n")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("\n".join(table(found)))
    print("\nIn brackets the power of the number of tokens by which each grew from the row before.")


if __name__ == "__main__":
    main()
