"""Pictures inside a parquet file: a row for each, its picture's bytes in one of the columns.

The picture column is the first that holds bytes, or the structs of bytes and path in which Hugging
Face's data sets keep pictures. The other columns are what a metadata table would say of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trilemma.data.listing import Files, Recogniser, Unusable, stamp
from trilemma.data.metadata import Row
from trilemma.errors import UserError


class Parquet(Files):
    """The pictures of a parquet file; picture i is called by its number, "0000012"."""

    container = "parquet"

    def __init__(self, name: str, place: Path, recognise: Recogniser) -> None:
        super().__init__(name, place, recognise)
        self.rows: dict[str, Row] = {}
        self._pictures: dict[str, Any] = {}

    @property
    def signature(self) -> str:
        """The file's place, size and times."""
        return f"{self.place.resolve()}:{stamp(self.place.stat())}"

    def paths(self) -> Iterable[str]:
        """Read the table; return the names of its rows."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(
                'reading parquet needs pyarrow: pip install "trilemma[parquet]", '
                "or give a folder of pictures"
            ) from None
        try:
            table = pyarrow.parquet.read_table(self.place)
        except Exception as error:  # pyarrow's own errors share no base class but Exception
            raise UserError(f"{self.place} is not a readable parquet file: {error}") from None
        kinds = pyarrow.types
        column = next(
            (
                field.name
                for field in table.schema
                if kinds.is_binary(field.type)
                or kinds.is_large_binary(field.type)
                or (kinds.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
            ),
            None,
        )
        if column is None:
            there = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
            raise UserError(
                f"{self.place} has no column of pictures (bytes); its columns: {there}; a table "
                "about pictures in files is called metadata.parquet and lies beside them"
            )
        names = [f"{number:07d}" for number in range(table.num_rows)]
        self._pictures = dict(zip(names, table.column(column), strict=True))
        rows = table.drop_columns([column]).to_pylist()
        self.rows = dict(zip(names, rows or [{} for _ in names], strict=True))
        return names

    def read(self, path: str) -> bytes:
        """Return the bytes of a picture; raises Unusable."""
        cell = self._pictures[path].as_py()
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not content:
            raise Unusable("no picture in this row")
        return content
