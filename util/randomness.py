"""Random numbers as functions of (seed, what they are for, index), never of history.

So a resumed run equals an uninterrupted one, and picture i does not depend on batch size, world size or its neighbours.
"""

from collections.abc import Iterable
from hashlib import blake2b

import torch
from torch import Tensor


def derive(seed: int, purpose: str, index: int) -> int:
    """A seed of 63 bits for one purpose and one index (a sample's number, a step, a picture of an evaluation)."""
    return int.from_bytes(blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest(), "little") >> 1


def stream(seed: int, purpose: str, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(derive(seed, purpose, index))


def normal(seed: int, purpose: str, indices: Iterable[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """(len(indices), *shape) standard normal numbers, each row a function of its index.

    On the CPU the numbers are the same everywhere; CUDA's generator depends on the card.
    """
    return torch.stack([torch.randn(shape, generator=stream(seed, purpose, i, device), device=device) for i in indices])


def uniform(seed: int, purpose: str, indices: Iterable[int]) -> Tensor:
    """(len(indices),) numbers in [0, 1) on the CPU, each a function of its index."""
    return torch.cat([torch.rand(1, generator=stream(seed, purpose, i)) for i in indices])
