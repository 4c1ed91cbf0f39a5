"""Ranks, collectives and timeouts.  Besides this file only util/sharding.py and util/parts_writer.py use torch.distributed.  All of it works without torchrun too, as a world of one.

Functions marked "Collective" must be called by every rank, so never under `if is_main()`.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from util.errors import UserError, leave, one_line

ALONE = timedelta(hours=1)  # that the others wait while one rank encodes, scans, measures or writes
IN_STEPS = timedelta(minutes=10)  # that they wait for each other while they train
TOLD_FIRST = timedelta(seconds=90)  # gloo times out this much before NCCL: its failure becomes our one line, NCCL's ends the process with pages of output
GIVEN_UP = (
    "/gloo/",
    "Application timeout caused pair closure",
)  # in gloo's message of a wait that failed: its source file, or where another wait on the same connection failed
GRACE = 30  # seconds in which the main thread may still write a checkpoint, and end the process itself


def init(device: str) -> torch.device:
    """Join torchrun's group, if there is one, and pick this rank's device.  Collective.

    NCCL connects at once, so what is wrong with it shows before hours of encoding.
    Args: device: "cuda", "cpu" or "auto" (a GPU where there is one).  Raises: UserError for a GPU that is not there, or that is another rank's.
    """
    place = device_of(device)
    on_gpu = place.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(place)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        store, number, count = next(dist.rendezvous("env://", timeout=ALONE))
        store.set_timeout(ALONE)
        if on_gpu:
            claim(place, store, number)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=ALONE, device_id=place if on_gpu else None)
    return place


def torchrun_began() -> float | None:
    """When the torchrun that started this process began, in seconds since 1970; None without one, 0 where it cannot be told."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        pid = os.getppid()
        while b"TORCHELASTIC_RUN_ID=" in Path(f"/proc/{pid}/environ").read_bytes():  # a shell between the two
            pid, _ = parent_and_start(pid)
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + parent_and_start(pid)[1]
    except OSError:
        return 0.0


def parent_and_start(pid: int) -> tuple[int, float]:
    """The parent of a process, and when the process began, in seconds since the machine did (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold blanks
    return int(fields[1]), int(fields[19]) / os.sysconf("SC_CLK_TCK")


def device_of(device: str) -> torch.device:
    """This process's.  Raises: as init."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", gpu_of(local_rank(), gpus)) if device == "cuda" or (device == "auto" and gpus) else torch.device("cpu")


def gpu_of(number: int, gpus: int) -> int:
    """The GPU of process `number` of this node, where it sees so many; Slurm may show each process its own alone.  Raises: UserError where there is none."""
    if gpus == 1:
        return 0
    if number >= gpus:
        raise UserError(f"--device cuda: process {number + 1} of this node has no GPU ({gpus} found); try --device cpu or a smaller --nproc_per_node")
    return number


def claim(gpu: torch.device, store: dist.Store, number: int) -> None:
    """Raises: UserError where another rank has it already: two that see one GPU each may see the same."""
    uuid = torch.cuda.get_device_properties(gpu).uuid
    owner = int(store.compare_set(f"owner of GPU {uuid}", "", str(number)))
    if owner != number:
        raise UserError(
            f"--device cuda: ranks {owner} and {number} see the same one GPU ({uuid}); show each its own (Slurm: --gpus-per-task=1), "
            "or try --device cpu or a smaller --nproc_per_node"
        )


@contextmanager
def patience(limit: timedelta) -> Iterator[None]:
    """Inside, a collective fails after a rank has waited that long for the others.  Collective at both ends, so that all change the limit together."""
    if not dist.is_initialized() or not hasattr(dist.ProcessGroup, "set_timeout"):  # torch 2.15 has it
        yield
        return
    before = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    wait_at_most(limit)
    yield
    wait_at_most(before)


def wait_at_most(limit: timedelta) -> None:
    """Set the timeout of collectives from now on.  Collective."""
    barrier()
    dist.group.WORLD.set_timeout(limit + TOLD_FIRST)
    dist.group.WORLD._get_backend(torch.device("cpu")).set_timeout(limit)


def lost(error: RuntimeError) -> str:
    """What to say of a wait that gloo gave up."""
    said = re.sub(r"^\[\S*\] ", "", one_line(error))  # its source file
    return f"rank {rank()} of {world_size()} lost contact with the others: one of them died or hangs; its own output may say why (here: {said})"


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Raises: UserError where another rank died or was waited for in vain."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in GIVEN_UP):
            raise
        raise UserError(lost(error)) from error


def leave_if_hung(work: torch.futures.Future) -> None:
    """Called by gloo's thread when an exchange has ended: the main thread may be waiting for a GPU that waits for the other ranks, and never say it."""
    try:
        work.value()
    except RuntimeError as error:
        if "imed out" in str(error):
            time.sleep(GRACE)
            leave(f"error: {lost(error)}", 1)


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def in_group() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def group_of_cpus() -> dist.ProcessGroup:
    """A group of all ranks of its own, for a thread that must not meet what the others exchange.  Collective."""
    return dist.new_group(timeout=ALONE, backend="gloo")


def sum_over_ranks(value: Tensor) -> Tensor:
    """Collective."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


class Exchange:
    """Tells all ranks whether any of them says yes, one call late: each call starts an exchange on the CPU and ends the one before."""

    def __init__(self):
        self.work, self.votes = None, torch.zeros(1)

    def any(self, mine: bool) -> bool:
        """What the ranks said at the call before; without a group, what is said now.  Collective."""
        if not dist.is_initialized():
            return mine
        if self.work is not None:
            self.work.wait()
        before = self.votes.item() > 0
        self.votes = torch.tensor([float(mine)])
        self.work = dist.all_reduce(self.votes, async_op=True)
        self.work.get_future().add_done_callback(leave_if_hung)
        return before


def gather_rows(rows: Tensor, main_only: bool = False) -> Tensor:
    """All ranks' rows, rank 0's first, on the CPU; ranks may hold different numbers of them.  Collective.

    With `main_only` the other ranks get none, and need no memory for them.
    """
    rows = rows.cpu()
    if not dist.is_initialized():
        return rows
    counts = gather_objects(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    receives = not main_only or is_main()
    parts = [torch.empty_like(padded) for _ in counts] if receives else None
    if main_only:
        dist.gather(padded, parts)
    else:
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)]) if receives else rows[:0]


def gather_objects(value) -> list:
    """One plain object of each rank.  Collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Collective.  Over the CPU's group, so it needs no GPU to be named."""
    gather_objects(None)


def from_main(value):
    """Rank 0's plain object.  Collective."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]
