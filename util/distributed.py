"""The one module that talks to torch.distributed.  Everything works without torchrun too, as a world of one.

Functions marked "Collective" must be called by every rank, so never under `if is_main()`.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from util.errors import UserError


def init(device: str) -> torch.device:
    """Join torchrun's group, if there is one, and pick this rank's device.  Collective.

    Args: device: "cuda", "cpu" or "auto" (a GPU where there is one).  Raises: UserError for a GPU that is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda":
        if local_rank >= gpus:
            raise UserError(f"--device cuda: process {local_rank + 1} of this node has no GPU ({gpus} found); try --device cpu or a smaller --nproc_per_node")
        torch.cuda.set_device(local_rank)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    return torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")


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


def is_main() -> bool:
    return rank() == 0


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
