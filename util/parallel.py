"""How a network is run: on which device, in which precision, by itself or under DDP."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util import distributed as dist
from util.text import Y


def uses_bf16(precision: str, device: torch.device) -> bool:
    """What --precision means on this device."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def to_device(tensor: Y, device: torch.device) -> Y:
    """Copy a small tensor without waiting for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def in_precision(net: Callable, device: torch.device, bf16: bool) -> Callable:
    """The network, or a part of it, under bf16 autocast, or as it is; weights, z_t and t stay float32 either way."""

    def call(*inputs):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return net(*inputs)

    return call


def wrap(net: nn.Module, device: torch.device) -> nn.Module:
    """The network as DDP trains it, or as it is in a world of one.  Collective: starts from rank 0's weights."""
    if not dist.in_group():
        return net
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel).parameters else "broadcast_buffers"
    return DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True, **{buffers: False})


class Parallel:
    """A network as training calls it: parallel(z_t, t, y) -> x_pred, under DDP where there is a group, under autocast where asked.  Collective to make."""

    def __init__(self, net: nn.Module, device: torch.device, bf16: bool):
        self.net, self.device, self.bf16 = wrap(net, device), device, bf16
        self.call = in_precision(self.net, device, bf16)

    def __call__(self, z_t: Tensor, t: Tensor, y: Y) -> Tensor:
        return self.call(z_t, t, y)

    def keeps_gradients(self, when: bool) -> AbstractContextManager:
        """Gradients stay on their rank inside: for all but the last part of an accumulated batch."""
        return self.net.no_sync() if when and isinstance(self.net, DistributedDataParallel) else nullcontext()
