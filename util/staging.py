"""A copy of a state in host memory, made while training goes on: one buffer of the exact size, which every copy is laid into anew."""

import mmap
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from util.logging import say

ALIGNMENT = 64  # bytes: a cache line, and more than any type asks for
PORTABLE = 1  # cudaHostRegisterPortable


class Staging:
    """`copy` takes the state as it is now. From a GPU it only asks for that, on a stream of its own: `settle` before the state changes, `wait` before the copy is read."""

    def __init__(self):
        self.memory: mmap.mmap | None = None  # shared, so that a fork copies no page of it
        self.locked = False
        self.stream: torch.cuda.Stream | None = None
        self.source: Any = None  # what is being copied, kept alive until the copy ends

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state as plain data in host memory, in place of the one before. Each tensor has a storage of its own, since torch.save writes whole storages."""
        tensors: list[Tensor] = []
        each_tensor(state, tensors.append)
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        self._reserve(max(sum(sizes), 1), device)
        offsets = accumulate(sizes, initial=0)
        with self._on_own_stream(state, device):
            return each_tensor(state, lambda tensor: self._place(tensor, next(offsets)).copy_(tensor.detach(), non_blocking=True))

    def settle(self) -> None:
        """Before the state changes: the GPU ends the copy first, and nothing else waits."""
        if self.source is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
            self.source = None

    def wait(self) -> None:
        """Until the copy is whole."""
        if self.stream:
            self.stream.synchronize()

    def _reserve(self, size: int, device: torch.device | None) -> None:
        if self.memory and len(self.memory) == size:
            return
        if self.locked:
            torch.cuda.cudart().cudaHostUnregister(address(self.memory))
        self.memory = mmap.mmap(-1, size)
        self.locked = device is not None and lock_pages(self.memory, device)

    def _place(self, tensor: Tensor, offset: int) -> Tensor:
        """Room for a tensor, with its strides."""
        if not tensor.numel():
            return torch.empty_like(tensor, device="cpu")
        strides = torch.empty_like(tensor, device="meta").stride()
        return torch.frombuffer(self.memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).as_strided(tensor.shape, strides)

    def _on_own_stream(self, state: Mapping[str, Any], device: torch.device | None) -> AbstractContextManager:
        """Inside, a GPU works on a stream of its own, after all that it was given before."""
        if device is None:
            return nullcontext()
        self.source, self.stream = state, self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self.stream)


def each_tensor(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Plain data with change(tensor) in place of every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: each_tensor(item, change) for key, item in value.items()}
    return [each_tensor(item, change) for item in value] if isinstance(value, list) else value


def address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def lock_pages(memory: mmap.mmap, device: torch.device) -> bool:
    """So that a GPU can write into it by itself. torch's own page-locked memory is rounded up to a power of two.  Returns: whether it could be done."""
    if error := int(torch.cuda.cudart().cudaHostRegister(address(memory), len(memory), PORTABLE)):
        say(f"warning: {len(memory) / 1e9:.1f} GB of host memory could not be page-locked (CUDA error {error}); training waits longer for each checkpoint")
        with suppress(RuntimeError):
            torch.zeros(1, device=device)  # CUDA tells the next kernel of the error, so here it is one that nobody needs
    return not error
