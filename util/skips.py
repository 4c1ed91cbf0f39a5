"""Steps whose gradient is not finite."""

import torch
from torch import Tensor

MOST_SKIPS = 10  # in a row


class Skips:
    """Such steps change neither weights nor optimizer; they are counted on the device, so that nothing waits.

    The gradient is the mean over all ranks, so all skip the same steps.
    """

    def __init__(self, device: torch.device, before: Tensor | None = None):
        """before: `kept` of the run that goes on."""
        self.total, self.in_a_row, self.longest, self.longest_at = torch.zeros(4, device=device)
        if before is not None:
            self.total, self.in_a_row = before.to(device)

    def kept(self) -> Tensor:
        """For a checkpoint: all of them, and the last ones in a row."""
        return torch.stack([self.total, self.in_a_row])

    def note(self, grad_norm: Tensor, step: int) -> Tensor:
        """Returns: 1.0 where step `step` (the first is 1) is to be skipped, as a fused optimizer takes it in `found_inf`."""
        skipped = (~grad_norm.isfinite()).float()
        self.total = self.total + skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.longest_at = torch.where(self.in_a_row > self.longest, step, self.longest_at)
        self.longest = torch.maximum(self.longest, self.in_a_row)
        return skipped

    def too_many(self) -> int | None:
        """The last of the longest row of skipped steps, if there were MOST_SKIPS; reads the device."""
        longest, at = torch.stack([self.longest, self.longest_at]).tolist()
        return int(at) if longest >= MOST_SKIPS else None
