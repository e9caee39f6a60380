"""Captions written by templates over what is known of a picture.

`{name} emoji` is a caption for each picture that has a `name`: a column of its table, its class
(`label`), an attribute (0 or 1), or the captions that it already has (`text`). The name of a column
alone is short for it in braces. A column that holds a list makes a caption of each of its entries.
`{smiling:with a smile}` writes its words where the column says 1 or true, and nothing elsewhere.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from trilemma.data.listing import Item, Listing
from trilemma.data.metadata import bit
from trilemma.errors import UserError

MOST = 64  # captions of one picture


def compose(listing: Listing, templates: Sequence[str]) -> Listing:
    """Return the listing with the captions that templates make, in their order.

    A picture that lacks what a template asks for gets no caption of it.

    Raises:
        UserError: a template is not well formed, or asks for what no picture has.
    """
    known = {name for item in listing.items for name in _values(listing, item)}
    parsed = [_parse(template, known) for template in templates]
    items, bare = [], 0
    for item in listing.items:
        values = _values(listing, item)
        made = dict.fromkeys(text for parts in parsed for text in _fill(parts, values))
        first, *more = list(made)[:MOST] or [""]
        bare += not first
        items.append(replace(item, text=first, more=tuple(more)))
    notes = listing.notes
    if bare == len(items):
        raise UserError(
            f"no picture gets a caption from {', '.join(map(repr, templates))}: "
            "what they ask for is empty everywhere"
        )
    if bare:
        notes = [*notes, f"{bare} of {len(items)} pictures get no caption from the templates"]
    return replace(listing, items=items, notes=notes)


def _values(listing: Listing, item: Item) -> dict[str, Any]:
    """Return what is known of a picture, by name; of empty values nothing."""
    values = dict(listing.rows.get(item.path, {}))
    values |= zip(listing.attribute_names, item.attributes, strict=False)
    values |= {"label": item.label, "text": [text for text in (item.text, *item.more) if text]}
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def _parse(template: str, known: set[str]) -> list[tuple[str, str | None, str]]:
    """Return the parts of a template: words before, a column or None, and its words if true."""
    there = ", ".join(sorted(known)) or "nothing"
    if template in known:
        return [("", template, "")]
    try:
        parts = [
            (before, name, words or "")
            for before, name, words, _ in string.Formatter().parse(template)
        ]
    except ValueError as error:
        raise UserError(f"caption {template!r} is not well formed: {error}") from None
    names = [name for _, name, _ in parts if name is not None]
    if not names:
        raise UserError(
            f"caption {template!r} is the same for every picture: write columns in braces, such as "
            f"'{{label}}'; the pictures have {there}"
        )
    for name in names:
        if name not in known:
            raise UserError(f"caption {template!r} asks for {name!r}; the pictures have {there}")
    return parts


def _fill(parts: list[tuple[str, str | None, str]], values: dict[str, Any]) -> list[str]:
    """Return the captions that a template makes of the values, none where one is missing."""
    choices: list[list[str]] = []
    for before, name, words in parts:
        if name is None:
            written = [""]
        elif words:
            written = [words if bit(values.get(name)) else ""]
        else:
            value = values.get(name, [])
            written = [str(entry).strip() for entry in (value if _several(value) else [value])]
        choices.append([before + text for text in written if text or words or name is None])
    return [" ".join("".join(choice).split()) for choice in product(*choices)][:MOST]


def _several(value: Any) -> bool:
    return isinstance(value, list | tuple)
