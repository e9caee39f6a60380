"""From what is asked of a picture (Condition) to what a network reads (Embedded).

With a probability `dropout` a training image's condition is replaced by "nothing said", so that
one network learns the conditional and the unconditional distribution: Ho & Salimans 2021,
"Classifier-Free Diffusion Guidance", algorithm 1.
"""

from __future__ import annotations

import torch
from torch import nn

from trilemma.batch import Condition, Rng
from trilemma.networks.layers import Embedded


class Labels(nn.Module):
    """Class labels by a learned vector each, and one more for "nothing said".

    Args:
        classes: number of classes; 0 for data without labels.
        dim: width of the vectors.
        dropout: probability of "nothing said" in training; guidance needs some.
    """

    def __init__(self, classes: int, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected 0 or more and less than 1")
        self.classes, self.dropout = classes, dropout
        self.table = nn.Embedding(classes + 1, dim) if classes else None
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, condition: Condition, rng: Rng | None = None) -> Embedded:
        """Embed a condition; with `rng`, as in training: some of it is dropped.

        Raises:
            ValueError: a label is not one of the classes, or there is none and there must be.
        """
        if self.table is None:
            return Embedded()
        if condition.label is None:
            if not self.dropout:
                raise ValueError(
                    "no labels were given, and the model was trained with dropout 0, never "
                    "without labels; say a label, or train with conditioner.dropout above 0"
                )
            label = torch.full((condition.count,), self.classes, device=self.table.weight.device)
        else:
            label = condition.label
            if label.numel() and not (0 <= int(label.min()) <= int(label.max()) < self.classes):
                raise ValueError(
                    f"labels from {int(label.min())} to {int(label.max())} were given; "
                    f"the model knows 0 to {self.classes - 1}"
                )
        if rng is not None and self.dropout:
            label = torch.where(rng.uniform() < self.dropout, self.classes, label)
        return Embedded(vector=self.table(label))  # (B, dim)

    def nothing(self, condition: Condition) -> Embedded:
        """Embed "nothing said" for the images of `condition`."""
        return self(Condition(condition.count))
