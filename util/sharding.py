"""A network whose weights are shared out among the processes, a part of each tensor to each: torch's FSDP2.

Weights, averages and optimizer are DTensors then. What trains sees none of it; what draws is a plain network that holds the whole weights while it is wanted.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from util import distributed as dist
from util.errors import UserError
from util.parts import Spread


def check_layout(kind: str) -> None:
    """Raises: UserError where the processes cannot share the weights so."""
    if kind != "ddp" and not dist.in_group():
        raise UserError(f"--parallel {kind} shards the weights over several processes; start it with torchrun")
    if kind == "hsdp" and dist.world_size() % dist.local_world_size():
        raise UserError(
            f"--parallel hsdp needs the same number of processes on every node; there are {dist.world_size()} in all, {dist.local_world_size()} of them on this node"
        )


def mesh_of(kind: str, device: torch.device) -> DeviceMesh:
    """All processes in a row for fsdp; for hsdp a row a node, and all nodes hold the same.  Collective."""
    world, node = dist.world_size(), dist.local_world_size()
    if kind == "fsdp":
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // node, node), mesh_dim_names=("replicate", "shard"))


def shard(net: nn.Module, kind: str, device: torch.device) -> None:
    """Each block by itself, and what is left: while a block computes, its weights alone are whole.  Every process has the same weights before.  Collective."""
    mesh = mesh_of(kind, device)
    for block in net.repeated:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def is_sharded(net: nn.Module) -> bool:
    return isinstance(net, FSDPModule)


def whole(tensor: Tensor | Spread) -> Tensor:
    """All of it, on every process.  Collective where it is shared out."""
    if isinstance(tensor, Spread):
        return tensor[:]
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_as(like: Tensor, value: Tensor | Spread) -> Tensor:
    """What every process has, or can read, shared out as `like` is, by rows; nothing is exchanged."""
    if not isinstance(like, DTensor):
        return whole(value)
    mesh, placements = like.device_mesh, like.placements
    rows = distribute_tensor(torch.arange(len(like), device=like.device), mesh, placements, src_data_rank=None).to_local().tolist()
    local = value[rows[0] : rows[-1] + 1] if rows else value[:0]
    return DTensor.from_local(local.to(like.device), mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


@torch.no_grad()
def fill(target: Tensor, value: Tensor | Spread) -> None:
    """The whole `value` into a tensor, or into this process's part of it."""
    target.copy_(shared_as(target, value))


@contextmanager
def holding(copy: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a plain network has those weights, whole; outside it holds none.  Collective."""
    params = dict(copy.named_parameters())
    for name, param in params.items():
        param.data = whole(weights[name].detach())
    try:
        yield
    finally:
        let_go(copy)


def let_go(copy: nn.Module) -> None:
    """Of the memory of all its weights."""
    for param in copy.parameters():
        param.data = param.data.new_empty(0)
