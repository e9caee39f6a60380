"""Flows: how long drawing takes beside encoding, which is half of what a likelihood costs.

Forward is pictures to latents with the log-determinant, inverse is latents to pictures; they take
turns in one process, the first rounds are not counted, the median round is shown.

    python benchmarks/flow_inverse.py
"""

import argparse
import platform
import statistics
import time

import torch

from trilemma import device, recipe

WHERE = torch.device("cpu")
FACTS = {"shape": [1, 28, 28], "channels": 1, "size": 28, "classes": 10, "attributes": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    chosen = parser.parse_args()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{chosen.precision}, batches of {chosen.batch} at 1x28x28, median of {chosen.rounds}\n"
    )
    print("| recipe | forward, ms | inverse, ms | inverse / forward |\n|---|---|---|---|")
    dtype = device.dtype(chosen.precision, WHERE)
    for name in ("glow", "realnvp"):
        torch.manual_seed(0)
        model = recipe.build(recipe.resolve(recipe.load(name), {**FACTS, "count": 1})["model"])
        device.prepare(model.eval(), WHERE, dtype)
        latent = torch.randn(chosen.batch, model.dims)
        seconds: dict[str, list[float]] = {"forward": [], "inverse": []}
        with torch.inference_mode(), device.autocast(dtype, WHERE):
            image = model.decode(latent)
            for _ in range(chosen.warmup + chosen.rounds):
                start = time.perf_counter()
                model.network.encode(image)
                middle = time.perf_counter()
                model.network(latent)
                seconds["forward"].append(middle - start)
                seconds["inverse"].append(time.perf_counter() - middle)
        forward, inverse = (
            1000 * statistics.median(each[chosen.warmup :]) for each in seconds.values()
        )
        print(f"| {name} | {forward:.1f} | {inverse:.1f} | {inverse / forward:.2f} |")


if __name__ == "__main__":
    main()
