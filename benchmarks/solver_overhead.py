"""The share of sampling time that a solver spends outside the network.

A batch is drawn by each solver with about the same number of network calls. The calls are timed
where they happen, the rest (the solver, the schedule, fresh noise, clipping, conversions) is the
overhead. Rounds go through all solvers in turn in one process; the first is not counted, the median
round is shown. On a GPU each call is waited for, so its queue hides nothing.

    python benchmarks/solver_overhead.py                             # quick-diffusion at 28 pixels
    python benchmarks/solver_overhead.py --recipe ddpm --size 32 --channels 3 --batch 16 --calls 10
"""

import argparse
import statistics
import time

import torch

from trilemma import device, recipe
from trilemma.batch import Condition, Rng
from trilemma.diffusion.solvers import SOLVERS


class Clock:
    """Adds up the seconds that a module's calls take."""

    def __init__(self, module: torch.nn.Module, where: torch.device) -> None:
        self.seconds, self.calls, self.where = 0.0, 0, where
        module.register_forward_pre_hook(self.start)
        module.register_forward_hook(self.stop)

    def now(self) -> float:
        if self.where.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, *_: object) -> None:
        self.begun = self.now()

    def stop(self, *_: object) -> None:
        self.seconds += self.now() - self.begun
        self.calls += 1

    def reset(self) -> None:
        self.seconds, self.calls = 0.0, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="quick-diffusion")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--device", help="the fastest there is if left out")
    parser.add_argument("--solvers", nargs="*", default=list(SOLVERS))
    args = parser.parse_args()

    where = device.pick(args.device)
    dtype = device.dtype(args.precision, where)
    shape = [args.channels, args.size, args.size]
    facts = {"shape": shape, "channels": shape[0], "size": args.size, "attributes": 0, "count": 1}
    torch.manual_seed(0)
    spec = recipe.resolve(recipe.load(args.recipe), {**facts, "classes": 10})
    model = recipe.build(spec["model"]).requires_grad_(False).eval()
    device.prepare(model, where, dtype)
    clock = Clock(model.network, where)

    def draw(name: str) -> tuple[float, float, int]:
        """Return the seconds of a batch, those inside the network, and its calls."""
        solver = SOLVERS[name]
        steps = max(1, (args.calls - solver.extra) // solver.calls)
        label = torch.arange(args.batch, device=where) % 10
        rng = Rng(range(args.batch), where)
        clock.reset()
        start = clock.now()
        with torch.inference_mode(), device.autocast(dtype, where):
            model.sample(Condition(args.batch, label), rng, solver=name, steps=steps)
        return clock.now() - start, clock.seconds, clock.calls

    took: dict[str, list[tuple[float, float, int]]] = {name: [] for name in args.solvers}
    for round in range(-1, args.rounds):
        for name in args.solvers:
            found = draw(name)
            if round >= 0:
                took[name].append(found)
    print(
        f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, {dtype}; "
        f"{args.recipe}, batches of {args.batch} at {'x'.join(map(str, shape))}, median of "
        f"{args.rounds} rounds\n"
    )
    print("| solver | calls | seconds | outside the network, ms a call | share |")
    print("|---|---|---|---|---|")
    for name, rounds in took.items():
        share = statistics.median(1 - inside / whole for whole, inside, _ in rounds)
        seconds = statistics.median(whole for whole, _, _ in rounds)
        calls = rounds[0][2]
        print(
            f"| {name} | {calls} | {seconds:.3f} | {1000 * share * seconds / calls:.3f} | "
            f"{share:.1%} |"
        )


if __name__ == "__main__":
    main()
