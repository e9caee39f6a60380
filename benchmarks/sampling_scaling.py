"""What drawing costs as the steps and the pictures grow: time in proportion, memory not at all.

A trained diffusion model draws at several numbers of steps and of pictures, in batches of one size
and with guidance, whose two evaluations are one call of twice the pictures. Each combination is
drawn by turns; the median round is shown, as milliseconds for a picture and a step, which should be
the same everywhere, and the memory taken at the peak beyond what was in use before.

    python benchmarks/sampling_scaling.py RUN
"""

import argparse
import statistics
import time
from collections import defaultdict

import torch

import trilemma
from trilemma.memory import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="of a diffusion model")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--pictures", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    trained = trilemma.load(given.run)
    where = trained.where
    ways = [(n, steps) for n in given.pictures for steps in given.steps]
    times, memory = defaultdict(list), {}
    trained.sample(given.batch, steps=given.steps[0], batch=given.batch)  # warms up
    for _ in range(given.rounds):
        for n, steps in ways:

            def draw(n: int = n, steps: int = steps) -> None:
                for _ in trained.batches(n, steps=steps, batch=given.batch):
                    pass

            start = time.perf_counter()
            taken = peak_memory(draw, where)
            times[n, steps].append(time.perf_counter() - start)
            memory[n, steps] = max(taken or 0, memory.get((n, steps), 0))
    print(
        f"{trained.name}, batches of {given.batch}, median of {given.rounds} rounds; {where}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| pictures | steps | seconds | ms a picture and step | MiB at the peak |")
    print("|---|---|---|---|---|")
    for n, steps in ways:
        seconds = statistics.median(times[n, steps])
        each = 1000 * seconds / n / steps
        print(f"| {n} | {steps} | {seconds:.2f} | {each:.3f} | {memory[n, steps] / 2**20:.0f} |")


if __name__ == "__main__":
    main()
