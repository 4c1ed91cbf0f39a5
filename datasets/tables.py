"""Tables that name picture files, a row a picture: .jsonl, .csv, .parquet, .json (a list of rows, or COCO's images and annotations).

A file's name is relative to the table's folder, or to --image_root. `metadata.*` of Hugging Face's image folders are such tables.
"""

import csv
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.captioned import Rows, not_utf8, several
from util.errors import UserError, one_line

IMAGE_COLUMNS = ("image", "file_name")  # where no --image_column is given, the first that is there
CAPTION_COLUMNS = ("text", "texts")
SUFFIXES = (".jsonl", ".csv", ".json", ".parquet")
Row = Mapping[str, Any] | str  # or why it is none


def find_rows(table: Path, root: str | None, image_column: str | None, caption_column: str | None) -> Rows:
    """Raises: UserError where the table cannot be read, or lacks a column."""
    rows, files = read_table(table), Files(Path(root) if root else table.parent)
    found = Rows([], [], root=str(files.root))
    known = list(dict.fromkeys(name for row in rows[:1000] if isinstance(row, Mapping) for name in row))
    image = column(known, image_column, IMAGE_COLUMNS, table, "--image_column")
    caption = column(known, caption_column, CAPTION_COLUMNS, table, "--caption_column")
    for number, row in enumerate(rows, 1):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            lines = several(row.get(caption))
            path = files.find(row.get(image))
        except ValueError as error:
            found.bad.append(f"{table}, row {number}: {error}")
            continue
        found.paths.append(path)
        found.captions.append(lines)
    found.twins = files.twins
    return found


def column(known: Sequence[str], asked: str | None, usual: Sequence[str], table: Path, flag: str) -> str:
    """The one that is asked for, or the first of the usual ones.  Raises: UserError where it is not there."""
    for name in [asked] if asked else usual:
        if name in known:
            return name
    raise UserError(f"--data_path {table}: no column {asked or ' or '.join(usual)}; there are {', '.join(known) or 'none'}. Name it by {flag}")


# How tables are written.


def read_table(table: Path) -> list[Row]:
    """Raises: UserError where it cannot be read."""
    try:
        return list(READERS[table.suffix.lower()](table))
    except UnicodeDecodeError as error:
        raise not_utf8(f"--data_path {table}") from error
    except UserError:
        raise
    except (OSError, ValueError, csv.Error, KeyError, TypeError) as error:
        raise UserError(f"--data_path {table} cannot be read: {one_line(error)}") from error


def read_jsonl(table: Path) -> Iterator[Row]:
    with open(table, encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    row = f"not JSON ({error})"
                yield row if isinstance(row, dict | str) else f"a JSON {type(row).__name__}, wanted an object"


def read_csv(table: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 24)
    with open(table, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            yield "more cells than the header has; a caption that holds commas wants quotes" if None in row else row


def read_json(table: Path) -> Iterator[Row]:
    """A list of rows; or COCO's: the pictures in their order, with the captions of their annotations."""
    content = json.loads(table.read_text(encoding="utf-8-sig"))
    if isinstance(content, list):
        yield from (row if isinstance(row, dict) else "no JSON object" for row in content)
        return
    if not {"images", "annotations"} <= set(content):
        raise ValueError(f"wanted a list of rows, or COCO's images and annotations; it holds {', '.join(content)}")
    captions: dict[Any, list] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
    yield from ({"image": picture.get("file_name"), "text": captions.get(picture["id"], [])} for picture in content["images"])


def open_parquet(table: Path, **options: bool):
    """A ParquetFile.  Raises: UserError where it is none, or pyarrow is not installed."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"--data_path {table} is Parquet, which needs pyarrow: pip install pyarrow") from error
    try:
        return ParquetFile(table, **options)
    except (OSError, ValueError) as error:  # pyarrow's are ValueErrors
        raise no_parquet(table, error) from error


def no_parquet(table: Path, error: Exception) -> UserError:
    return UserError(f"--data_path {table} cannot be read as Parquet ({one_line(error)}); is it whole, and no pointer of git-lfs?")


def read_parquet(table: Path) -> Iterator[Row]:
    for batch in open_parquet(table).iter_batches(use_threads=False):
        yield from batch.to_pylist()


READERS = dict(zip(SUFFIXES, (read_jsonl, read_csv, read_json, read_parquet)))


# Where the files are.


def is_folder(entry: os.DirEntry) -> bool:
    """A link that leads nowhere, or to itself, is none."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def is_file(entry: os.DirEntry) -> bool:
    """As is_folder."""
    return entry.is_file(follow_symlinks=False) or (entry.is_symlink() and os.path.isfile(entry.path))


class Files:
    """Which files there are below a folder, listed a folder at a time: a look at each file would take minutes for millions."""

    def __init__(self, root: Path):
        self.root, self.seen, self.twins = root, set(), 0
        self.listed: dict[str, dict[str, tuple[str, tuple[int, int]]]] = {}
        self.folders: dict[str, dict[str, str]] = {}  # in each folder: NFC name -> name
        self.actual: dict[str, str] = {}  # how a folder of a table is written on the disk

    def entries(self, folder: str) -> dict[str, tuple[str, tuple[int, int]]]:
        """NFC name -> name, and what tells the file from others; macOS writes 'が' as two characters."""
        if folder not in self.listed:
            try:
                device = os.stat(folder).st_dev
                with os.scandir(folder) as found:
                    self.listed[folder] = {unicodedata.normalize("NFC", one.name): (one.name, (device, one.inode())) for one in found if is_file(one)}
            except OSError:
                self.listed[folder] = {}
        return self.listed[folder]

    def folder(self, name: str) -> str:
        """The folder of that name, or else that of the same name in NFC, part by part."""
        if name not in self.actual:
            above, base = os.path.split(name)
            self.actual[name] = name if os.path.isdir(name) or not base else self.inside(self.folder(above), base)
        return self.actual[name]

    def inside(self, above: str, base: str) -> str:
        if above not in self.folders:
            try:
                with os.scandir(above or ".") as found:
                    self.folders[above] = {unicodedata.normalize("NFC", one.name): one.name for one in found if is_folder(one)}
            except OSError:
                self.folders[above] = {}
        return os.path.join(above, self.folders[above].get(unicodedata.normalize("NFC", base), base))

    def find(self, name: object) -> str:
        """The path of the file of that name.  Raises: ValueError where there is none."""
        if not isinstance(name, str) or not name:
            raise ValueError("no picture is named")
        asked, base = os.path.split(os.path.join(self.root, name))
        folder = self.folder(asked)
        actual, identity = self.entries(folder).get(unicodedata.normalize("NFC", base), (None, None))
        if actual is None:
            raise ValueError(f"no file {os.path.join(asked, base)}")
        self.twins += identity in self.seen
        self.seen.add(identity)
        return os.path.join(folder, actual)
