"""What the data sources share: pictures read by number, and the endless stream of samples that training takes them in.

Sample n of a run is picture order(n // size)[n % size], where order(k) is the k-th shuffle. n alone decides the flip, the choice of
caption, the noise and the time of that sample, so neither the number of ranks nor a resumption changes what a step trains on.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from datasets.transforms import center_crop, open_rgb, to_uint8
from util.randomness import stream, uniform


class PictureDataset(Dataset):
    """Picture files by number.  dataset[index, n] -> (uint8 (3, H, W), condition, n, broken files met on the way).

    Where a file cannot be read the next one stands in, and its name travels back with the sample.
    """

    def __init__(self, paths: Sequence[str], img_size: int, hflip: bool, seed: int = 0):
        self.paths, self.img_size, self.hflip, self.seed = paths, img_size, hflip, seed

    def __len__(self) -> int:
        return len(self.paths)

    def condition(self, index: int, n: int) -> str | int:
        """The caption or label of picture `index` as sample n shows it."""
        raise NotImplementedError

    def picture(self, index: int) -> Tensor:
        return to_uint8(center_crop(open_rgb(self.paths[index]), self.img_size))

    def readable(self, index: int) -> tuple[Tensor, int, list[str]]:
        """The first picture from `index` on that can be read, its number, and the files passed over.

        Gives up, with an empty picture, when over 1 % of the files in a row cannot be read: then the caller stops the run.
        """
        broken = []
        for offset in range(len(self) // 100 + 2):
            at = (index + offset) % len(self)
            try:
                return self.picture(at), at, broken
            except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, bombs
                broken.append(f"{self.paths[at]}: {type(error).__name__}: {error}")
        return torch.zeros(3, self.img_size, self.img_size, dtype=torch.uint8), index, broken

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, str | int, int, list[str]]:
        index, n = key
        picture, index, broken = self.readable(index)
        if self.hflip and uniform(self.seed, "flip", [n]).item() < 0.5:
            picture = picture.flip(-1)
        return picture, self.condition(index, n), n, broken


def collate(samples: list[tuple[Tensor, str | int, int, list[str]]]) -> tuple[Tensor, list[str] | Tensor, list[int], list[str]]:
    """(B, 3, H, W) uint8; labels (B,) int64 or a list of captions; sample numbers; broken files."""
    pictures, conditions, numbers, broken = zip(*samples)
    labels = torch.tensor(conditions) if isinstance(conditions[0], int) else list(conditions)
    return torch.stack(pictures), labels, list(numbers), [line for lines in broken for line in lines]


class StreamSampler(Sampler):
    """(index, n) of one rank's samples in one epoch.

    A global batch is batch_size x world samples in a row, cut among the ranks; an accumulated step is several of them.
    """

    def __init__(self, size: int, batch_size: int, batches: int, rank: int, world: int, seed: int):
        self.size, self.batch_size, self.batches, self.rank, self.world, self.seed = size, batch_size, batches, rank, world, seed
        self.epoch = 0
        self._order = (-1, [])  # the shuffle in use and its number

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def order(self, number: int) -> list[int]:
        if self._order[0] != number:
            self._order = (number, torch.randperm(self.size, generator=stream(self.seed, "order", number)).tolist())
        return self._order[1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for batch in range(self.epoch * self.batches, (self.epoch + 1) * self.batches):
            first = (batch * self.world + self.rank) * self.batch_size
            for n in range(first, first + self.batch_size):
                yield self.order(n // self.size)[n % self.size], n
