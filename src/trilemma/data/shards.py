"""WebDataset's shards: pictures in tar files, and what is said of them beside, by the same stem.

`0001.jpg`, `0001.txt` (its caption, or one a line), `0001.json` (what a table would say of it) and
`0001.cls` (the number of its class) are one sample. Shards are read where they lie, by offset;
nothing is unpacked. `{0000..0127}.tar` names many.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from trilemma.data.listing import (
    LARGEST_FILE,
    PICTURE_SUFFIXES,
    Files,
    Recogniser,
    Unusable,
    is_hidden,
    stamp,
    suffix,
)
from trilemma.data.metadata import Row
from trilemma.errors import UserError


def shards_in(folder: Path) -> list[Path]:
    """Return the tar files of a folder that holds neither pictures nor folders beside them."""
    files = [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]
    if any(path.is_dir() or suffix(path.name) in PICTURE_SUFFIXES for path in files):
        return []
    return [path for path in files if suffix(path.name) == ".tar"]


def shards_named(text: str) -> list[Path]:
    """Return the tar files that `text` means: one, or all of `{0000..0127}.tar`; else none.

    Raises:
        UserError: one of them is not there.
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if not text.lower().endswith(".tar"):
        return []
    if match is None:
        paths = [Path(text).expanduser()]
    else:
        first, last = match.groups()
        numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        begin, end = text[: match.start()], text[match.end() :]
        paths = [Path(f"{begin}{number}{end}").expanduser() for number in numbers]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        told = f"{missing[0]} is not there" if missing else "it names no shard"
        raise UserError(f"{text} cannot be read: {told}")
    return paths


class Shards(Files):
    """The files in several tar files; each is called by its shard's name and its own."""

    container = "tar"

    def __init__(self, name: str, shards: Sequence[Path], recognise: Recogniser) -> None:
        super().__init__(name, Path(name), recognise)
        self._shards = shards
        self._places: dict[str, tuple[Path, int, int]] = {}  # path -> shard, offset, size

    @property
    def signature(self) -> str:
        """The shards' places, sizes and times."""
        return "|".join(f"{path.resolve()}:{stamp(path.stat())}" for path in self._shards)

    def paths(self) -> Iterable[str]:
        """Return the paths of all members; a shard that is damaged gives those before the place."""
        for shard in self._shards:
            try:
                with tarfile.open(shard, "r:") as archive:
                    for member in archive:
                        parts = PurePosixPath(member.name).parts
                        if member.isreg() and not any(is_hidden(part) for part in parts[-1:]):
                            path = f"{shard.stem}/{member.name.removeprefix('./')}"
                            self._places[path] = (shard, member.offset_data, member.size)
            except (tarfile.TarError, OSError, EOFError) as error:
                self.unusable[shard.name] = f"damaged, or no plain tar file: {error}"
        return self._places

    def read(self, path: str) -> bytes:
        """Return the bytes of a member that `paths` has named; raises Unusable."""
        shard, offset, size = self._places[path]
        if size > LARGEST_FILE:
            raise Unusable(f"larger than {LARGEST_FILE >> 20} MiB")
        try:
            with shard.open("rb") as stream:
                stream.seek(offset)
                content = stream.read(size)
        except OSError as error:
            raise Unusable(f"cannot be read: {error.strerror}") from None
        if len(content) < size:
            raise Unusable("cut off: its shard ends before it")
        return content

    def rows(self, pictures: Iterable[str]) -> dict[str, Row]:
        """Return what the files .json and .cls beside pictures say of them.

        Raises:
            UserError: such a file does not hold an object of JSON.
        """
        rows: dict[str, Row] = {}
        for picture in pictures:
            stem = str(PurePosixPath(picture).with_suffix(""))
            row: Row = {}
            try:
                if f"{stem}.json" in self._places:
                    row = json.loads(self.read(f"{stem}.json"))
                if not isinstance(row, dict):
                    raise ValueError("expected an object")
                if f"{stem}.cls" in self._places:
                    row["label"] = self.read(f"{stem}.cls").decode().strip()
            except Unusable:
                continue
            except ValueError as error:
                raise UserError(f"{stem}.json: {error}") from None
            if row:
                rows[picture] = row
        return rows
