"""What a collection of pictures holds, and what is wrong with it.

Exact duplicates share their file's SHA-256. Near duplicates are alike when averaged to 8 x 8 cells:
the root of the mean squared difference of their cells is below 5 of 255 levels, which finds
pictures saved anew, resized or slightly brightened, not mirrored or cut ones. They are looked for
among at most 20,000 pictures, for the time this takes grows with the square of their number.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from trilemma.data import buckets
from trilemma.data.cache import NATIVE_LIMIT, TEST_SHARE, Settings, cache_root, open_cache
from trilemma.data.listing import suffix
from trilemma.data.named import find

FEW = 500
SUFFIXES = {
    "JPEG": {".jpg", ".jpeg", ".jfif"}, "PNG": {".png"}, "WEBP": {".webp"}, "GIF": {".gif"},
    "BMP": {".bmp"}, "TIFF": {".tif", ".tiff"}, "PPM": {".ppm", ".pgm"}, "AVIF": {".avif"},
}  # fmt: skip
_BUCKETS = 512, 8  # side and multiple of Stable Diffusion's pictures
_NEAR_LEVELS = 5.0
_MOST_COMPARED = 20_000
_LISTED = 20


def check(path: str | Path, size: int | None = None) -> dict[str, Any]:
    """Decode everything in `path` (as `load` would) and report on it.

    Args:
        path: what `load` takes.
        size: the side the pictures are to be trained at; None: as `load` chooses.

    Returns a dictionary of plain values that JSON can hold.
    """
    source = find(path)
    folder = open_cache(source, Settings(size, 1, None, "white"))
    meta = json.loads((folder / "meta.json").read_text())
    files = json.loads((folder / "files.json").read_text())
    pictures = [file for file in files if file["domain"] == "image"]
    images = np.load(folder / "images.npy", mmap_mode="r")
    text = folder / "text.json"
    texts = json.loads(text.read_text()) if text.exists() else []
    several = sum(len(t) for t in texts if isinstance(t, list))
    captions = sum(bool(t) for t in texts)
    exact = _groups([file["sha256"] for file in pictures])
    duplicates = [[pictures[row]["path"] for row in group] for group in exact]
    near = [
        [pictures[row]["path"] for row in group]
        for group in _near_duplicates(images)
        if len({pictures[row]["sha256"] for row in group}) > 1
    ]
    report: dict[str, Any] = {
        "source": str(path),
        "container": meta["container"],
        "layout": meta["layout"],
        "pictures": len(pictures),
        "source_pictures": len(files) - len(pictures),
        "unusable": [{"path": p, "reason": r} for p, r in sorted(meta["unusable"].items())],
        "shape": meta["shape"],
        "sizes": _counts(f"{file['width']}x{file['height']}" for file in files),
        "modes": _counts(file["mode"] for file in files),
        "formats": _counts(file["format"] for file in files),
        "mislabelled": [
            {"path": file["path"], "format": file["format"]}
            for file in files
            if suffix(file["path"]) not in SUFFIXES.get(file["format"], {suffix(file["path"])})
        ],
        "classes": _classes(pictures, meta["label_names"]),
        "captions": captions,
        "several_captions": [sum(isinstance(t, list) for t in texts), several],
        "attributes": _attributes(folder, meta["attribute_names"]),
        "splits": meta["counts"],
        "source_splits": meta["source_counts"],
        "tiles": _tiles(files, meta["shape"][-1]),
        "buckets": _buckets(pictures, size),
        "split_rule": meta["split_rule"],
        "exact_duplicates": duplicates,
        "near_duplicates": near,
        "notes": meta["notes"],
        "cache": str(folder.relative_to(cache_root())),
    }
    report["warnings"] = _warnings(report, files)
    report["advice"] = _advice(report)
    return report


def _tiles(files: list[dict[str, Any]], side: int) -> dict[str, int]:
    """Return the squares that recipes which enlarge pictures would cut, and what is too small."""
    cut = [(file["width"] // side) * (file["height"] // side) for file in files]
    return {"side": side, "count": sum(cut), "too_small": cut.count(0)}


def _buckets(files: list[dict[str, Any]], size: int | None) -> dict[str, Any]:
    """Return how many pictures `trilemma finetune --buckets` would bring to which sizes."""
    side, multiple = _BUCKETS
    side = max(size or side, side // 2)
    among = buckets.sizes(side, multiple)
    found = (buckets.nearest(among, file["height"], file["width"]) for file in files)
    return {"side": side, "sizes": _counts(f"{wide}x{high}" for high, wide in found)}


def _counts(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _classes(pictures: list[dict[str, Any]], names: list[str]) -> dict[str, int]:
    counts = Counter(file["label"] for file in pictures)
    return {name: counts[name] for name in names}


def _attributes(folder: Path, names: list[str]) -> dict[str, int]:
    """Return how many pictures have each attribute."""
    if not names:
        return {}
    counts = np.load(folder / "attributes.npy").sum(0, dtype=np.int64)
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _groups(keys: list[Any]) -> list[list[int]]:
    """Return the rows that share a key, where several do."""
    rows: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return [group for group in rows.values() if len(group) > 1]


def _near_duplicates(images: np.ndarray) -> list[list[int]]:
    """Return the rows of pictures that look alike: each with the first that it resembles."""
    if len(images) > _MOST_COMPARED:
        return []
    cells = np.concatenate([_cells(images[k : k + 4096]) for k in range(0, len(images), 4096)])
    brightness = cells.mean(1)
    # Pictures that are alike are alike in brightness: only those are compared.
    order = np.argsort(brightness, kind="stable")
    cells, brightness = cells[order], brightness[order]
    square = (cells**2).mean(1)
    first = np.arange(len(cells))
    for start in range(0, len(cells), 1024):
        these = slice(start, start + 1024)
        low = int(np.searchsorted(brightness, brightness[start] - _NEAR_LEVELS))
        others = slice(low, these.stop)
        product = cells[these] @ cells[others].T / cells.shape[1]
        distance = square[these, None] + square[None, others] - 2 * product  # (these, others)
        for row, near in enumerate(distance < _NEAR_LEVELS**2, start):
            first[row] = first[low + int(near[: row - low + 1].argmax())]  # itself, if no other
    groups = [sorted(order[group].tolist()) for group in _groups(first.tolist())]
    return sorted(groups)


def _cells(images: np.ndarray) -> np.ndarray:
    """Average uint8 (N, C, S, S) to (N, C * 64): 8 x 8 cells in each channel."""
    side = images.shape[-1]
    edges, pixel = np.linspace(0, side, 9), np.arange(side)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    overlap = np.clip(overlap, 0, None)
    weight = (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)  # (8, S)
    cells = weight @ images.astype(np.float32) @ weight.T  # (N, C, 8, 8)
    return cells.reshape(len(images), -1)


def _warnings(report: dict[str, Any], files: list[dict[str, Any]]) -> list[str]:
    found = []
    count, side = report["pictures"], report["shape"][-1]
    if report["unusable"]:
        found.append(f"{len(report['unusable'])} files cannot be used")
    if count < FEW:
        found.append(f"only {count} pictures: a generator will repeat them rather than learn")
    sizes = report["classes"].values()
    if sizes and max(sizes) > 10 * max(1, min(sizes)):
        found.append(f"unbalanced classes: from {min(sizes)} to {max(sizes)} pictures")
    small = sum(min(file["width"], file["height"]) < side for file in files)
    if small:
        found.append(f"{small} pictures are smaller than {side} pixels and are enlarged")
    ratios = [max(f["width"], f["height"]) / max(1, min(f["width"], f["height"])) for f in files]
    cut = sum(ratio > 1.1 for ratio in ratios)
    if cut:
        found.append(f"{cut} pictures are not square: only their centre is used")
    if report["mislabelled"]:
        found.append(f"{len(report['mislabelled'])} files bear another format's suffix; used")
    for kind in ("exact", "near"):
        groups = report[f"{kind}_duplicates"]
        if groups:
            copies = sum(len(group) - 1 for group in groups)
            found.append(f"{copies} {kind} duplicates of other pictures")
    if count > _MOST_COMPARED:
        found.append(
            f"near duplicates are not looked for among more than {_MOST_COMPARED} pictures"
        )
    if not report["splits"]["test"] + report["splits"]["valid"]:
        found.append("nothing is left for testing")
    if _unpaired(report):
        few = min(report["splits"]["train"], report["source_splits"]["train"])
        if not few:
            found.append("one of trainA and trainB has no picture that can be used")
        elif few < FEW:
            found.append(f"only {few} pictures of one domain to learn to translate from or to")
    return found


def _unpaired(report: dict[str, Any]) -> bool:
    return report["layout"].startswith("translation")


def _advice(report: dict[str, Any]) -> list[str]:
    found = []
    if _unpaired(report):
        command = f"trilemma train cyclegan --data {report['source']}"
        found.append(f"train a model that translates between the domains: {command}")
    elif report["pictures"] < FEW:
        found.append("gather more pictures, better thousands, or mirror them: --set data.flip=true")
    if report["near_duplicates"] and report["split_rule"] == "by content":
        found.append("put near duplicates in one of train/ and test/, or scores look too good")
    if report["shape"][-1] == NATIVE_LIMIT and len(report["sizes"]) > 1:
        found.append("pictures are brought to 64 pixels by default: choose another with --size")
    if not report["classes"] and not report["captions"] and not _unpaired(report):
        found.append("sort the pictures into one folder for each class to train conditional models")
    return found


def describe(report: dict[str, Any]) -> str:
    """Return the report as text for the terminal."""
    splits = [f"{count} {name}" for name, count in report["splits"].items() if count]
    rule = f"{TEST_SHARE:.0%} by the files' content" if report["split_rule"] != "given" else "given"
    channels, side, _ = report["shape"]
    kind = "grey" if channels == 1 else "colour"
    lines = [
        f"{report['source']}: {report['layout']}, {report['container']}",
        f"  pictures    {report['pictures']} usable; {kind}, decoded to {side} x {side}",
        f"  splits      {', '.join(splits)} ({rule})",
    ]
    if _unpaired(report):
        parts = [f"{count} {name}" for name, count in report["source_splits"].items() if count]
        lines[1] += "; these are domain B"
        lines.append(
            f"  source      {report['source_pictures']} usable, of domain A: {', '.join(parts)}; "
            "no picture is the pair of one of domain B"
        )
    tiles = report["tiles"]
    if tiles["count"] > report["pictures"] and not _unpaired(report):
        small = f"; {tiles['too_small']} pictures are too small" if tiles["too_small"] else ""
        lines.append(
            f"  tiles       {tiles['count']} of {side} x {side} for recipes that enlarge pictures "
            f"(srresnet, srgan), which shrink them to make the pairs{small}"
        )
    sizes = report["buckets"]["sizes"]
    if len(sizes) > 1 and not _unpaired(report):
        side = report["buckets"]["side"]
        lines.append(f"  buckets     {_some(sizes)}, for trilemma finetune --buckets --size {side}")
    for title in ("sizes", "modes", "formats", "classes", "attributes"):
        if report[title]:
            lines.append(f"  {title:<11} {_some(report[title])}")
    if report["captions"]:
        count, several = report["several_captions"]
        more = f", of which {count} have several: {several}" if count else ""
        lines.append(f"  captions    {report['captions']}{more}")
    for kind in ("exact", "near"):
        groups = report[f"{kind}_duplicates"]
        if groups:
            lines.append(f"  {kind} duplicates: {len(groups)} groups")
            lines += [f"    {' = '.join(group[:5])}" for group in groups[:5]]
    for file in report["mislabelled"][:_LISTED]:
        lines.append(f"  {file['path']} is a {file['format']}")
    if report["unusable"]:
        lines.append(f"  cannot be used: {len(report['unusable'])}")
        lines += [f"    {f['path']}: {f['reason']}" for f in report["unusable"]]
    for title in ("notes", "warnings", "advice"):
        lines += [f"  {title.rstrip('s')}: {line}" for line in report[title]]
    # A file's name may hold bytes that are no text.
    return "\n".join(lines).encode(errors="replace").decode()


def _some(counts: dict[str, int]) -> str:
    shown = [f"{name} ({count})" for name, count in list(counts.items())[:12]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
