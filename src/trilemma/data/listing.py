"""What a collection of pictures is before any is decoded: Item, Listing and Source.

A Source knows three things: a signature that changes whenever its contents may have changed (cheap:
names, sizes and times, no reading), its Listing (recognised only when the cache has no answer), and
how to read one picture.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from trilemma.errors import UserError

PICTURE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .ppm .pgm .avif".split()
)
METADATA_SUFFIXES = frozenset(".txt .caption .csv .json .jsonl .parquet".split())
LARGEST_FILE = 512 * 2**20  # a picture file beyond this is not read


class Unusable(Exception):
    """One file cannot be used; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of a listing.

    Attributes:
        path: its place in the source.
        split: "train", "valid", "test", or "" when nothing says.
        label: its class's name, or None.
        text: its caption, "" when it has none.
        more: its other captions.
        attributes: 0 or 1 each, in the order of the listing's `attribute_names`.
        domain: "image", or "source" for the other domain of unpaired translation.
    """

    path: str
    split: str = ""
    label: str | None = None
    text: str = ""
    attributes: tuple[int, ...] = ()
    domain: str = "image"
    more: tuple[str, ...] = ()


@dataclass
class Listing:
    """What was recognised.

    Attributes:
        layout: in words.
        items: the pictures.
        label_names: the classes; empty when there are none.
        attribute_names: the attributes; empty when there are none.
        unusable: path -> reason, of what cannot be used.
        notes: what a user should know about how the files were taken.
        rows: path -> what the tables say of it, by column.
    """

    layout: str
    items: list[Item]
    label_names: list[str] = field(default_factory=list)
    attribute_names: list[str] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)


class Source(Protocol):
    """Where pictures come from."""

    name: str
    container: str

    @property
    def signature(self) -> str:
        """Changes whenever the contents may have changed."""
        ...

    def listing(self) -> Listing:
        """Recognise the contents."""
        ...

    def read(self, path: str) -> bytes | np.ndarray:
        """Return a picture's file, or its pixels (H, W) or (H, W, 3); raises Unusable."""
        ...


Recogniser = Callable[[Any], Listing]  # of the kind of Files that it is given to


class Files(ABC):
    """Files by path: of a folder or of a zip.

    Attributes:
        unusable: path -> reason, of what could not even be listed.
    """

    container: str

    def __init__(self, name: str, place: Path, recognise: Recogniser) -> None:
        self.name, self.place = name, place
        self.unusable: dict[str, str] = {}
        self._recognise = recognise

    @property
    @abstractmethod
    def signature(self) -> str:
        """Changes whenever the contents may have changed."""

    @abstractmethod
    def paths(self) -> Iterable[str]:
        """Return the paths of all files, "/" between their parts."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return the bytes of a file; raises Unusable."""

    def listing(self) -> Listing:
        """Recognise the layout."""
        listing = self._recognise(self)
        listing.unusable = {**self.unusable, **listing.unusable}
        return listing


class Folder(Files):
    """A folder, read recursively; symbolic links are followed, hidden files are not taken."""

    container = "folder"

    def __init__(self, name: str, place: Path, recognise: Recogniser) -> None:
        super().__init__(name, place, recognise)
        try:
            os.scandir(place).close()
        except OSError as error:
            raise UserError(f"{place} cannot be read: {error.strerror}") from None
        self._stamps: dict[str, str] = {}  # path -> what changes with the file's contents
        self._walk("", set())

    def _walk(self, folder: str, above: set[tuple[int, int]]) -> None:
        try:
            here = os.stat(self.place / folder)
            entries = list(os.scandir(self.place / folder))
        except OSError as error:
            self.unusable[folder] = f"folder cannot be read: {error.strerror}"
            return
        if (here.st_dev, here.st_ino) in above:  # a link to a folder that holds it
            return
        for entry in entries:
            path = f"{folder}/{entry.name}".lstrip("/")
            if is_hidden(entry.name):
                continue
            try:
                status = entry.stat()
            except OSError as error:
                if suffix(path) in PICTURE_SUFFIXES:
                    self.unusable[path] = f"cannot be read: {error.strerror}"
                continue
            if stat.S_ISDIR(status.st_mode):
                self._walk(path, above | {(here.st_dev, here.st_ino)})
            elif stat.S_ISREG(status.st_mode):
                self._stamps[path] = stamp(status)
            elif suffix(path) in PICTURE_SUFFIXES:
                self.unusable[path] = "not a regular file"

    @property
    def signature(self) -> str:
        """Hash of the place and of the names, sizes and times of all files."""
        digest = hashlib.sha256(f"{self.place.resolve()}\n".encode(errors="surrogateescape"))
        for part in (self._stamps, self.unusable):
            for path, stamp in sorted(part.items()):
                digest.update(f"{path}\0{stamp}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def paths(self) -> Iterable[str]:
        """Return the paths of all files."""
        return self._stamps

    def read(self, path: str) -> bytes:
        """Return the bytes of a file; raises Unusable."""
        place = self.place / path
        try:
            if os.path.getsize(place) > LARGEST_FILE:
                raise Unusable(f"larger than {LARGEST_FILE >> 20} MiB")
            return place.read_bytes()
        except OSError as error:
            raise Unusable(f"cannot be read: {error.strerror}") from None


class Zip(Files):
    """A zip file, read where it lies; its members are never unpacked to disk."""

    container = "zip"

    def __init__(self, name: str, place: Path, recognise: Recogniser) -> None:
        super().__init__(name, place, recognise)
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._archive: zipfile.ZipFile | None = None

    @property
    def signature(self) -> str:
        """The file's place, size and times."""
        return f"{self.place.resolve()}:{stamp(self.place.stat())}"

    def paths(self) -> Iterable[str]:
        """Return the paths of all members."""
        try:
            self._archive = zipfile.ZipFile(self.place)
        except zipfile.BadZipFile:
            message = f"{self.place} is not a zip file, or damaged; expected pictures in a zip"
            raise UserError(message) from None
        except OSError as error:
            raise UserError(f"{self.place} cannot be read: {error.strerror}") from None
        for member in self._archive.infolist():
            path = member.filename.replace("\\", "/")
            hidden = any(is_hidden(part) for part in path.split("/"))
            if not member.is_dir() and not hidden:
                self._members[path] = member
        return self._members

    def read(self, path: str) -> bytes:
        """Return the bytes of a member that `paths` has named; raises Unusable."""
        assert self._archive is not None
        member = self._members[path]
        if member.file_size > LARGEST_FILE:
            raise Unusable(f"larger than {LARGEST_FILE >> 20} MiB")
        try:
            return self._archive.read(member)
        except RuntimeError:  # what zipfile raises for a password
            raise Unusable("encrypted inside the zip") from None
        except Exception as error:  # a damaged member fails in zlib, bz2, lzma or zipfile itself
            raise Unusable(f"damaged inside the zip: {error}") from None


def stamp(status: os.stat_result) -> str:
    """Return what changes when a file is written, or replaced by one of the same size and date."""
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's, not the user's."""
    return name.startswith(".") or name in {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"}


def suffix(path: str) -> str:
    """Return the lower-case suffix of `path`, with its dot."""
    return PurePosixPath(path).suffix.lower()


def natural(text: str) -> list[tuple[int, int | str]]:
    """Sort key that puts "9" before "10"."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(p)) if p.isdecimal() and p.isascii() else (1, p) for p in parts if p]


def count_suffixes(paths: Iterable[str]) -> str:
    """Describe `paths` by suffix: ".txt (3), no suffix (1)"."""
    counts: dict[str, int] = {}
    for path in paths:
        name = suffix(path) or "no suffix"
        counts[name] = counts.get(name, 0) + 1
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name} ({count})" for name, count in ordered[:8])
