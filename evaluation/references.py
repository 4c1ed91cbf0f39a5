"""What drawn pictures are compared with: the data's own pictures, and statistics of them that are made once and kept."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.stream import PictureDataset
from util import broken, metrics, reference
from util import distributed as dist
from util.errors import UserError
from util.extractors import AT_A_TIME, Extractor, on_device
from util.files import beside, writable_folder
from util.logging import progress_bar, say
from util.workers import loader_deaths, loader_options


def spread(i: int, size: int, count: int) -> int:
    """Index below `size` of the i-th of `count` picks: evenly spaced if count < size, else cycling."""
    return i * size // count if count < size else i % size


class _Share(Dataset):
    """A rank's share of the pictures `chosen`, as training crops them, unflipped: place in `chosen`, and None for a broken one."""

    def __init__(self, dataset: PictureDataset, chosen: Sequence[int]):
        self.dataset, self.chosen = dataset, chosen
        self.places = range(dist.rank(), len(chosen), dist.world_size())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[int, Tensor | None]:
        place = self.places[i]
        try:
            return place, self.dataset.picture(self.chosen[place])
        except Exception:  # decoders raise nearly anything; counted by whoever asked
            return place, None


def _stacked(rows: list[tuple[int, Tensor | None]]) -> tuple[int, list[int], Tensor]:
    """One tensor a batch: a list of them would take a file descriptor for each picture on its way from the worker."""
    found = [(number, picture) for number, picture in rows if picture is not None]
    return len(rows), [number for number, _ in found], torch.stack([picture for _, picture in found]) if found else torch.empty(0)


def read_pictures(dataset: PictureDataset, chosen: Sequence[int], num_workers: int) -> Iterator[tuple[list[int], Tensor]]:
    """This rank's share of the pictures `chosen`: their places in it, and (B, 3, H, W) uint8; broken ones are left out.

    Raises: UserError where a process died; callers read within `loader_deaths` too, since torch may tell of it while they compute.
    """
    share = _Share(dataset, chosen)
    loader = DataLoader(share, AT_A_TIME, collate_fn=_stacked, **loader_options(num_workers))
    with progress_bar(len(share), "reference", unit="picture") as bar, loader_deaths():
        for count, places, pictures in loader:
            if places:
                yield places, pictures
            bar.update(count)


def facts_of(dataset: PictureDataset, root: str, extractor: Extractor) -> dict[str, str | int]:
    """What the data's own statistics are of; the files by their names."""
    return {
        "extractor": extractor.identity,
        "img_size": dataset.img_size,
        "crop": reference.CROP,
        "files": len(dataset),
        "data": dataset.fingerprint(root),
    }


def is_kept(path: Path, dataset: PictureDataset, root: str, extractor: Extractor) -> bool:
    """Whether `path` holds the statistics of this data set under this network.

    Raises: UserError where the file there does not say what it is of: somebody put it there.
    """
    try:
        facts = reference.read(path).facts
    except UserError:  # not there, or cut short: made anew
        return False
    if "data" not in facts:
        raise UserError(
            f"{path} does not say which pictures it was made from; to use it give --fid_stats {path}, or move it away to compute statistics of this data"
        )
    return all(facts.get(name) == value for name, value in facts_of(dataset, root, extractor).items())


def make_reference(dataset: PictureDataset, root: str, extractor: Extractor, path: Path, num_workers: int) -> None:
    """Statistics of all pictures under the training's crop into `path`.  Collective.

    Raises: UserError where over 1 % of the files cannot be read, or the file not be written.
    """
    if len(set(seen := dist.gather_objects(len(dataset)))) > 1:
        raise UserError(f"the processes see different data (pictures): {seen}; do all nodes see the same --data_path?")
    if dist.is_main():
        writable_folder(path.parent, "reference statistics:")
    say(f"reference statistics of {len(dataset)} pictures, made once, kept in {path}")
    moments = metrics.Moments()
    with on_device([extractor]), loader_deaths():
        for _, pictures in read_pictures(dataset, range(len(dataset)), num_workers):
            moments.add(extractor(pictures)[0])
    values, count = moments.statistics()
    if broken.too_many(len(dataset) - count, len(dataset)):
        raise UserError(f"{len(dataset) - count} of {len(dataset)} pictures below {root} cannot be read, over 1 %: no reference statistics are made")
    if count < len(dataset):
        say(f"{len(dataset) - count} broken pictures are left out of {path}")
    if dist.is_main():
        reference.write(path, values, facts_of(dataset, root, extractor) | {"n": count})
    dist.barrier()


@dataclass(frozen=True)
class Kept:
    """Where the data's own reference statistics are, or will be."""

    extractor: Extractor
    path: Path
    there: bool


def find_kept(name: str, extractor: Extractor, dataset: PictureDataset, root: str, output_dir: Path) -> Kept:
    """The statistics NAME_SIZE.npz of the data below `root`: beside the data, or in output_dir where nothing can be written there.  Collective.

    A file that is there is used where it is the data's.
    """
    file = f"{name}_{dataset.img_size}.npz"
    places = [beside(root, file), output_dir / file]

    def look() -> tuple[Path, bool]:
        kept = [path for path in places if is_kept(path, dataset, root, extractor)]
        return (kept[0], True) if kept else (places[not os.access(places[0].parent, os.W_OK)], False)

    return Kept(extractor, *dist.from_main(look() if dist.is_main() else None))
