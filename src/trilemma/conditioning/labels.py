"""Classes and attributes as conditions."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilemma.batch import Condition, Rng
from trilemma.conditioning.base import Conditioner, share
from trilemma.networks.layers import Embedded, check_shape


class Labels(Conditioner):
    """Class labels by a learned vector each, and one more for "nothing said".

    Args:
        classes: number of classes; 0 for data without labels.
        dim: width of the vectors.
        dropout: probability of "nothing said" in training; guidance needs some.
    """

    def __init__(self, classes: int, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.classes, self.dropout = classes, share(dropout)
        self.guidable = bool(classes and dropout)
        self.table = nn.Embedding(classes + 1, dim) if classes else None
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=0.02)

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed labels: `vector` (B, dim)."""
        if self.table is None:
            return Embedded()
        where = self.table.weight.device
        return Embedded(vector=self.table(_told(condition, self.classes, self.dropout, rng, where)))

    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" for the images of `condition`."""
        return self(Condition(condition.count))


class LabelChannels(Conditioner):
    """Class labels as channels of ones and zeros; all zeros for "nothing said".

    Args:
        classes: number of classes; 0 for data without labels.
        size: height and width of what the network reads.
        dropout: probability of "nothing said" in training; guidance needs some.
    """

    def __init__(self, classes: int, size: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.classes, self.size, self.dropout = classes, size, share(dropout)
        self.guidable = bool(classes and dropout)
        self.register_buffer("place", torch.zeros(0), persistent=False)  # knows the device

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed labels: `image` (B, classes, size, size)."""
        if not self.classes:
            return Embedded()
        where = cast(Tensor, self.place).device
        told = _told(condition, self.classes, self.dropout, rng, where)
        rows = F.one_hot(told, self.classes + 1)[:, :-1].float()
        return Embedded(image=rows[:, :, None, None].expand(-1, -1, self.size, self.size))

    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" for the images of `condition`."""
        return self(Condition(condition.count))


class Attributes(Conditioner):
    """Attributes by a linear map of 1 (it has it), -1 (it has not) and 0 ("nothing said").

    Args:
        attributes: how many; 0 for data without.
        dim: width of the vector.
        dropout: probability of "nothing said" in training; guidance needs some.
    """

    def __init__(self, attributes: int, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.attributes, self.dropout = attributes, share(dropout)
        self.guidable = bool(attributes and dropout)
        self.map = nn.Linear(attributes, dim) if attributes else None
        if self.map is not None:
            nn.init.normal_(self.map.weight, std=0.02)

    def forward(
        self, condition: Condition, rng: Rng | None = None, image: Tensor | None = None
    ) -> Embedded:
        """Embed attributes (B, A) of 0 and 1: `vector` (B, dim)."""
        if self.map is None:
            return Embedded()
        if condition.attributes is None:
            if not self.dropout:
                raise ValueError(
                    "no attributes were given, and the model was trained with dropout 0, never "
                    "without; say them, or train with conditioner.dropout above 0"
                )
            weight = self.map.weight
            return Embedded(vector=self.map(weight.new_zeros(condition.count, self.attributes)))
        check_shape("attributes", condition.attributes, self.attributes)
        signs = 2 * condition.attributes - 1
        if rng is not None and self.dropout:
            signs = torch.where((rng.uniform() < self.dropout)[:, None], 0, signs)
        return Embedded(vector=self.map(signs))

    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" for the images of `condition`."""
        return self(Condition(condition.count))


def _told(
    condition: Condition, classes: int, dropout: float, rng: Rng | None, where: torch.device
) -> Tensor:
    """Return (B,) class indices, `classes` where nothing is said or, with `rng`, it is dropped.

    Raises:
        ValueError: a label is not one of the classes, or there is none and there must be.
    """
    label = condition.label
    if label is None:
        if not dropout:
            raise ValueError(
                "no labels were given, and the model was trained with dropout 0, never "
                "without labels; say a label, or train with conditioner.dropout above 0"
            )
        label = torch.full((condition.count,), classes, device=where)
    elif label.numel() and not (0 <= int(label.min()) <= int(label.max()) < classes):
        raise ValueError(
            f"labels from {int(label.min())} to {int(label.max())} were given; "
            f"the model knows 0 to {classes - 1}"
        )
    if rng is not None and dropout:
        label = torch.where(rng.uniform() < dropout, classes, label)
    return label
