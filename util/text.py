"""The states of captions' tokens, as they travel and as networks read them. Both have a row a caption and are used like a tensor of rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Text:
    """What a network that reads tokens is conditioned on: states (B, L, W), and mask (B, L), False where there is no token."""

    states: Tensor
    mask: Tensor

    @classmethod
    def null(cls, length: int, width: int) -> "Text":
        """Of no caption: one row without a token."""
        return cls(torch.zeros(1, length, width), torch.zeros(1, length, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def device(self) -> torch.device:
        return self.mask.device

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "Text":
        return Text(self.states[rows], self.mask[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Text":
        return Text(self.states.to(device, non_blocking=non_blocking), self.mask.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Text":
        return Text(self.states.pin_memory(), self.mask.pin_memory())

    def expand(self, count: int) -> "Text":
        """One row as `count`."""
        return Text(self.states.expand(count, -1, -1), self.mask.expand(count, -1))

    def without(self, dropped: Tensor) -> "Text":
        """The null in place of the rows `dropped`, (B,) bool."""
        return Text(self.states, self.mask & ~dropped[:, None])


@dataclass(frozen=True, eq=False)
class PackedText:
    """States as they leave a store or a loader's process: those of all tokens in a row, (tokens, W) float16; `lengths` (B,) of them are each caption's.

    On the device they become a Text of `padded_to` tokens a caption.
    """

    states: Tensor
    lengths: Tensor
    padded_to: int

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: slice | Sequence[int]) -> "PackedText":
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows
        captions = self.states.split(self.lengths.tolist())
        return PackedText(torch.cat([self.states[:0], *(captions[row] for row in chosen)]), self.lengths[rows], self.padded_to)

    def pin_memory(self) -> "PackedText":
        return PackedText(self.states.pin_memory(), self.lengths.pin_memory(), self.padded_to)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Text:
        """Copied, then padded there; nothing waits for the device."""
        states, lengths = self.states.to(device, non_blocking=non_blocking), self.lengths.to(device, non_blocking=non_blocking)
        place = torch.arange(self.padded_to, device=states.device)
        mask = place < lengths[:, None]
        starts = lengths.cumsum(0) - lengths
        rows = (starts[:, None] + place).masked_fill(~mask, 0)  # a caption without a token takes the first row, which the mask hides
        found = states[rows] if len(states) else states.new_zeros(*mask.shape, states.shape[1])
        return Text(found.float().masked_fill(~mask[..., None], 0), mask)


@dataclass(frozen=True, eq=False)
class Embedded:
    """What a network's `embed` has made of y: all that it needs of it, the same at every step of the solver.  value: (B, C) or (B, L, C)."""

    value: Tensor

    def __len__(self) -> int:
        return len(self.value)

    def expand(self, count: int) -> "Embedded":
        """One row as `count`."""
        return Embedded(self.value.expand(count, *self.value.shape[1:]))


Y = Tensor | Text  # labels (B,), pooled features (B, W), or tokens


def joined(first: Y | Embedded, second: Y | Embedded) -> Y | Embedded:
    """The rows of both, which are of one kind."""
    if isinstance(first, Text):
        return Text(torch.cat([first.states, second.states]), torch.cat([first.mask, second.mask]))
    if isinstance(first, Embedded):
        return Embedded(torch.cat([first.value, second.value]))
    return torch.cat([first, second])
