"""How a network is run: on which device, in which precision, compiled or not, by itself, under DDP or sharded; in training, and in drawing."""

import copy
import os
import shutil
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util import distributed as dist
from util.errors import UserError
from util.logging import say
from util.sharding import is_sharded
from util.text import Y

BACKEND = "inductor"
MOST_GRAPHS = 64  # of a block: by context tokens, dropout, batch, training or drawing; torch's own limit is 8, and an error beyond it


def has_bf16(device: torch.device) -> bool:
    """Whether it is a GPU that computes in bf16.  One before compute capability 8 (T4, RTX 20) emulates it, slowly, and Inductor compiles nothing in it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """What --precision means on this device."""
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


def to_device(tensor: Y, device: torch.device) -> Y:
    """Copy a small tensor without waiting for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def in_precision(net: Callable, device: torch.device, bf16: bool) -> Callable:
    """The network, or a part of it, under bf16 autocast, or as it is; weights, z_t and t stay float32 either way."""

    def call(*inputs):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return net(*inputs)

    return call


def compiler_lacks(device: torch.device, bf16: bool = False) -> str:
    """What torch.compile would not find on this machine."""
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        return "Triton"
    if device.type == "cuda" and bf16 and not has_bf16(device):
        return "a GPU that computes in bf16 (--precision fp32 is faster on this one)"
    scheme = "posix_prefix" if sysconfig.get_default_scheme() == "posix_local" else sysconfig.get_default_scheme()  # as Triton looks for them on Debian
    places = [sysconfig.get_paths(scheme)["include"], *os.environ.get("CPATH", "").split(":"), *os.environ.get("C_INCLUDE_PATH", "").split(":")]
    if not any(Path(place, "Python.h").is_file() for place in places if place):
        return "Python.h (Debian and Ubuntu: python3-dev)"
    names = [os.environ.get("CC"), "gcc", "clang"] if device.type == "cuda" else [os.environ.get("CXX"), "g++", "clang++"]
    return "" if any(name and shutil.which(name) for name in names) else f"a compiler ({names[1]})"


@cache
def tell_lacking(lacking: str) -> None:
    say(f"warning: {lacking} was not found, so nothing is compiled and training takes about twice as long; give --no-compile if you want that")


def uses_compile(asked: bool | None, device: torch.device, bf16: bool = False, usual: bool = True) -> bool:
    """What --compile means on this device.  usual: whether it pays on a GPU.  Raises: UserError where it is asked for and cannot be had."""
    wanted = usual and device.type == "cuda" if asked is None else asked
    lacking = compiler_lacks(device, bf16) if wanted else ""
    if lacking and asked:
        raise UserError(f"--compile needs {lacking}, which was not found; install it, or leave out --compile")
    if lacking:
        tell_lacking(lacking)  # once, though training and the drawing that goes with it ask both
    return wanted and not lacking


def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)


def compile_blocks(net: nn.Module, dynamic: bool | None) -> None:
    """Each block by itself: few graphs, and all names stay.  dynamic: False for batches of one size, None for several."""
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    torch._dynamo.config.optimize_ddp = False  # it would cut each block at DDP's buckets; gradients travel block by block anyway
    how = {"fullgraph": True, "dynamic": dynamic, "backend": BACKEND}
    for block in net.repeated:
        if is_sharded(block):  # its weights are brought together outside the graph
            block.forward = torch.compile(block.forward, **how)
        else:
            block.compile(**how)


def twin(module: nn.Module) -> nn.Module:
    """A network of its own over the same weights."""
    found = copy.copy(module)
    found._modules = {name: child and twin(child) for name, child in module._modules.items()}
    return found


def for_drawing(net: nn.Module, device: torch.device, bf16: bool, compile: bool = False) -> tuple[Callable, Callable]:
    """net and net.embed as drawing calls them: over the same weights, also after they change; without dropout, and compiled apart from training."""
    drawn = twin(net).eval()
    drawn.grad_checkpointing = False
    if compile:
        compile_blocks(drawn, dynamic=None)
    return in_precision(drawn, device, bf16), in_precision(drawn.embed, device, bf16)


def wrap(net: nn.Module, device: torch.device) -> nn.Module:
    """The network as DDP trains it, or as it is where it is sharded, and in a world of one.  Collective: DDP starts from rank 0's weights."""
    if not dist.in_group() or is_sharded(net):
        return net
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel).parameters else "broadcast_buffers"
    return DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True, **{buffers: False})


class Parallel:
    """A network as training calls it: parallel(z_t, t, y) -> x_pred, under DDP where there is a group and it is whole, under autocast where asked.  Collective to make."""

    def __init__(self, net: nn.Module, device: torch.device, bf16: bool, compile: bool = False):
        if compile:
            compile_blocks(net, dynamic=False)
        self.net, self.device, self.bf16 = wrap(net.train(), device), device, bf16
        self.call = in_precision(self.net, device, bf16)

    def __call__(self, z_t: Tensor, t: Tensor, y: Y) -> Tensor:
        return self.call(z_t, t, y)

    def keeps_gradients(self, when: bool) -> AbstractContextManager:
        """Inside, DDP exchanges no gradients: for all but the last part of an accumulated batch. Sharded ones always are: unexchanged they would take the memory of whole tensors."""
        return self.net.no_sync() if when and isinstance(self.net, DistributedDataParallel) else nullcontext()
