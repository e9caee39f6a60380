"""Make the packaged `emoji` data: two designers' drawings of every emoji, as a zip with metadata.

    python tools/make_emoji.py FOLDER     (holding emoji-noto.parquet and emoji-twemoji.parquet)

Each row becomes `DESIGNER/CODE.webp` (the bytes as they are) and one line of `metadata.jsonl`:
file_name, text (name, skin tone, keywords), label (category), split, and 0/1 attributes for skin
tone, hair, gender and designer.

The split keeps near-copies together. Emoji that differ in skin tone, hair, facing direction or
gender alone form one group, all clock faces another; groups that share an identical drawing, by
either designer, are joined; a group lies wholly in one split, for both designers. In each category
the groups are taken in the order of their hash until a tenth of the pictures is for testing. The
same input always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet
from PIL import Image

SOURCE = Path(sys.argv[1])
TARGET = Path(__file__).parents[1] / "src/trilemma/data/files"
TEST_SHARE = 0.1

TONES = {"light": "1F3FB", "medium-light": "1F3FC", "medium": "1F3FD", "medium-dark": "1F3FE",
         "dark": "1F3FF"}  # fmt: skip
HAIR = {"hair_red": "1F9B0", "hair_curly": "1F9B1", "hair_white": "1F9B3", "hair_blond": "1F471",
        "bald": "1F9B2", "beard": "1F9D4"}  # fmt: skip
MAN = set("1F468 1F466 1F474 1F934 1F385 1F46B 1F46C 1F57A 1F472 2642".split())
WOMAN = set("1F469 1F467 1F475 1F478 1F936 1F46B 1F46D 1F483 1F930 1F931 1F9D5 2640".split())
SAME_BUT_FOR = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2",
                "1F474": "1F9D3", "1F475": "1F9D3", "1F46B": "1F46A", "1F46C": "1F46A",
                "1F46D": "1F46A", "1F934": "1F478", "1F936": "1F385", "26C4": "2603"}  # fmt: skip
CLOCKS = {f"{code:X}" for code in range(0x1F550, 0x1F568)}


def group_of(code: str) -> str:
    """Return `code` without skin tone, hair, direction and gender; one code for all clock faces."""
    if code in CLOCKS:
        return "clock"
    code = re.sub("-200D-27A1|-FE0F", "", code)  # facing right; presentation
    parts = [SAME_BUT_FOR.get(p, p) for p in code.split("-")]
    ignored = {*TONES.values(), *HAIR.values(), "2640", "2642", "200D"} if len(parts) > 1 else set()
    return "-".join(p for p in parts if p not in ignored)


def pixels(content: bytes) -> bytes:
    """Return a digest of the drawing on white."""
    drawing = Image.open(io.BytesIO(content)).convert("RGBA")
    page = Image.new("RGBA", drawing.size, "white")
    page.alpha_composite(drawing)
    return hashlib.sha256(page.convert("RGB").tobytes()).digest()


def describe(row: dict) -> str:
    """Return the caption: name, skin tone, and the keywords that say something else."""
    name, tone = row["name"].strip(), row["skin_tone"].replace("+", " and ")
    words = [name] + ([f"{tone} skin tone"] if tone else [])
    return ", ".join(words + [k for k in row["keywords"] if k.lower() != name.lower()])


def attributes(row: dict) -> dict[str, int]:
    """Return the 0/1 attributes."""
    parts, person = set(row["code"].split("-")), row["category"] == "People & Body"
    tones = row["skin_tone"].split("+")
    found = {f"skin_{t.replace('-', '_')}": t in tones for t in TONES}
    found |= {name: person and code in parts for name, code in HAIR.items()}
    found |= {"woman": person and bool(parts & WOMAN), "man": person and bool(parts & MAN)}
    found |= {"noto": row["designer"] == "noto", "twemoji": row["designer"] == "twemoji"}
    return {name: int(value) for name, value in found.items()}


rows = []
for designer in ("noto", "twemoji"):
    for row in pyarrow.parquet.read_table(SOURCE / f"emoji-{designer}.parquet").to_pylist():
        rows.append({**row, "designer": designer})

joined: dict[str, str] = {}


def root(group: str) -> str:
    """Return the representative of the groups joined with `group`."""
    while joined.setdefault(group, group) != group:
        group = joined[group]
    return group


first_with: dict[bytes, str] = {}
for row in rows:
    group, digest = group_of(row["code"]), pixels(row["image"])
    a, b = sorted((root(group), root(first_with.setdefault(digest, group))))
    joined[b] = a

sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
for row in rows:
    sizes[row["category"]][root(group_of(row["code"]))] += 1
test: set[str] = set()
for groups in sizes.values():
    chosen, wanted = 0, TEST_SHARE * sum(groups.values())
    for group in sorted(groups, key=lambda g: hashlib.sha256(g.encode()).digest()):
        if chosen < wanted and groups[group] <= 1.5 * max(wanted - chosen, 2):
            test.add(group)
            chosen += groups[group]

TARGET.mkdir(exist_ok=True)
with zipfile.ZipFile(TARGET / "emoji.zip", "w") as archive:
    lines = []
    for row in rows:
        name = f"{row['designer']}/{row['code']}.webp"
        archive.writestr(zipfile.ZipInfo(name), row["image"])  # dated 1980: same bytes each time
        split = "test" if root(group_of(row["code"])) in test else "train"
        record = {"file_name": name, "text": describe(row), "label": row["category"]}
        lines.append(json.dumps(record | {"split": split} | attributes(row), ensure_ascii=False))
    metadata = zipfile.ZipInfo("metadata.jsonl")
    archive.writestr(metadata, "\n".join(lines) + "\n", zipfile.ZIP_DEFLATED, 9)
