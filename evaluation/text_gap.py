"""Does the model use the captions?  The v-loss of fixed pictures under their own captions, under each other's, and under none."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from conditioning import Conditions, expand_null
from config import DiffusionConfig
from datasets.transforms import to_model_range
from denoiser import Net, Objective, sample_time
from util import distributed as dist
from util.randomness import normal


class Chosen(NamedTuple):
    """Pictures that are measured: all ranks' captions, this rank's pictures."""

    lines: Tensor  # (size,) numbers of captions
    pictures: Tensor  # (share, 3, H, W) uint8

    @property
    def numbers(self) -> range:
        """Of this rank's pictures among all."""
        return range(len(self.lines))[dist.rank() :: dist.world_size()]


def choose(dataset, pictures: Sequence[int], size: int) -> Chosen:
    """`size` of the pictures, at least one a rank, round and round where there are fewer."""
    size = max(size, dist.world_size())
    found = [dataset.readable(pictures[i % len(pictures)])[:2] for i in range(size)]
    lines = torch.tensor([dataset.condition(index, i) for i, (_, index) in enumerate(found)])
    return Chosen(lines, torch.stack([picture for picture, _ in found[dist.rank() :: dist.world_size()]]))


class TextGap:
    """gap(net) -> figures.  A network that ignores its captions has the same loss under all three. The times are the quantiles of the training's.

    Each rank measures its share of the pictures, `batch_size` at a time.
    """

    def __init__(self, chosen: Chosen, conditions: Conditions, diffusion: DiffusionConfig, seed: int, batch_size: int, device: torch.device):
        lines, size, mine = chosen.lines, len(chosen.lines), chosen.numbers
        shift = min(range(1, size), key=lambda k: int((lines == lines.roll(k)).sum()))  # as few as can be keep their caption
        times = sample_time(torch.special.ndtri((torch.arange(size) + 0.5) / size), diffusion)
        self.size, self.numbers, self.pictures, self.t = size, mine, chosen.pictures.to(device), times[list(mine)].to(device)
        y = (conditions(lines[list(mine)]), conditions(lines.roll(shift)[list(mine)]), expand_null(conditions.null, len(mine)))
        self.y = [rows.to(device) for rows in y]
        self.objective, self.seed, self.batch_size = Objective(diffusion), seed, batch_size

    @torch.no_grad()
    def __call__(self, net: Net) -> dict[str, Tensor]:
        """net: as drawing calls it, without dropout.  Returns: the loss under the own captions, and what it grows by under the others' and under the null.  Collective."""
        sums = torch.zeros(3, device=self.t.device)
        for start in range(0, len(self.numbers), self.batch_size):
            part = slice(start, start + self.batch_size)
            x = to_model_range(self.pictures[part])
            noise = normal(self.seed, "gap", self.numbers[part], x.shape[1:], x.device)
            losses = [self.objective(net, x, noise, self.t[part], y[part]) for y in self.y]
            sums += len(x) * torch.stack(losses)
        own, shuffled, null = dist.sum_over_ranks(sums) / self.size
        return {"text_gap/loss": own, "text_gap/shuffled": shuffled - own, "text_gap/null": null - own}
