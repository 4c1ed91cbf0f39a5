"""Captioned pictures to tar shards at training size: `python prepare_data.py --data_path DIR --img_size 256 --out shards`, and then `--data_path shards` everywhere.

Each shard is made whole or not at all, the same to the byte by whoever makes it, and none that is there is made again. Under torchrun, and as tasks of a Slurm array, every process takes
its share; the last to be done writes the index.
"""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import flags
from util.errors import UserError, told_in_one_line

if __name__ == "__main__":
    with told_in_one_line():
        flags.parse_prepare()  # before torch is imported

from config import Data, PrepareJob
from datasets.captioned import Rows
from datasets.parquet import find_pictures
from datasets.shards import Making, build_index, prepare_shard, shard_name
from datasets.source import FORMATS, check_bad, check_missing, format_of, packed_in, workers
from datasets.tar import find_in_shard
from util.errors import need_package
from util.files import Lock, writable_folder
from util.logging import progress, say
from util.stopping import in_worker


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
    kind = format_of(job.data)
    if kind in ("tar", "parquet"):
        found = [Piece(number, None, file) for number, file in enumerate(packed_in(Path(job.data.path))[f".{kind}"])]
    else:
        count, each = len(listed(job.data).paths), job.shards.pictures
        found = [Piece(number, range(start, min(start + each, count))) for number, start in enumerate(range(0, count, each))]
    if not found:
        raise UserError(f"--data_path {job.data.path}: no captioned pictures")
    return found


def making_of(job: PrepareJob) -> Making:
    return Making(job.img_size, job.shards.image_format, job.shards.min_size)


def make(piece: Piece, job: PrepareJob) -> int:
    """The shard of a piece.  Returns: its number.  Raises: UserError, OSError."""
    if piece.file is None:
        rows, which = listed(job.data), piece.rows
    else:
        data = job.data
        rows = (
            find_in_shard(piece.file, data.caption_column)
            if piece.file.suffix.lower() == ".tar"
            else find_pictures([piece.file], data.image_column, data.caption_column)
        )
        which = range(len(rows.paths))
    prepare_shard(Path(job.shards.out), piece.number, rows, which, making_of(job))
    return piece.number


def share() -> tuple[int, int]:
    """Which of how many this process is, under torchrun or in a Slurm array."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        first, step = int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0)), int(os.environ.get("SLURM_ARRAY_TASK_STEP", 1))
        return (int(os.environ["SLURM_ARRAY_TASK_ID"]) - first) // step, int(os.environ["SLURM_ARRAY_TASK_COUNT"])
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def by_processes(pieces: Sequence[Piece], job: PrepareJob) -> Iterator[int]:
    number, count = share()
    mine = [piece for piece in pieces if piece.number % count == number]
    processes = min(len(mine), workers(job.data))
    if processes < 2:
        yield from (make(piece, job) for piece in mine)
        return
    with get_context("fork").Pool(processes, in_worker, (0,)) as pool:
        yield from pool.imap_unordered(partial(make, job=job), mine)


def by_ray(pieces: Sequence[Piece], job: PrepareJob) -> Iterator[int]:
    """A task a shard on a Ray cluster, which begins one again where its worker or its node died."""
    need_package("ray", "--engine ray")
    import ray

    ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = ray.data.from_items([{"piece": piece} for piece in pieces], override_num_blocks=len(pieces))
    made = items.map(lambda item: {"number": make(item["piece"], job)}, max_retries=-1)
    yield from (row["number"] for row in made.iter_rows())


ENGINES = {"processes": by_processes, "ray": by_ray}


def prepare(job: PrepareJob) -> None:
    """Raises: UserError where it cannot be done."""
    out = writable_folder(job.shards.out, "--out")
    pieces = pieces_of(job)
    missing = [piece for piece in pieces if not (out / shard_name(piece.number)).exists()]
    say(f"{job.data.path}: {len(pieces):,} shards of {job.img_size} pixels, {len(missing):,} of them to be made")
    try:
        with progress(len(missing), "shards", unit="shard") as bar:
            for _ in ENGINES[job.shards.engine](missing, job):
                bar.update()
        finish(out, pieces, job)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error})") from error


def finish(out: Path, pieces: Sequence[Piece], job: PrepareJob) -> None:
    """Write the index, if this is the process that was done last."""
    shards = [out / shard_name(piece.number) for piece in pieces]
    left = sum(not shard.exists() for shard in shards)
    if left:
        say(f"{left:,} shards are left to others; whoever makes the last writes the index")
        return
    try:
        lock = Lock(out, "--out")
    except UserError:
        say("another process writes the index")
        return
    facts = build_index(out, shards, making_of(job), job.shards.duplicates == "drop")
    lock.file.close()
    say(
        f"{out}: {facts['pictures']:,} pictures and {facts['captions']:,} captions; {facts['left_out']:,} were left out, {facts['duplicates']:,} are the same file as another"
    )


def main(argv: Sequence[str] | None = None) -> None:
    with told_in_one_line():
        prepare(flags.parse_prepare(argv))


if __name__ == "__main__":
    main()
