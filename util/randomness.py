"""Random numbers as functions of (seed, what they are for, index), never of history.

So a resumed run equals an uninterrupted one, and picture i does not depend on batch size, world size or its neighbours.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import torch
from torch import Tensor


def derive(seed: int, purpose: str, index: int) -> int:
    """A seed of 63 bits for one purpose and one index (a sample's number, a step, a picture of an evaluation)."""
    return int.from_bytes(blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest(), "little") >> 1


def stream(seed: int, purpose: str, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, purpose, index))


def seed_step(seed: int, index: int, device: torch.device) -> None:
    """What dropout draws from: torch.manual_seed for the CPU and one device, without its look at devices of every other make, which takes longer than the rest."""
    value = derive(seed, "dropout", index)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(value)


def with_streams(rows: Tensor, seed: int, purpose: str, indices: Sequence[int]) -> Iterator[tuple[Tensor, torch.Generator]]:
    """Each row with the stream of its index: one generator that is seeded anew, which is far cheaper than as many generators."""
    generator = torch.Generator(rows.device)
    for row, index in zip(rows.unbind(), indices, strict=True):
        yield row, generator.manual_seed(derive(seed, purpose, index))


def normal(seed: int, purpose: str, indices: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """(len(indices), *shape) standard normal numbers, each row a function of its index: what torch.randn draws from its stream.

    On the CPU the numbers are the same everywhere; CUDA's generator depends on the card.
    """
    rows = torch.empty(len(indices), *shape, device=device)
    for row, generator in with_streams(rows, seed, purpose, indices):
        row.normal_(generator=generator)
    return rows


def uniform(seed: int, purpose: str, indices: Sequence[int]) -> Tensor:
    """(len(indices),) numbers in [0, 1) on the CPU, each a function of its index."""
    rows = torch.empty(len(indices))
    for row, generator in with_streams(rows, seed, purpose, indices):
        row.uniform_(generator=generator)
    return rows
