"""What prepare_data.py cuts a source into, and the shard that is made of each piece; in a module of its own, so that a Ray cluster's workers find it."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from config import Data, PrepareJob
from datasets.captioned import Rows
from datasets.parquet import find_pictures
from datasets.prepared import left_out
from datasets.shards import Making, ShardWriter, prepare_shard, read_facts, shard_name
from datasets.source import FORMATS, check_bad, check_columns, check_missing, files_of, format_of
from datasets.tar import find_in_shard
from util.errors import UserError


class Piece(NamedTuple):
    """What becomes one shard: some rows of the source, or all of one of its files."""

    number: int
    rows: range | None
    file: Path | None = None


@lru_cache(maxsize=1)
def listed(data: Data) -> Rows:
    """The rows of a source that is listed as a whole, once a process.  Raises: UserError where they cannot be used."""
    rows = FORMATS[format_of(data)](Path(data.path), data)
    check_missing(rows, data)
    check_bad(rows, data)
    return rows


def pieces_of(job: PrepareJob) -> list[Piece]:
    """Tar and Parquet files one by one, without a look inside; the rows of a folder or a table some at a time.  Raises: UserError where there is nothing."""
    path = Path(job.data.path)
    kind = format_of(job.data)
    if kind == "shards":
        raise UserError(f"--data_path {path} is prepared already; give the data that it was made of")
    check_columns(job.data, kind)
    if kind in ("tar", "parquet"):
        found = [Piece(number, None, file) for number, file in enumerate(files_of(path, kind))]
    else:
        count, each = len(listed(job.data).paths), job.shards.pictures
        found = [Piece(number, range(start, min(start + each, count))) for number, start in enumerate(range(0, count, each))]
    if not found:
        raise UserError(f"--data_path {job.data.path}: no captioned pictures")
    return found


def making_of(job: PrepareJob) -> Making:
    return Making(job.img_size, job.shards.image_format, job.shards.min_size)


def identity_of(piece: Piece, job: PrepareJob) -> str:
    """What a piece is: a file by name and size, rows by their names and captions."""
    if piece.file:
        column = f", captions of {job.data.caption_column}" if job.data.caption_column else ""
        return f"{piece.file.name}, {piece.file.stat().st_size:,} bytes{column}"
    rows, digest = listed(job.data), hashlib.blake2b(digest_size=8)
    for i in piece.rows:
        digest.update("\n".join([os.path.relpath(rows.paths[i], job.data.path), *rows.captions[i], ""]).encode("utf-8", "surrogateescape"))
    return f"{len(piece.rows):,} rows from {piece.rows.start:,} on, {digest.hexdigest()}"


def check_made(pieces: Sequence[Piece], job: PrepareJob) -> None:
    """Raises: UserError where a shard that is there was made of something else, or in another way."""
    for piece in pieces:
        if not (shard := Path(job.shards.out) / shard_name(piece.number)).exists():
            continue
        facts, _ = read_facts(shard, only=())
        if facts["making"] != making_of(job)._asdict():
            raise UserError(f"{shard} was made with {facts['making']}, and this is {making_of(job)._asdict()}; name another --out")
        if facts["of"] != (of := identity_of(piece, job)):
            raise UserError(f"{shard} was made of other data ({facts['of']}; --data_path {job.data.path} has {of} there now); name another --out")


def broken_in(shards: Sequence[Path]) -> tuple[list[str], int]:
    """Lines of what could not be used in all shards, and of how many samples."""
    lines, total = [], 0
    for shard in shards:
        facts, arrays = read_facts(shard, ["counts"])
        lines += [f"{line} ({shard.name})" for line in facts["broken"]]
        total += len(arrays["counts"]) + left_out(facts)
    return lines, total


def make(piece: Piece, job: PrepareJob) -> int:
    """The shard of a piece.  Returns: its number.  Raises: UserError, OSError."""
    if piece.file is None:
        rows, which = listed(job.data), piece.rows
        rows = rows if piece.number == 0 else replace(rows, bad=[])  # what the whole source lacks is counted once
    else:
        data = job.data
        rows = (
            find_in_shard(piece.file, data.caption_column)
            if piece.file.suffix.lower() == ".tar"
            else find_pictures([piece.file], data.image_column, data.caption_column)
        )
        which = range(len(rows.paths))
    prepare_shard(Path(job.shards.out), piece.number, rows, which, ShardWriter(making_of(job), identity_of(piece, job), job.data.broken))
    return piece.number


def make_or_tell(piece: Piece, job: PrepareJob) -> dict[str, int | str]:
    """The same for a Ray cluster, which wraps exceptions past recognition: number, and what a UserError says."""
    try:
        return {"number": make(piece, job), "error": ""}
    except UserError as error:
        return {"number": piece.number, "error": str(error)}
