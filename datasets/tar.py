"""Tar shards in WebDataset's naming, as img2dataset writes them: NAME.jpg with NAME.txt or NAME.json.

A tar has no table of contents, so each shard is read once from end to end and its index kept, in `tar_index/` beside the shards; from then on a picture
is one read at a known place. All ranks share the indexing.
"""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from datasets.captioned import Rows, several
from datasets.text_image import EXTENSIONS
from util import distributed as dist
from util.errors import UserError
from util.files import write_whole
from util.logging import progress_bar, say
from util.workers import in_processes, own_cores

VERSION = 1
TAIL = 256  # bytes at the end of a picture that, with its size, tell it from others
JSON_COLUMNS = ("caption", "text", "texts")  # where there is no .txt


class Member(NamedTuple):
    offset: int
    size: int


class Entry(NamedTuple):
    """A sample of a shard that can be used."""

    name: str
    offset: int
    size: int
    mark: int  # checksum of the picture's end
    captions: tuple[str, ...]


class Index(NamedTuple):
    """Of one shard."""

    entries: list[Entry]
    bad: list[str]  # "NAME: reason"


def find_samples(shards: Sequence[Path], caption_column: str | None, folder: Path) -> Rows:
    """The samples of the shards, one after another.  folder: where indices are kept.  Collective.  Raises: UserError where a shard is no tar."""
    made = index_missing(shards, caption_column, folder)
    indices = (
        made.pop(number, None) or read_index(kept_at(folder, shard), facts_of(shard, caption_column)) or make_index(shard, caption_column)
        for number, shard in enumerate(shards)
    )
    return rows_of(shards, indices)


def find_in_shard(shard: Path, caption_column: str | None) -> Rows:
    """The samples of one shard, which is read once and no index kept.  Raises: UserError where it is no tar."""
    return rows_of([shard], [make_index(shard, caption_column)])


def rows_of(shards: Sequence[Path], indices: Iterable[Index]) -> Rows:
    found, places, seen = Rows([], []), [], set()
    for number, (shard, index) in enumerate(zip(shards, indices)):
        found.bad += [f"{shard}: {line}" for line in index.bad]
        for entry in index.entries:
            found.paths.append(f"{shard}/{entry.name}")
            found.captions.append(entry.captions)
            places.append((number, entry.offset, entry.size))
            found.twins += (entry.size, entry.mark) in seen
            seen.add((entry.size, entry.mark))
    found.read = Pictures([str(shard) for shard in shards], np.array(places, dtype=np.int64).reshape(-1, 3))
    return found


class Pictures:
    """pictures(i): the bytes of picture i.  places: (pictures, 3), shard, offset and size."""

    def __init__(self, shards: list[str], places: np.ndarray):
        self.shards, self.places = shards, places

    def __call__(self, i: int) -> BinaryIO:
        shard, offset, size = self.places[i].tolist()
        value = os.pread(open_shard(self.shards[shard]).fileno(), size, offset)
        if len(value) < size:
            raise ValueError(f"cut short: {len(value)} of {size} bytes")
        return io.BytesIO(value)


@lru_cache(maxsize=256)
def open_shard(path: str) -> BinaryIO:
    return open(path, "rb", buffering=0)


# The index.


def index_missing(shards: Sequence[Path], caption_column: str | None, folder: Path) -> dict[int, Index]:
    """Make and keep the indices that are not there, each by one rank.  Returns: by number of their shard, those that cannot be kept.  Collective."""
    wanted = [number for number, shard in enumerate(shards) if read_facts(kept_at(folder, shard)) != facts_of(shard, caption_column)]
    wanted, unkept = dist.from_main(wanted), {}
    if wanted:
        say(f"{len(wanted)} of {len(shards)} tar files are indexed once, in {folder}")
        mine = wanted[dist.rank() :: dist.world_size()]
        facts = {number: facts_of(shards[number], caption_column) for number in mine}  # of before: a shard may still be written to
        with progress_bar(len(mine), "index", unit="file") as bar, closing(make_indices(shards, mine, caption_column)) as made:
            for number, index in made:
                if not keep(kept_at(folder, shards[number]), index, facts[number]):
                    unkept[number] = index
                bar.update()
    if any(found := dist.gather_objects(unkept)):
        say(f"warning: nothing can be written to {folder}; the index is made anew at every start")
    return {number: index for part in found for number, index in part.items()}


def facts_of(shard: Path, caption_column: str | None) -> list:
    """What an index belongs to: the shard as it is now, and how captions are read.  Raises: UserError where it is not there."""
    try:
        status = shard.stat()
    except OSError as error:
        raise UserError(f"--data_path {shard} cannot be read: {error.strerror}") from error
    return [VERSION, status.st_size, status.st_mtime_ns, caption_column]


def kept_at(folder: Path, shard: Path) -> Path:
    return folder / f"{shard.name}-{zlib.crc32(str(shard.parent).encode('utf-8', 'surrogateescape')):08x}.json"


def read_facts(path: Path) -> list | None:
    """The first line of an index: what it belongs to."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.loads(file.readline())
    except (OSError, ValueError):
        return None


def read_index(path: Path, facts: list) -> Index | None:
    """None where it is not there or damaged, or belongs to another state of the shard."""
    if read_facts(path) != facts:
        return None
    try:
        _, (count, bad), *entries = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    except ValueError:
        return None
    return Index([Entry(*entry[:-1], tuple(entry[-1])) for entry in entries], bad) if len(entries) == count else None


def keep(path: Path, index: Index, facts: list) -> bool:
    """Returns: whether it could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in (facts, (len(index.entries), index.bad), *index.entries))
        write_whole(path, lambda file: file.write(text.encode()), shared=True)
    except OSError:
        return False
    return True


def make_indices(shards: Sequence[Path], numbers: Sequence[int], caption_column: str | None) -> Iterator[tuple[int, Index]]:
    """Of the shards of those numbers, as they are done, by as many processes as this rank has cores."""
    count = min(len(numbers), own_cores())
    remedy = "run the command again, with more memory if it ran out: tar files that are indexed already are not read again"
    return in_processes(lambda number: make_index(shards[number], caption_column), numbers, count, remedy)


def make_index(shard: Path, caption_column: str | None) -> Index:
    """Raises: UserError where it is no tar without compression."""
    entries, bad = [], []
    try:
        with tarfile.open(shard, "r:") as tar, open(shard, "rb") as file:
            for key, members in samples(tar, bad):
                try:
                    entries.append(entry_of(key, members, file, caption_column))
                except ValueError as error:
                    bad.append(f"{key}: {error}")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"--data_path {shard} cannot be read as a tar without compression: {error}") from error
    return Index(entries, bad)


def samples(tar: tarfile.TarFile, bad: list[str]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Files in a row whose names are the same up to the first dot: that name, and what follows it -> member."""
    key, members = None, {}
    try:
        for info in tar:
            folder, base = os.path.split(info.name)
            if not info.isfile() or base.startswith("."):  # macOS puts ._0.jpg beside 0.jpg
                continue
            stem, _, extension = base.partition(".")
            if (name := os.path.join(folder, stem)) != key:
                if members:
                    yield key, members
                key, members = name, {}
            members[extension.lower()] = Member(info.offset_data, info.size)
        if problem := after_the_end(tar.fileobj, tar.offset):
            bad.append(f"after {key}: {problem}")
    except tarfile.ReadError as error:
        bad.append(f"after {key}: {error}")
    if members:
        yield key, members


def after_the_end(file: BinaryIO, offset: int) -> str:
    """What is wrong where the reader has stopped: a tar ends with zeros and nothing else."""
    file.seek(offset)
    first = block = file.read(1 << 20)
    while block:
        if block.strip(b"\0"):
            return f"what follows from byte {offset} on cannot be read (damaged, or another tar after this one)"
        block = file.read(1 << 20)
    return "" if len(first) >= 512 else "it has no end, and may be cut short"


def entry_of(key: str, members: dict[str, Member], file: BinaryIO, caption_column: str | None) -> Entry:
    """Raises: ValueError where picture or caption is not there."""
    pictures = [name for name in members if f".{name}" in EXTENSIONS]
    if not pictures:
        raise ValueError("no picture")
    picture = members[pictures[0]]
    captions = several(caption_of(members, file, caption_column))
    tail = read_at(file, Member(picture.offset + max(0, picture.size - TAIL), min(TAIL, picture.size)))
    return Entry(f"{key}.{pictures[0]}", *picture, zlib.crc32(tail), captions)


def caption_of(members: dict[str, Member], file: BinaryIO, caption_column: str | None) -> Any:
    """Of the .txt, or of the .json, which a --caption_column asks for."""
    if "txt" in members and not caption_column:
        return read_at(file, members["txt"]).decode("utf-8-sig")
    if "json" not in members:
        raise ValueError(f"no .json for --caption_column {caption_column}" if caption_column else "no .txt or .json")
    row = json.loads(read_at(file, members["json"]).decode("utf-8-sig"))
    if not isinstance(row, dict):
        raise ValueError(f"its .json is a {type(row).__name__}, wanted an object")
    names = [caption_column] if caption_column else JSON_COLUMNS
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"no {' or '.join(names)} in its .json; there are {', '.join(row)}")


def read_at(file: BinaryIO, member: Member) -> bytes:
    """Raises: ValueError where the file ends before."""
    file.seek(member.offset)
    value = file.read(member.size)
    if len(value) < member.size:
        raise ValueError("cut short")
    return value
