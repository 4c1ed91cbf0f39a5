"""What the data sources share: pictures read by number, and the endless stream of samples that training takes them in.

Sample n of a run is picture order(n // size)[n % size], where order(k) is the k-th shuffle of those trained on. n alone decides the flip, the choice of
caption, the noise and the time of that sample, so neither the number of ranks nor a resumption changes what a step trains on.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from config import DiffusionConfig
from datasets.transforms import center_crop, open_rgb, random_crop, to_uint8
from denoiser import sample_time
from util import broken
from util.randomness import normal, stream, uniform
from util.text import PackedText


class Sample(NamedTuple):
    picture: Tensor  # (3, H, W) uint8
    condition: int  # label, or number of a caption
    number: int  # in the stream of the run
    broken: list[str]  # pictures that were passed over


class Batch(NamedTuple):
    """What a step takes.  Small arrays are NumPy's: a tensor from a loader's process costs the step a quarter of a millisecond, however small."""

    pictures: Tensor  # (B, 3, H, W) uint8
    y: Tensor | PackedText  # (B, ...), or labels and numbers of captions where the step looks them up
    t: np.ndarray  # (B,) float32, times
    dropped: np.ndarray  # (B,) bool, where the null takes the place of y
    numbers: list[int]  # of the samples
    broken: list[str]


class View(NamedTuple):
    """How a sample shows a picture."""

    img_size: int
    hflip: bool = False
    crop: str = "center"  # or "random"


class MappedStrings(Sequence):
    """Strings in one block of bytes.  ends: where each begins in it, and the last one ends."""

    def __init__(self, ends: np.ndarray, block: bytes | np.ndarray):
        self.ends, self.block = ends, block

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return bytes(self.block[self.ends[i] : self.ends[i + 1]]).decode("utf-8", "surrogateescape")


class PackedStrings(MappedStrings):
    """In memory: millions of Python objects would be copied into every loader process as it counts references."""

    def __init__(self, strings: Iterable[str]):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        super().__init__(np.cumsum([0, *map(len, encoded)], dtype=np.int64), b"".join(encoded))


class Joined(Sequence):
    """Those of one sequence, and after them those of another."""

    def __init__(self, first: Sequence[str], second: Sequence[str]):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, i: int) -> str:
        return self.first[i] if i < len(self.first) else self.second[i - len(self.first)]


class PictureDataset(Dataset):
    """Picture files by number.  dataset[index, n] -> Sample n, which shows picture `index`.

    Where a picture is broken the next one stands in, and its name travels back with the sample.
    """

    in_blocks = False  # whether there may be more than a shuffle can hold
    bad: Sequence[str] = ()  # a line for each row of the data that is no picture
    root: str | None = None  # what the paths begin with, where it is not the folder of the data
    beside = None  # where the features of its captions lie: a `Beside` for prepared pictures

    def __init__(self, paths: Iterable[str], view: View, seed: int = 0):
        self.paths, self.view, self.seed = PackedStrings(paths), view, seed
        self.fingerprints: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def img_size(self) -> int:
        return self.view.img_size

    def fingerprint(self, root: str | Path) -> str:
        """Of the names of all picture files, below `root`; taken once, since millions of names take seconds."""
        root = str(Path(self.root or root))
        if root not in self.fingerprints:
            value = hashlib.sha256()
            for path in self.paths:
                value.update(path.removeprefix(root).encode("utf-8", "surrogateescape") + b"\n")
            self.fingerprints[root] = value.hexdigest()[:32]
        return self.fingerprints[root]

    def condition(self, index: int, n: int) -> int:
        """The label of picture `index`, or the number of the caption that sample n shows it with."""
        raise NotImplementedError

    def file(self, index: int) -> str | BinaryIO:
        """Where Pillow reads picture `index` from."""
        return self.paths[index]

    def picture(self, index: int, n: int | None = None) -> Tensor:
        """As sample n shows it, before any flip; without n, as statistics and evaluations see it: its middle."""
        image = open_rgb(self.file(index))
        if n is None or self.view.crop == "center":
            return to_uint8(center_crop(image, self.img_size))
        return to_uint8(random_crop(image, self.img_size, [uniform(self.seed, f"crop/{what}", [n]).item() for what in ("scale", "left", "top")]))

    def readable(self, index: int, n: int | None = None) -> tuple[Tensor, int, list[str]]:
        """The first picture from `index` on that can be read, its number, and the broken ones passed over.

        Gives up, with an empty picture, after more broken ones in a row than a data set may have: the run ends then.
        """
        passed = []
        for offset in range(broken.most(len(self)) + 2):
            at = (index + offset) % len(self)
            try:
                return self.picture(at, n), at, passed
            except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, bombs
                passed.append(f"{self.paths[at]}: {type(error).__name__}: {error}")
        return torch.zeros(3, self.img_size, self.img_size, dtype=torch.uint8), index, passed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, n = key
        picture, index, passed = self.readable(index, n)
        if self.view.hflip and uniform(self.seed, "flip", [n]).item() < 0.5:
            picture = picture.flip(-1)
        return Sample(picture, self.condition(index, n), n, passed)


class Collate:
    """Samples to a batch, with their times and dropped conditions; `look_up` makes y of their labels or caption numbers."""

    def __init__(self, look_up: Callable[[Tensor], Tensor | PackedText] | None, diffusion: DiffusionConfig, drop_prob: float, seed: int):
        self.look_up, self.diffusion, self.drop_prob, self.seed = look_up, diffusion, drop_prob, seed

    def __call__(self, samples: list[Sample]) -> Batch:
        pictures, conditions, numbers, passed = zip(*samples)
        raw = torch.tensor(conditions)
        return Batch(
            pictures=torch.stack([picture.permute(1, 2, 0) for picture in pictures]).permute(0, 3, 1, 2),  # as they lie in memory
            y=self.look_up(raw) if self.look_up else raw,
            t=sample_time(normal(self.seed, "t", numbers, ()), self.diffusion).numpy(),
            dropped=(uniform(self.seed, "drop", numbers) < self.drop_prob).numpy(),
            numbers=list(numbers),
            broken=[line for lines in passed for line in lines],
        )


class Shuffle:
    """The order of the pictures that are trained on: shuffled anew every time round."""

    def __init__(self, pictures: Tensor, seed: int):
        """pictures: their indices, (size,)."""
        self.pictures, self.seed = pictures, seed
        self.latest = (-1, pictures)  # the shuffle in use and its number

    def __len__(self) -> int:
        return len(self.pictures)

    def first(self, count: int) -> list[int]:
        """Pictures that are the same in every run of the seed."""
        return self.pictures[:count].tolist()

    def some(self, number: int, place: int, count: int) -> list[int]:
        """At most `count` pictures of the shuffle `number`, from `place` on, at least one."""
        if self.latest[0] != number:
            self.latest = (number, self.pictures[torch.randperm(len(self), generator=stream(self.seed, "order", number))])
        return self.latest[1][place : place + count].tolist()


class BlockShuffle:
    """The same for more pictures than a shuffle can hold: blocks of BLOCK pictures in a row are shuffled, and then the pictures of WINDOW blocks among each other.

    It takes the memory of a number a block, and reads what lies together at nearly the same time. Those held out are left out.
    """

    BLOCK, WINDOW = 1024, 64

    def __init__(self, size: int, held_out: Tensor, seed: int):
        self.size, self.held_out, self.seed = size - len(held_out), held_out.sort().values, seed
        self.before = self.held_out - torch.arange(len(held_out))  # how many are trained on before each
        self.blocks = (-1, torch.empty(0, dtype=torch.long))
        self.window = ((-1, -1), torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        return self.size

    def first(self, count: int) -> list[int]:
        return self.some(0, 0, count)

    def some(self, number: int, place: int, count: int) -> list[int]:
        window, place = divmod(place, self.BLOCK * self.WINDOW)
        places = self.shuffled(number, window)[place : place + count]
        return (places + torch.searchsorted(self.before, places, right=True)).tolist()

    def shuffled(self, number: int, window: int) -> Tensor:
        """The pictures of a window, among those that are trained on."""
        if self.window[0] != (number, window):
            if self.blocks[0] != number:
                self.blocks = (number, torch.randperm(self.size // self.BLOCK, generator=stream(self.seed, "order of blocks", number)))
            blocks = self.blocks[1][window * self.WINDOW : (window + 1) * self.WINDOW]
            places = (blocks[:, None] * self.BLOCK + torch.arange(self.BLOCK)).flatten()
            if len(blocks) < self.WINDOW:  # the last window, with what is no whole block
                places = torch.cat([places, torch.arange(self.size // self.BLOCK * self.BLOCK, self.size)])
            order = torch.randperm(len(places), generator=stream(self.seed, f"order of window {window}", number))
            self.window = ((number, window), places[order])
        return self.window[1]


class StreamSampler(Sampler):
    """(index, n) of one rank's samples, from where the run begins or goes on to its last step; it knows nothing of epochs.

    A global batch is batch_size x world samples in a row, cut among the ranks; an accumulated step is several of them.
    Args: order: of the pictures that are trained on; batches: the numbers of the global batches.
    """

    def __init__(self, order: Shuffle | BlockShuffle, batch_size: int, batches: range, rank: int, world: int):
        self.order, self.batch_size, self.batches, self.rank, self.world = order, batch_size, batches, rank, world

    def indices(self, start: int, stop: int) -> list[int]:
        """Which pictures samples start to stop - 1 are."""
        found: list[int] = []
        while (n := start + len(found)) < stop:
            found += self.order.some(*divmod(n, len(self.order)), stop - n)
        return found

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for batch in self.batches:
            start = (batch * self.world + self.rank) * self.batch_size
            yield from zip(self.indices(start, start + self.batch_size), range(start, start + self.batch_size))

    def pictures_of(self, batch: int, count: int) -> list[int]:
        """All ranks' pictures of `count` global batches, from the run's number `batch` on."""
        size = self.batch_size * self.world
        return self.indices(batch * size, (batch + count) * size)
