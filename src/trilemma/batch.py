"""What flows between data, models and samplers: Batch, Condition, Rng.

Images are float NCHW in [-1, 1] inside the package and uint8 NCHW in [0, 255] at its border
(`to_float`, `to_uint8`). Densities over images are on [-1, 1] in 256 equal cells (`dequantise`).

Rng draws every image's randomness from that image's own stream, by the counter-based generator
Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"):
number i of call c of the stream with seed s is a pure function of (s, c, i). So a picture depends
on its seed alone, not on the pictures beside it in the batch, the batch size, the number of
processes or the device; and all streams of a batch are drawn in one vectorised pass. The noise of a
solver's many steps, `Rng.normals`, is of a cheaper generator that Philox begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_FRACTIONS = 0x007FFFFF << 32
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
TOGETHER = 2**18  # numbers that `Rng.normals` makes at once: enough for all cores, and in cache


def to_float(image: Tensor) -> Tensor:
    """Map uint8 (B, C, H, W) in [0, 255] to float32 in [-1, 1]."""
    return image.to(torch.float32).div_(127.5).sub_(1)


def to_uint8(image: Tensor) -> Tensor:
    """Map float (B, C, H, W) in [-1, 1] to uint8 in [0, 255], rounding and clipping."""
    return image.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def dequantise(image: Tensor, noise: Tensor) -> Tensor:
    """Spread the levels of float images (B, C, H, W) in [-1, 1] over their cells.

    The level v of 0 to 255 becomes (v + noise) / 128 - 1, for noise (B, C, H, W) in [0, 1].
    """
    return (image.add(1).mul(127.5).round() + noise) / 128 - 1


@dataclass(frozen=True)
class Condition:
    """What the images of a batch are to be, in training and in sampling alike.

    Every field but `count` may be None, meaning "not said".

    Attributes:
        count: number of images B.
        label: (B,) int64 class indices.
        attributes: (B, A) float, 0 or 1.
        text: B strings.
        source: (B, C, h, w) float in [-1, 1]: low resolution, other domain, image to vary.
        embedding: (B, D) float, drawn by a prior.
    """

    count: int
    label: Tensor | None = None
    attributes: Tensor | None = None
    text: list[str] | None = None
    source: Tensor | None = None
    embedding: Tensor | None = None

    def __getitem__(self, part: slice) -> Condition:
        """Return the condition of the images in `part`."""
        fields = {
            name: None if getattr(self, name) is None else getattr(self, name)[part]
            for name in ("label", "attributes", "text", "source", "embedding")
        }
        return Condition(len(range(self.count)[part]), **fields)

    def to(self, device: torch.device | str) -> Condition:
        """Return the same condition with its tensors on `device`."""
        fields: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name).to(device)
            for name in ("label", "attributes", "source", "embedding")
        }
        return replace(self, **fields)


class Rng:
    """One random stream per image.

    Args:
        seeds: B integers in [0, 2**63), one per image.
        device: where the drawn tensors live.

    Each call of `normal`, `normals`, `uniform` or `categorical` advances every stream by one;
    shapes are per image, and the result has the batch dimension in front.
    """

    def __init__(self, seeds: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> None:
        self.seeds = torch.as_tensor(seeds, dtype=torch.int64, device=device)
        self.device = self.seeds.device
        self._calls = 0

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, part: slice) -> Rng:
        """Return the streams of the images in `part`, at the same position."""
        other = Rng(self.seeds[part], self.device)
        other._calls = self._calls
        return other

    def _bits(self, blocks: int) -> list[Tensor]:
        """Return the four words of each block of the next call: (B, blocks) int64.

        Their low 32 bits count; above those of the second and the fourth may be anything.
        """
        c0 = torch.arange(blocks, device=self.device)[None]
        c2 = torch.full((1, 1), self._calls, device=self.device)
        self._calls += 1
        c1 = c3 = torch.zeros_like(c2)
        turns = torch.arange(10, device=self.device)[:, None, None]
        keys0 = ((self.seeds[:, None] & _MASK) + turns * 0x9E3779B9) & _MASK  # (10, B, 1)
        keys1 = (((self.seeds[:, None] >> 32) & _MASK) + turns * 0xBB67AE85) & _MASK
        for turn, (key0, key1) in enumerate(zip(keys0, keys1, strict=True)):
            product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64, wrapping: 32x32 -> 64
            if turn < 2:  # block, call and seed have not all met yet: less than the whole shape
                c0 = ((product1 >> 32) ^ (c1 ^ key0)) & _MASK
                c2 = ((product0 >> 32) ^ (c3 ^ key1)) & _MASK
            else:
                torch.bitwise_right_shift(product1, 32, out=c0)
                torch.bitwise_right_shift(product0, 32, out=c2)
                c0.bitwise_xor_(c1).bitwise_xor_(key0).bitwise_and_(_MASK)
                c2.bitwise_xor_(c3).bitwise_xor_(key1).bitwise_and_(_MASK)
            c1, c3 = product1, product0
        return [c0, c1, c2, c3]

    def _uniform(self, count: int) -> Tensor:
        c0, c1, c2, c3 = self._bits(-(-count // 4))
        pairs = c0.new_empty(*c0.shape, 2)
        for i, (low, high) in enumerate(((c0, c1), (c2, c3))):  # the upper 23 bits of each
            high.bitwise_left_shift_(23).bitwise_and_(_FRACTIONS)
            torch.bitwise_or(low.bitwise_right_shift_(9), high, out=pairs[..., i])
        return _fractions(pairs).flatten(1)[:, :count]

    def uniform(self, *shape: int) -> Tensor:
        """Draw (B, *shape) float32, uniform in the open interval (0, 1)."""
        return self._uniform(math.prod(shape)).reshape(len(self), *shape)

    def normal(self, *shape: int) -> Tensor:
        """Draw (B, *shape) float32, standard normal (Box-Muller)."""
        count = math.prod(shape)
        drawn = _box_muller(self._uniform(count + count % 2))
        return drawn[:, :count].reshape(len(self), *shape)

    def normals(self, draws: int, *shape: int) -> Iterator[Tensor]:
        """Yield (B, *shape) float32 standard normal numbers `draws` times: the noise of many steps.

        For a third of the price of so many calls of `normal`, and several draws are made at a time:
        one call of Philox says where in the sequence of SplitMix64 each image begins (Steele, Lea,
        Flood 2014, "Fast Splittable Pseudorandom Number Generators"; as Java and Vigna have it).
        """
        low, high, _, _ = self._bits(1)
        start = low | (high << 32)  # (B, 1)
        count = math.prod(shape)
        half = (count + 1) // 2  # two numbers of 23 bits from each of 64
        together = max(1, TOGETHER // max(1, len(self) * count))
        for first in range(0, draws, together):
            some = min(together, draws - first)
            index = torch.arange(first * half + 1, (first + some) * half + 1, device=self.device)
            bits = _split_mix(start + (index * _GOLDEN).view(some, 1, half))
            drawn = _box_muller(_fractions(bits))[:, :, :count]
            yield from drawn.reshape(some, len(self), *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Draw (B, *shape) int64, uniform in [0, high)."""
        return (self.uniform(*shape) * high).long().clamp_(max=high - 1)

    def categorical(self, logits: Tensor) -> Tensor:
        """Draw (B, ...) int64 indices from logits (B, ..., K), by the Gumbel-max trick."""
        gumbel = -(-self.uniform(*logits.shape[1:]).log()).log()
        return (logits.float() + gumbel).argmax(-1)


def _split_mix(state: Tensor) -> Tensor:
    """Return the 64 bits that SplitMix64 makes of each of its states, in their place."""
    shifted = torch.empty_like(state)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        torch.bitwise_right_shift(state, shift, out=shifted)  # of signed numbers: without the sign
        state.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - shift) - 1))
        if factor != 1:
            state.mul_(factor - 2**64)
    return state


def _fractions(bits: Tensor) -> Tensor:
    """Make two numbers in (0, 1) of the lower 23 bits of both halves of int64 (..., N): (..., 2 N).

    In their place: as the fractions of float32 in [1, 2). Half a step is added: they are exact,
    never 0 and never 1.
    """
    bits.bitwise_and_(_FRACTIONS | 0x007FFFFF).bitwise_or_(0x3F8000003F800000)
    return bits.view(torch.float32).sub_(1 - 2.0**-24)


def _box_muller(uniform: Tensor) -> Tensor:
    """Make normal numbers (..., N) of uniform ones (..., N), which are used up; N is even."""
    half = uniform.shape[-1] // 2
    radius = uniform[..., :half].log_().mul_(-2).sqrt_()
    angle = uniform[..., half:].mul_(2 * math.pi)
    pairs = uniform.new_empty(*uniform.shape[:-1], 2, half)
    torch.cos(angle, out=pairs[..., 0, :])
    torch.sin(angle, out=pairs[..., 1, :])
    return pairs.mul_(radius[..., None, :]).flatten(-2)


@dataclass(frozen=True)
class Batch:
    """A training batch.

    Attributes:
        image: (B, C, H, W) float in [-1, 1].
        condition: what is known of the images.
        seen: training images seen, by all processes, before this batch (growth, warm-up).
        rng: one stream per image, a function of the run's seed and the image's place in the
            training order; so a loss does not depend on how its batch was split.
        kept: (B, ...) what the model's codec keeps of the images, or None: `codecs.encoded`.
    """

    image: Tensor
    condition: Condition
    seen: int
    rng: Rng
    kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image)

    def split(self, parts: int) -> Iterator[Batch]:
        """Cut into `parts` batches of equal size; raises ValueError when that cannot be done."""
        size, rest = divmod(len(self), parts)
        if rest:
            raise ValueError(f"a batch of {len(self)} cannot be cut into {parts} equal parts")
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            kept = None if self.kept is None else self.kept[part]
            yield Batch(self.image[part], self.condition[part], self.seen, self.rng[part], kept)

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on `device`."""
        rng = Rng(self.rng.seeds, device)
        rng._calls = self.rng._calls
        image = self.image.to(device, non_blocking=True)
        kept = None if self.kept is None else self.kept.to(device, non_blocking=True)
        return Batch(image, self.condition.to(device), self.seen, rng, kept)
