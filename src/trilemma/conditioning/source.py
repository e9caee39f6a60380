"""Another picture as a condition: a small one, a grey one, or one with a hole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Condition, Rng, to_float, to_uint8
from trilemma.conditioning.base import Conditioner
from trilemma.networks.layers import Embedded, check_shape


class Source(Conditioner):
    """A picture to draw from, as channels beside the noisy one.

    In training it is made of the training picture. It is never dropped: guidance is by what else
    is said.

    Args:
        kind: what the source is. "small": the picture shrunk by `factor`; "grey": its luma;
            "masked": the picture with a part hidden (0), and a channel of 1 there, 0 elsewhere.
        shape: (C, H, W) of the pictures.
        factor: how much smaller the small one is.
    """

    guidable = False

    def __init__(self, kind: str, shape: Sequence[int], factor: int = 4) -> None:
        super().__init__()
        channels, height, width = shape
        if kind not in SOURCES:
            raise ValueError(f"source '{kind}' is not known; expected one of {', '.join(SOURCES)}")
        if kind == "grey" and channels == 1:
            raise ValueError("the pictures are grey, and so have no colours to learn")
        if kind == "small" and (height % factor or width % factor):
            raise ValueError(
                f"pictures of {height} x {width} cannot be shrunk by {factor}; both sides must be "
                "multiples of it: choose another --size, or conditioner.factor"
            )
        self.kind, self.factor, self.size = kind, factor, (height, width)
        self.shape = {
            "small": (channels, height // factor, width // factor),
            "grey": (1, height, width),
            "masked": (channels + 1, height, width),
        }[kind]
        """(C, h, w) of a source."""

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed a source (B, C, h, w): `image` (B, C, H, W), enlarged where it is small."""
        source = condition.source
        if image is not None and rng is not None:
            source = SOURCES[self.kind](image, rng, self.factor)
        if source is None:
            raise ValueError(
                f"this model draws from a given picture ({self.kind}): it needs condition.source; "
                "with trilemma edit repair"
            )
        check_shape("sources", source, *self.shape)
        if source.shape[2:] != self.size:
            source = F.interpolate(source.float(), self.size, mode="bicubic").clamp(-1, 1)
        return Embedded(image=source)

    def nothing(self, condition: Condition) -> Embedded:
        """Embed the source all the same: without it the model draws nothing."""
        return self(condition)


def source_of(conditioner: nn.Module) -> Source | None:
    """Return the source that a conditioner reads, if any."""
    return next((part for part in conditioner.modules() if isinstance(part, Source)), None)


def shrink(image: Tensor, factor: int) -> Tensor:
    """Return the low resolution (B, C, H/factor, W/factor) of images (B, C, H, W) in [-1, 1].

    Bicubic with antialiasing, a = -1/2 (Keys 1981), then rounded to 8 bits as a file would be.
    Raises ValueError when a side is no multiple of the factor.
    """
    height, width = image.shape[2:]
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height} x {width} pixels cannot be shrunk by {factor}; both sides must be "
            "multiples of it"
        )
    size = (height // factor, width // factor)
    return to_float(to_uint8(F.interpolate(image.float(), size, mode="bicubic", antialias=True)))


def grey(image: Tensor) -> Tensor:
    """Return the luma (B, 1, H, W) of RGB images in [-1, 1] by BT.601, rounded to 8 bits."""
    weights = image.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return to_float(to_uint8((image * weights).sum(1, keepdim=True)))


def masked(image: Tensor, mask: Tensor) -> Tensor:
    """Return images (B, C, H, W), 0 where mask (B, 1, H, W) is 1, and the mask, as one tensor."""
    mask = mask.to(image.dtype)
    return torch.cat([image * (1 - mask), mask], dim=1)


def random_masks(rng: Rng, height: int, width: int) -> Tensor:
    """Draw masks (B, 1, H, W), 1 where the picture is to be hidden.

    One to three rectangles of a fifth to four fifths of each side, their centres anywhere; of every
    fourth mask the complement, so that a part is kept and all around it is to be painted.
    """
    drawn = rng.uniform(3, 5)[..., None, None]  # (B, 3, 5, 1, 1)
    y = ((torch.arange(height, device=rng.device) + 0.5) / height)[:, None]
    x = ((torch.arange(width, device=rng.device) + 0.5) / width)[None, :]
    centre_y, centre_x = drawn[:, :, 0], drawn[:, :, 1]  # (B, 3, 1, 1)
    half_y, half_x = 0.1 + 0.3 * drawn[:, :, 2], 0.1 + 0.3 * drawn[:, :, 3]
    inside = ((y - centre_y).abs() < half_y) & ((x - centre_x).abs() < half_x)  # (B, 3, H, W)
    inside[:, 1:] &= drawn[:, 1:, 4] < 0.5
    hidden = inside.any(1, keepdim=True)
    return (hidden ^ (drawn[:, :1, 4] < 0.25)).float()


SOURCES: dict[str, Callable[[Tensor, Rng, int], Tensor]] = {
    "small": lambda image, rng, factor: shrink(image, factor),
    "grey": lambda image, rng, factor: grey(image),
    "masked": lambda image, rng, factor: masked(image, random_masks(rng, *image.shape[2:])),
}
"""Kind -> (images (B, C, H, W), rng, factor) -> sources."""
