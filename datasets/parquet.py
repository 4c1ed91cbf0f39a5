"""Parquet files with pictures inside, as Hugging Face's hub has them: a column of {bytes, path}, or of bytes, and one of captions.

A picture is read with all pictures of its row group, so groups should be small; the start says where they are not.
"""

import io
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from datasets.captioned import Rows, several
from datasets.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, column, no_parquet, open_parquet
from util.errors import UserError
from util.logging import say

LARGE_GROUP = 200  # rows


def bytes_of(kind: Any) -> str | None:
    """Where the bytes are below an image column of that type: "", ".bytes", or nowhere."""
    import pyarrow.types as types

    if types.is_binary(kind) or types.is_large_binary(kind):
        return ""
    return ".bytes" if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else None


class Columns(NamedTuple):
    """Of one table."""

    image: str
    inside: str  # where the bytes are below it
    caption: str
    has_path: bool


def columns_of(schema: Any, table: Path, image_column: str | None, caption_column: str | None) -> Columns:
    """Raises: UserError where one is not there, or pictures are not inside."""
    image = column(schema.names, image_column, IMAGE_COLUMNS, table, "--image_column")
    kind = schema.field(image).type
    if (inside := bytes_of(kind)) is None:
        raise UserError(f"--data_path {table}: column {image} holds {kind}, wanted pictures as bytes or as {{bytes, path}}")
    caption = column(schema.names, caption_column, CAPTION_COLUMNS, table, "--caption_column")
    return Columns(image, inside, caption, bool(inside) and kind.get_field_index("path") >= 0)


def holds_pictures(table: Path, image_column: str | None) -> bool:
    """Whether pictures are inside, and not the names of files."""
    schema = open_parquet(table).schema_arrow
    return any(name in schema.names and bytes_of(schema.field(name).type) is not None for name in ([image_column] if image_column else IMAGE_COLUMNS))


def find_pictures(tables: Sequence[Path], image_column: str | None, caption_column: str | None) -> Rows:
    """The rows of the tables, one after another; only captions and paths are read.  Raises: UserError where a column is not there."""
    found, groups, sizes, usable, seen, at = Rows([], []), [], [], [], set(), 0
    for table in tables:
        file = open_parquet(table)
        columns = columns_of(file.schema_arrow, table, image_column, caption_column)
        for number in range(file.num_row_groups):
            groups.append((str(table), number, columns.image, columns.inside))
            sizes.append(file.metadata.row_group(number).num_rows)
        for number, (caption, path) in enumerate(captions_and_paths(table, file, columns), 1):
            at += 1
            try:
                lines = several(caption)
            except ValueError as error:
                found.bad.append(f"{table}, row {number}: {error}")
                continue
            found.paths.append(f"{table}, row {number}{f' ({path})' if path else ''}")
            found.captions.append(lines)
            usable.append(at - 1)
            found.twins += bool(path) and path in seen
            seen.add(path)
    if sizes and max(sizes) > LARGE_GROUP:
        say(f"warning: each picture is read with its row group, here of up to {max(sizes)} rows; tables written with row_group_size=50 are read faster")
    found.read = Pictures(groups, np.cumsum([0, *sizes]), np.array(usable, dtype=np.int64))
    return found


def captions_and_paths(table: Path, file: Any, columns: Columns) -> Iterator[tuple[Any, str | None]]:
    """Of each row.  Raises: UserError where they are damaged."""
    names = [columns.caption, *([f"{columns.image}.path"] if columns.has_path else [])]
    try:
        for batch in file.iter_batches(columns=names, use_threads=False):
            captions = batch.column(columns.caption).to_pylist()
            paths = batch.column(columns.image).field("path").to_pylist() if columns.has_path else [None] * len(captions)
            yield from zip(captions, paths)
    except (OSError, ValueError) as error:  # pyarrow's are ValueErrors
        raise no_parquet(table, error) from error


class Pictures:
    """pictures(i): the bytes of picture i.

    Args: groups: file, number, image column and where its bytes are, of each row group; first: the number of its first row, and that of all rows; usable: the rows that are pictures.
    """

    def __init__(self, groups: list[tuple[str, int, str, str]], first: np.ndarray, usable: np.ndarray):
        self.groups, self.first, self.usable = groups, first, usable

    def __call__(self, i: int) -> BinaryIO:
        row = int(self.usable[i])
        group = int(np.searchsorted(self.first, row, side="right")) - 1
        value = read_group(*self.groups[group])[row - int(self.first[group])].as_py()
        if value is None:
            raise ValueError("no picture in this row")
        return io.BytesIO(value)


@lru_cache(maxsize=64)
def open_table(table: str):
    """Mapped into memory, so that forked processes do not share a place in the file."""
    return open_parquet(Path(table), memory_map=True)


@lru_cache(maxsize=2)
def read_group(table: str, group: int, image: str, inside: str):
    """The bytes of all pictures of a row group."""
    read = open_table(table).read_row_group(group, columns=[image + inside], use_threads=False).column(0).combine_chunks()
    return read.field("bytes") if inside else read
