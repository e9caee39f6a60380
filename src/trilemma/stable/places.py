"""Where each weight of our networks stands in files of another layout.

Two layouts hold the same numbers: the original one-file checkpoints, where queries, keys and values
are rows of one matrix, and diffusers' folders, where each has its own. Ours has each its own, so
that all are views of what the file maps into memory: nothing is copied but the few matrices that
make shift and scale in the other order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trilemma.errors import UserError


class Place(NamedTuple):
    """Where a weight stands.

    Attributes:
        name: of the tensor in the file.
        first: with `after` and `parts`: the rows from first / parts to after / parts of it.
        after: the first part not taken.
        parts: how many equal parts the tensor's rows are.
        swapped: its halves are in the other order.
    """

    name: str
    first: int = 0
    after: int = 1
    parts: int = 1
    swapped: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        """Return the weight out of the file's tensor: a view, unless halves are swapped."""
        if self.swapped:
            return torch.cat(tensor.chunk(2)[::-1])
        if self.parts == 1:
            return tensor
        size = len(tensor) // self.parts
        return tensor[self.first * size : self.after * size]


Rule = tuple[str, Place]
"""(our name, its place): the beginnings of names, up to a dot or the end; `{i}` is a number."""


def find(names: Iterable[str], rules: Sequence[Rule], prefix: str = "") -> dict[str, Place]:
    """Return the place of each of our weights by the first rule that fits it.

    Args:
        names: of our weights.
        rules: see `Rule`.
        prefix: before every name in the file.

    Raises:
        KeyError: there is no rule for a weight.
    """
    patterns = [
        (re.compile(re.escape(ours).replace(r"\{i\}", r"(\d+)") + r"(?=\.|$)"), place)
        for ours, place in rules
    ]
    found = {}
    for name in names:
        for pattern, place in patterns:
            if match := pattern.match(name):
                theirs = place.name.replace("{i}", match[1]) if match.groups() else place.name
                found[name] = place._replace(name=prefix + theirs + name[match.end() :])
                break
        else:
            raise KeyError(f"there is no rule for {name}")
    return found


def check(places: Iterable[Place], given: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError unless a file's tensors are just those where weights stand.

    Args:
        places: of all our weights.
        given: the file's tensors.
        where: they come from.
    """
    places = list(places)
    names = {place.name for place in places}
    found = {"missing": sorted(names - given.keys()), "unknown": sorted(given.keys() - names)}
    told = [
        f"{len(each)} {what}: {', '.join(each[:3])}{' ...' if len(each) > 3 else ''}"
        for what, each in found.items()
        if each
    ]
    if told:
        raise UserError(f"{where} does not fit its network: {'; '.join(told)}")
    for place in places:
        if (rows := len(given[place.name])) % (2 if place.swapped else place.parts):
            raise UserError(f"{where}: {place.name} has {rows} rows, which are not of equal parts")


def gather(weights: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Return a file's tensors of our weights: `Place.take` undone."""
    shares: dict[str, list[tuple[int, Tensor]]] = {}
    for name, place in places.items():
        share = torch.cat(weights[name].chunk(2)[::-1]) if place.swapped else weights[name]
        shares.setdefault(place.name, []).append((place.first, share))
    return {
        name: torch.cat([share for _, share in sorted(each, key=lambda pair: pair[0])])
        for name, each in shares.items()
    }
