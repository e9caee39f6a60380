"""Hugging Face data sets by name, through the `datasets` library (extra `hub`).

The picture column is the one of type Image; a ClassLabel column gives the classes, a string column
named text, caption, prompt or description the captions, boolean columns the attributes, and the
splits are taken as they are named.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from trilemma.data.listing import Item, Listing, Unusable
from trilemma.data.metadata import LABEL_COLUMNS, SPLITS, TEXT_COLUMNS
from trilemma.errors import UserError


class Hub:
    """A data set of the Hugging Face hub, downloaded into that library's own cache.

    Args:
        place: "owner/name", or "owner/name:configuration".
        otherwise: what the user can do without the hub.
    """

    container = "hub"

    def __init__(self, place: str, otherwise: str = "") -> None:
        self.name = f"hf:{place}"
        owner_name, _, configuration = place.partition(":")
        otherwise = f"; {otherwise}" if otherwise else ""
        try:
            import datasets
        except ImportError:
            raise UserError(
                f'{self.name} needs the hub extra: pip install "trilemma[hub]"{otherwise}'
            ) from None
        try:
            self._splits: dict[str, Any] = dict(
                datasets.load_dataset(owner_name, configuration or None)
            )
        except Exception as error:  # of the hub, the network or the data set: all mean "not there"
            raise UserError(f"{self.name} cannot be loaded: {error}{otherwise}") from None
        features = next(iter(self._splits.values())).features
        self._kinds = {name: type(feature).__name__ for name, feature in features.items()}
        self._image = next((n for n, kind in self._kinds.items() if kind == "Image"), None)
        if self._image is None:
            columns = ", ".join(f"{n} ({kind})" for n, kind in self._kinds.items())
            raise UserError(f"{self.name} has no column of pictures; its columns: {columns}")
        undecoded = datasets.Image(decode=False)
        self._splits = {s: d.cast_column(self._image, undecoded) for s, d in self._splits.items()}
        self._features = features

    @property
    def signature(self) -> str:
        """The library's own fingerprints."""
        return f"{self.name}:" + ":".join(f"{s}={d._fingerprint}" for s, d in self._splits.items())

    def listing(self) -> Listing:
        """List the rows of every split."""
        text = next((c for c in TEXT_COLUMNS if c in self._kinds), None)
        classes = [n for n, kind in self._kinds.items() if kind == "ClassLabel"]
        label = next((n for n in LABEL_COLUMNS if n in classes), classes[0] if classes else None)
        names = list(self._features[label].names) if label else []
        attributes = [n for n in self._kinds if getattr(self._features[n], "dtype", "") == "bool"]
        words = [n for n in self._kinds if _dtype(self._features[n]) == "string"]
        items, unusable, said = [], {}, {}
        for split, rows in self._splits.items():
            known = [c for c in (text, label, *attributes, *words) if c]
            columns = {name: rows[name] for name in dict.fromkeys(known)}
            for number in range(len(rows)):
                path = f"{split}/{number:08d}"
                number_label = columns[label][number] if label else -1
                if label and not (number_label is not None and 0 <= number_label < len(names)):
                    unusable[path] = f"no {label}"
                    continue
                said[path] = {name: columns[name][number] for name in words}
                caption = columns[text][number] if text else None
                captions = caption if isinstance(caption, list) else [caption]
                first, *more = [str(each) for each in captions if each] or [""]
                items.append(
                    Item(
                        path=path,
                        split=SPLITS.get(split, "train"),
                        label=names[number_label] if label else None,
                        text=first,
                        attributes=tuple(int(bool(columns[a][number])) for a in attributes),
                        more=tuple(more),
                    )
                )
        if len(self._splits) == 1:  # a lone split says nothing: a part of it is kept for testing
            items = [replace(item, split="") for item in items]
        kinds = [
            k for k, v in (("labels", label), ("captions", text), ("attributes", attributes)) if v
        ]
        layout = " and ".join(kinds) or "unlabelled"
        return Listing(layout, items, names, attributes, unusable, rows=said)

    def read(self, path: str) -> bytes:
        """Return one picture's file; raises Unusable."""
        split, _, number = path.partition("/")
        cell = self._splits[split][int(number)][self._image]
        if cell is None:
            raise Unusable("no picture in this row")
        if cell["bytes"] is not None:
            return cell["bytes"]
        try:
            return Path(cell["path"]).read_bytes()
        except OSError as error:
            raise Unusable(f"cannot be read: {error.strerror}") from None


def _dtype(feature: Any) -> str:
    """Return the type of a column's values, or of the entries of its lists."""
    feature = getattr(feature, "feature", feature)
    return str(getattr(feature, "dtype", ""))
