"""Drawing from a causal transformer with its cache of keys and values, and without.

Both sides draw the same tokens from the same network by the same random numbers: one keeps keys and
values and computes the next position alone, the other computes all positions anew for each token.
They take turns, round by round, in one process; the first round warms up and is not counted. Then
the cost of a token along the sequence, with the cache.

    python benchmarks/transformer_cache.py                  # 1,024 tokens: 32 x 32 grey pixels
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from trilemma.batch import Rng
from trilemma.codecs import PixelTokens
from trilemma.models.autoregressive import PixelAutoregressive
from trilemma.models.mixture import draw
from trilemma.networks.transformer import Cache, CausalTransformer

PARTS = 8  # of the sequence, whose costs are compared


def tokens(model: PixelAutoregressive, cached: bool, batch: int) -> tuple[Tensor, list[float]]:
    """Draw a batch of sequences; return them and the seconds that each position took."""
    length, label = model.codec.length, torch.zeros(batch, 0)
    uniform, cache = Rng(range(batch)).uniform(length), Cache(length) if cached else None
    drawn, seconds = torch.zeros(batch, length, dtype=torch.int64), []
    for i in range(length):
        start = time.perf_counter()
        logits = model.logits(drawn[:, :i], label, cache)[:, -1]
        drawn[:, i] = draw(logits, uniform[:, i], temperature=1.0)
        seconds.append(time.perf_counter() - start)
    return drawn, seconds


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=32, help="of the picture; side^2 tokens")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds")
    args = parser.parse_args()

    torch.manual_seed(0)
    network = CausalTransformer(args.width, args.layers)
    model = PixelAutoregressive(PixelTokens((1, args.side, args.side)), network).eval()
    took: dict[bool, list[float]] = {True: [], False: []}
    along: list[list[float]] = []
    for round in range(-1, args.rounds):
        drawn = {}
        for cached in (True, False):
            drawn[cached], seconds = tokens(model, cached, args.batch)
            if round >= 0:
                took[cached].append(sum(seconds))
            if round >= 0 and cached:
                along.append(seconds)
        alike = (drawn[True] == drawn[False]).float().mean().item()
        assert alike > 0.99, f"the sides draw different tokens: only {alike:.0%} are the same"
    with_it, without = (statistics.median(took[cached]) for cached in (True, False))
    length = model.codec.length
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; width {args.width}, "
        f"{args.layers} layers, {length} tokens, batch {args.batch}, median of {args.rounds} rounds"
    )
    print("\n| | seconds for a batch | tokens/s | ratio |\n|---|---|---|---|")
    for name, seconds in (("without cache", without), ("with cache", with_it)):
        rate = args.batch * length / seconds
        print(f"| {name} | {seconds:.2f} | {rate:.0f} | {without / seconds:.1f} |")
    print("\n| tokens | microseconds a step, with cache |\n|---|---|")
    for part in range(PARTS):
        here = slice(part * length // PARTS, (part + 1) * length // PARTS)
        middle = statistics.median(s for seconds in along for s in seconds[here])
        print(f"| {here.start} to {here.stop - 1} | {1e6 * middle:.0f} |")


if __name__ == "__main__":
    main()
