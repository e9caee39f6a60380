"""What every conditioner is, and several together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from trilemma.batch import Condition, Rng
from trilemma.networks.layers import Embedded


class Conditioner(nn.Module, ABC):
    """A map from conditions to what networks read.

    Attributes:
        guidable: whether "nothing said" is learned, without which there is no guidance.
        classes: how many it knows; 0 if it reads no labels.
    """

    guidable: bool
    classes: int = 0

    @abstractmethod
    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed a condition.

        Args:
            condition: of B images.
            rng: in training: some of the condition is dropped.
            image: in training: the pictures (B, C, H, W) themselves, for what is made of them.

        Raises:
            ValueError: what the model must be told is not said, or is not of its kind.
        """

    @abstractmethod
    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" for the images of `condition`, but for a source, which stays."""


class Together(Conditioner):
    """Several conditioners: vectors are added, tokens and channels put one after the other.

    Each is dropped by itself.

    Args:
        parts: the conditioners.
    """

    def __init__(self, parts: Sequence[Conditioner]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.guidable = any(part.guidable for part in parts)
        self.classes = max((part.classes for part in parts), default=0)

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed what each part reads."""
        return _merged([part(condition, rng, image) for part in self.parts])

    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" to each part."""
        return _merged([cast(Conditioner, part).nothing(condition) for part in self.parts])


def share(dropout: float) -> float:
    """Return a probability of dropping; raises ValueError outside 0 to less than 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; expected 0 or more and less than 1")
    return dropout


def _merged(parts: list[Embedded]) -> Embedded:
    vectors = [part.vector for part in parts if part.vector is not None]
    tokens = [part.tokens for part in parts if part.tokens is not None]
    masks = [
        part.tokens.new_ones(part.tokens.shape[:2], dtype=torch.bool)
        if part.mask is None
        else part.mask
        for part in parts
        if part.tokens is not None
    ]
    images = [part.image for part in parts if part.image is not None]
    return Embedded(
        vector=sum(vectors[1:], vectors[0]) if vectors else None,
        tokens=torch.cat(tokens, 1) if tokens else None,
        mask=torch.cat(masks, 1) if masks else None,
        image=torch.cat(images, 1) if images else None,
    )
