"""Make captioned pictures of the emoji, so that a model may learn to draw by words.

    python benchmarks/emoji_text.py FOLDER --out runs/emoji-text

FOLDER holds emoji-noto.parquet and emoji-twemoji.parquet (name, keywords, category, subcategory,
skin tone, drawing). Every drawing, on white, gets several captions: its name, its keyword, its
kind, its designer and its colours, as they are measured: "green apple", "apple, green", "fruit:
green apple, twemoji style". The split is that of the packaged data `emoji`: near-copies together.

Of things that may have any colour (no flags, no people) there are also drawings in three other
colours, chosen by the hash of the name: all of the drawing that has its main hue is given another,
and the caption says so, "purple apple". What a colour word means is then seen on hundreds of
things, and (thing, colour) pairs that are not chosen are compositions which no training picture
shows: `unseen.json` lists them, for `benchmarks/claims/words.py`.

Of each person one tone in five is kept, and one in twenty-five of two people's; they were 60 % of
all pictures. Captions of a picture are a list under `text` in `metadata.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image

from trilemma.data.named import PACKAGED

HUES = {"red": 0, "orange": 28, "yellow": 50, "green": 120, "blue": 212, "purple": 275, "pink": 330}
"""Degrees of the colours that things are given."""
WORDS = {*HUES, "brown", "black", "white", "grey", "light", "dark"}
UNCHANGED = ("People & Body", "Flags", "Component")
UNCHANGED_KINDS = {"alphanum", "keycap", "zodiac", "av-symbol", "arrow", "math", "currency",
                   "transport-sign", "punctuation", "gender", "time", "warning"}  # fmt: skip
OTHERS = 3  # colours that a thing is given beside its own
NEAR = 32  # degrees of hue that go with the main one


def share_of(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def hue_saturation_value(drawing: np.ndarray) -> np.ndarray:
    """Return (3, pixels): degrees and two numbers in [0, 1], of RGBA (H, W, 4) where solid."""
    solid = rgb_to_hsv(drawing[drawing[:, :, 3] > 128][:, :3] / 255)
    return solid.T * [[360], [1], [1]]


def colours_of(drawing: np.ndarray) -> list[str]:
    """Return the one or two colours that fill most of an RGBA drawing."""
    hue, saturation, value = hue_saturation_value(drawing)
    dull = (saturation < 0.22) | (value < 0.2)
    names = np.select(
        [
            dull & (value < 0.32),
            dull & (value > 0.86),
            dull,
            (hue > 10) & (hue < 48) & (value < 0.72) & (saturation > 0.3),
            (hue >= 318) & (hue < 345) | ((hue >= 345) | (hue < 15)) & (saturation < 0.5),
            (hue >= 345) | (hue < 20),
            hue < 40,
            hue < 66,
            hue < 170,
            hue < 255,
        ],
        ["black", "white", "grey", "brown", "pink", "red", "orange", "yellow", "green", "blue"],
        "purple",
    )
    found, counts = np.unique(names, return_counts=True)
    order = np.argsort(-counts)
    shares = counts[order] / counts.sum()
    return [str(found[i]) for i, s in zip(order, shares, strict=True) if s > 0.28][:2]


def main_hue(drawing: np.ndarray) -> float | None:
    """Return the hue of the largest coloured part, or None where little is coloured."""
    hue, saturation, value = hue_saturation_value(drawing)
    vivid = (saturation > 0.3) & (value > 0.25)
    if vivid.mean() < 0.3:
        return None
    weight = np.histogram(hue[vivid], 36, (0, 360))[0]
    smooth = weight + np.roll(weight, 1) + np.roll(weight, -1)
    return float(smooth.argmax() * 10 + 5)


def recoloured(drawing: np.ndarray, hue: float, colour: str) -> np.ndarray:
    """Return an RGBA drawing whose parts near a hue are of another colour."""
    h, s, v = np.moveaxis(rgb_to_hsv(drawing[:, :, :3] / 255), 2, 0)
    chosen = (s > 0.15) & (np.abs((h * 360 - hue + 180) % 360 - 180) <= NEAR)
    if colour == "pink":
        s, v = 0.55 * s, np.minimum(1, 1.15 * v)
    elif colour in ("blue", "purple", "green"):
        v = 0.9 * v
    other = hsv_to_rgb(np.stack([np.full_like(h, HUES[colour] / 360), s, v], 2))
    made = drawing.copy()
    made[chosen, :3] = np.round(255 * other[chosen])
    return made


def bare(name: str) -> str:
    """Return a name without its colour: "green apple" is an apple."""
    left = [word for word in name.split() if word not in WORDS]
    return " ".join(left) or name


def captions(row: dict, colours: list[str]) -> list[str]:
    """Return what may be said of a drawing as it is."""
    name = re.sub(r"\s+", " ", row["name"].strip().lower())
    style = f"{row['designer']} style"
    tone = row["skin_tone"].replace("+", " and ")
    whole = f"{name}, {tone} skin tone" if tone else name
    kind = re.sub(r"^(face|food|animal|place|person|hand|plant|other)-", "", row["subcategory"])
    kind = kind.replace("-", " ")
    said = [whole, f"{whole}, {style}", f"{kind}: {whole}", f"{row['category'].lower()}, {whole}"]
    if not tone and colours:
        both = " and ".join(colours)
        own = set(name.split()) & WORDS
        if not own:
            said += [f"{colours[0]} {name}", f"{both} {name}, {style}"]
        if not own or own & set(colours):  # not every "black telephone" is black
            said += [f"{bare(name)}, {both}", f"{kind}, {both}, {style}"]
    said += [word.lower() for word in row["keywords"] if word.lower() != name][:1]
    return list(dict.fromkeys(said))


def kept(row: dict) -> bool:
    """Whether a drawing is taken: of people in several tones only some are."""
    tones = row["skin_tone"].split("+") if row["skin_tone"] else []
    return not tones or share_of(row["code"]) < (0.2 if len(tones) == 1 else 0.04)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder of the two parquet files")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-text"))
    given = parser.parse_args()
    with zipfile.ZipFile(PACKAGED / "emoji.zip") as packaged:
        lines = packaged.read("metadata.jsonl").decode().splitlines()
    split = {row["file_name"]: row["split"] for row in map(json.loads, lines)}
    rows = []
    for designer in ("noto", "twemoji"):
        table = pyarrow.parquet.read_table(given.source / f"emoji-{designer}.parquet")
        rows += [{**row, "designer": designer} for row in table.to_pylist()]
    records, seen, things = [], set(), set()

    def put(drawing: np.ndarray, name: str, part: str, category: str, text: list[str]) -> None:
        page = Image.new("RGBA", drawing.shape[1::-1], "white")
        page.alpha_composite(Image.fromarray(drawing))
        place = given.out / name
        place.parent.mkdir(parents=True, exist_ok=True)
        page.convert("RGB").save(place)
        records.append({"file_name": name, "text": text, "label": category, "split": part})

    for row in filter(kept, rows):
        drawing = np.array(Image.open(io.BytesIO(row["image"])).convert("RGBA"))
        stem, colours = f"{row['designer']}/{row['code']}", colours_of(drawing)
        part = split[f"{stem}.webp"]
        put(drawing, f"{stem}.png", part, row["category"], captions(row, colours))
        name, hue = bare(row["name"].strip().lower()), main_hue(drawing)
        if part == "train":
            seen |= {(name, word) for word in [*colours, *row["name"].lower().split()]}
        free = row["category"] not in UNCHANGED and row["subcategory"] not in UNCHANGED_KINDS
        if part != "train" or hue is None or not free:
            continue
        things.add(name)
        ranked = sorted(HUES, key=lambda colour: share_of(f"{name} {colour}"))
        for colour in [c for c in ranked[: OTHERS + 1] if c not in colours][:OTHERS]:
            seen.add((name, colour))
            made, style = recoloured(drawing, hue, colour), f"{row['designer']} style"
            text = [f"{colour} {name}", f"{name}, {colour}", f"{colour} {name}, {style}"]
            put(made, f"{stem}-{colour}.png", part, row["category"], text)
    with (given.out / "metadata.jsonl").open("w") as table:
        table.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    unseen = [[name, c] for name in sorted(things) for c in HUES if (name, c) not in seen]
    (given.out / "unseen.json").write_text(json.dumps(unseen))
    count = {part: sum(record["split"] == part for record in records) for part in ("train", "test")}
    print(f"{count['train']} pictures to train on, {count['test']} to test with, in {given.out};")
    print(f"{len(unseen)} pairs of a thing and a colour that none of them shows")


if __name__ == "__main__":
    main()
