"""Captioned pictures to tar shards at training size: `python prepare_data.py --data_path DIR --img_size 256 --out shards`, and then `--data_path shards` everywhere.

With --llm_model_name the features of their captions are put beside them, for models that read them pooled.
Each shard is made whole or not at all, the same to the byte by whoever makes it, and none that is there is made again. Under torchrun, and as tasks of a Slurm array, every process takes
its share; the last to be done writes the index.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flags
from util.errors import UserError, told_in_one_line

if __name__ == "__main__":
    with told_in_one_line():
        flags.parse_prepare()  # before torch is imported

from config import PrepareJob
from datasets.pieces import Piece, broken_in, check_made, make, make_or_tell, making_of, pieces_of
from datasets.prepared import build_index
from datasets.shards import features_beside, shard_name, text_store
from datasets.source import workers
from text_beside import Encoding, checked, statistics
from util import distributed as dist
from util.broken import too_many
from util.errors import need_package
from util.files import Lock, remove_stale, writable_folder, write_whole
from util.logging import progress_bar, say
from util.workers import in_processes


def share() -> tuple[int, int]:
    """Which of how many this process is, under torchrun or in a Slurm array.  Raises: UserError where the array has gaps."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        said = {name: int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", usual)) for name, usual in (("ID", 0), ("MIN", 0), ("STEP", 1), ("COUNT", 1))}
        ids = range(said["MIN"], said["MIN"] + said["COUNT"] * said["STEP"], said["STEP"])
        if said["ID"] not in ids or int(os.environ.get("SLURM_ARRAY_TASK_MAX", ids[-1])) != ids[-1]:
            raise UserError(
                f"the task ids of this Slurm array are not evenly spaced, so shards would be missing; submit the whole array again (--array=0-{said['COUNT'] - 1}): finished shards are kept"
            )
        return ids.index(said["ID"]), len(ids)
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def by_processes(pieces: Sequence[Piece], job: PrepareJob) -> Iterator[int]:
    number, count = share()
    mine = [piece for piece in pieces if piece.number % count == number]
    processes = min(len(mine), workers(job.data))
    remedy = "if memory ran out, lower --num_workers; run the command again: finished shards are kept"
    with closing(in_processes(partial(make, job=job), mine, processes, remedy)) as done:
        made = (number for _, number in done)
        yield from map(encoding(job), made) if job.text else made


def encoding(job: PrepareJob) -> Encoding:
    """What encodes captions in this process, on its GPU."""
    from engine_jit import test_prompts  # with it come the networks: seconds, in each process

    return Encoding(job.text, Path(job.shards.out), dist.device_of(job.device), test_prompts)


class EncodingActor:
    """The same in a process of a Ray cluster that keeps its language model."""

    def __init__(self, job: PrepareJob):
        self.encoding = encoding(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row if row["error"] else row | {"number": self.encoding(int(row["number"]))}


def by_ray(pieces: Sequence[Piece], job: PrepareJob) -> Iterator[int]:
    """A task a shard on the Ray cluster of RAY_ADDRESS, or of this machine, and an actor a GPU that encodes captions; both are begun again where their worker or node died.

    Every node needs this program at the same path, and sees the data and --out.
    """
    need_package("ray", "--engine ray")
    import ray
    import ray.data

    if not pieces:
        return
    job = replace(job, data=replace(job.data, path=os.path.abspath(job.data.path)), shards=replace(job.shards, out=os.path.abspath(job.shards.out)))
    code = {"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parent)}}
    ray.init(address=os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False, logging_level="warning", runtime_env=code)
    try:
        made = ray.data.range(len(pieces), override_num_blocks=len(pieces)).map(lambda row: make_or_tell(pieces[row["id"]], job), num_cpus=1)
        if job.text:
            gpus = int(ray.cluster_resources().get("GPU", 0))
            takes = {"num_gpus": 1} if gpus else {"num_cpus": 0}
            made = made.map(EncodingActor, fn_constructor_args=(job,), concurrency=(1, max(1, gpus)), **takes)
        for row in made.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield row["number"]
    finally:
        ray.shutdown()


ENGINES = {"processes": by_processes, "ray": by_ray}


def is_done(out: Path, piece: Piece, job: PrepareJob) -> bool:
    shard = out / shard_name(piece.number)
    return shard.exists() and (not job.text or features_beside(shard).exists())


def check_apart(out: Path, source: Path) -> None:
    """Raises: UserError where the shards would lie within their own source, which the next call would take for data."""
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out} lies in --data_path {source}, and its shards would be taken for data at the next call; name a folder outside of it")


def prepare(job: PrepareJob) -> None:
    """Raises: UserError where it cannot be done."""
    check_apart(Path(job.shards.out), Path(job.data.path))
    out = writable_folder(job.shards.out, "--out")
    for folder in (out, text_store(out)):
        remove_stale(folder)
    pieces = pieces_of(job)
    check_made(pieces, job)
    if job.text:
        checked(job.text, Path(job.shards.out), dist.device_of(job.device))
    missing = [piece for piece in pieces if not is_done(out, piece, job)]
    say(f"{job.data.path}: {len(pieces):,} shards of {job.img_size} pixels, {len(missing):,} of them to be made")
    try:
        with progress_bar(len(missing), "shards", unit="shard") as bar, closing(ENGINES[job.shards.engine](missing, job)) as made:
            for _ in made:
                bar.update()
        finish(out, pieces, job)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error})") from error


def finish(out: Path, pieces: Sequence[Piece], job: PrepareJob) -> None:
    """Write the index, if this is the process that was done last."""
    left = sum(not is_done(out, piece, job) for piece in pieces)
    if left:
        say(f"{left:,} shards are left to others; whoever makes the last writes the index")
        return
    try:
        lock = Lock(out, "--out")
    except UserError:
        say("another process writes the index")
        return
    shards = [out / shard_name(piece.number) for piece in pieces]
    check_made(pieces, job)  # others may have made some
    tell_broken(out, *broken_in(shards))
    facts = build_index(out, shards, making_of(job), job.shards.duplicates == "drop", statistics if job.text else None)
    lock.free()
    say(
        f"{out}: {facts['pictures']:,} pictures and {facts['captions']:,} captions; {facts['left_out']:,} were left out, {facts['duplicates']:,} are the same file as another"
    )


def tell_broken(out: Path, lines: Sequence[str], total: int) -> None:
    """List what could not be used of `total` samples."""
    path = out / "bad_images.txt"
    path.unlink(missing_ok=True)
    if lines:
        write_whole(path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")))
        many = "warning: " if too_many(len(lines), total) else ""
        say(f"{many}{len(lines):,} of {total:,} samples cannot be used and are left out; {path} lists them, the first is {lines[0]}")


def main(argv: Sequence[str] | None = None) -> None:
    with told_in_one_line():
        prepare(flags.parse_prepare(argv))


if __name__ == "__main__":
    main()
