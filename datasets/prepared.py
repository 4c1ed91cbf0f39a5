"""Prepared data: shards, and an index that is written once and mapped into memory by all processes.

`build_index` puts what is known of all shards into arrays in `index/`. Opening a hundred million pictures takes no time then, and next to no memory a process.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from datasets.captioned import CaptionedPictures
from datasets.shards import VERSION, Making, features_beside, read_facts, text_store
from datasets.stream import MappedStrings, View
from datasets.tar import Pictures
from datasets.transforms import open_picture, to_uint8
from util.errors import UserError, one_line

INDEX, FACTS, TEXT_STATISTICS = "index", "facts.json", "text_statistics.safetensors"
PLACE = np.dtype([("shard", "<u4"), ("size", "<u4"), ("offset", "<u8")])


def build_index(
    out: Path, shards: Sequence[Path], making: Making, drop_duplicates: bool, statistics: Callable[["Beside"], dict[str, Tensor]] | None = None
) -> dict[str, Any]:
    """The arrays of all shards, in a folder that is there whole or not at all.

    statistics: of the captions' features, where each shard has them beside it.
    Returns: what it says of them.  Raises: UserError, OSError.
    """
    firsts = first_of_each_file(shards)
    if not sum(map(len, firsts)):
        raise nothing_left(out, shards, making)
    part = out / f".{INDEX}.tmp"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    counts = {"pictures": 0, "captions": 0, "duplicates": 0, "left_out": 0}
    made, indexed, fingerprint = [], [], hashlib.sha256()
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(part / name, "wb")) for name in ("places", "counts", "lengths", "captions", "rows")}
        for number, (shard, first) in enumerate(zip(shards, firsts)):
            facts, arrays = read_facts(shard)
            kept = first if drop_duplicates else np.ones_like(first)
            taken = of_kept(number, arrays, kept)
            for name, file in files.items():
                file.write(taken[name].tobytes())
            made.append(len(arrays["lengths"]))
            indexed.append(len(taken["rows"]))
            counts["pictures"] += int(kept.sum())
            counts["captions"] += indexed[-1]
            counts["duplicates"] += int((~first).sum())
            counts["left_out"] += left_out(facts)
            fingerprint.update(facts["sha256"].encode() + kept.tobytes())
    cumulated(part, "counts", "first", counts["pictures"])
    cumulated(part, "lengths", "ends", counts["captions"])
    found = {
        "version": VERSION,
        "making": making._asdict(),
        **counts,
        "shards": [shard.name for shard in shards],
        "captions_made": made,
        "captions_indexed": indexed,
    }
    found["fingerprint"] = fingerprint.hexdigest()[:32]
    if statistics:
        save_file(statistics(Beside.of(out, part, found)), part / TEXT_STATISTICS)
    (part / FACTS).write_text(json.dumps(found), encoding="utf-8")
    shutil.rmtree(out / INDEX, ignore_errors=True)
    part.rename(out / INDEX)
    return found


def left_out(facts: dict[str, Any]) -> int:
    """Samples of a shard's source that are not in it."""
    return len(facts["broken"]) + facts["too_small"]


def nothing_left(out: Path, shards: Sequence[Path], making: Making) -> UserError:
    """Why shards hold no picture."""
    facts = [read_facts(shard, only=())[0] for shard in shards]
    small = sum(one["too_small"] for one in facts)
    broken = sum(map(left_out, facts)) - small
    return UserError(
        f"--out {out}: no picture is left; {broken:,} cannot be used (bad_images.txt there lists them), {small:,} are smaller than --min_size {making.min_size}. "
        "Fix the data or lower --min_size, and give another --out"
    )


def first_of_each_file(shards: Sequence[Path]) -> list[np.ndarray]:
    """For each shard, which of its pictures are not the same file as one before, (pictures,) bool."""
    hashes = [read_facts(shard, ["hashes"])[1]["hashes"] for shard in shards]
    first = np.zeros(sum(map(len, hashes)), dtype=bool)
    first[np.unique(np.concatenate(hashes), return_index=True)[1]] = True
    return np.split(first, np.cumsum([len(one) for one in hashes])[:-1])


def of_kept(number: int, arrays: Mapping[str, np.ndarray], kept: np.ndarray) -> dict[str, np.ndarray]:
    """What the index holds of the pictures `kept` of a shard, by the names of its files."""
    keep = np.repeat(kept, arrays["counts"])  # of its captions
    place = np.empty(len(kept), PLACE)
    place["shard"], place["offset"], place["size"] = number, arrays["places"][:, 0], arrays["places"][:, 1]
    return {
        "places": place[kept],
        "counts": arrays["counts"][kept],
        "lengths": arrays["lengths"][keep],
        "captions": arrays["captions"][np.repeat(keep, arrays["lengths"])],
        "rows": np.flatnonzero(keep).astype("<u4"),
    }


def cumulated(folder: Path, name: str, becomes: str, count: int) -> None:
    """A file of uint64 running sums, from 0 on, of a file of uint32 counts, which goes."""
    numbers = np.memmap(folder / name, "<u4", "r") if count else np.empty(0, "<u4")
    total = 0
    with open(folder / becomes, "wb") as file:
        file.write(np.zeros(1, "<u8").tobytes())
        for start in range(0, count, 1 << 20):
            sums = total + np.cumsum(numbers[start : start + (1 << 20)], dtype="<u8")
            total = sums[-1]
            file.write(sums.tobytes())
    (folder / name).unlink()


# --- captions' features beside the pictures


@dataclass(frozen=True)
class Beside:
    """Where the features of an index's captions lie.  beside[numbers of captions] -> rows of the store's shards `names`."""

    folder: Path  # of the store
    names: list[str]
    counts: list[int]  # captions of each shard
    ends: np.ndarray  # (shards + 1,) captions of the index before each shard, and in all
    rows: np.ndarray  # (captions,) place of each in its shard
    statistics: dict[str, Tensor]  # mean and std of a fixed sample, each (1, width)

    @classmethod
    def of(cls, path: Path, index: Path, facts: dict[str, Any], statistics: dict[str, Tensor] | None = None) -> "Beside":
        names = [features_beside(path / name).name for name in facts["shards"]]
        rows = np.memmap(index / "rows", "<u4", "r", shape=facts["captions"])
        return cls(text_store(path), names, facts["captions_made"], np.cumsum([0, *facts["captions_indexed"]]), rows, statistics or {})

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        """Rows of those shards."""
        return int(self.starts[-1])

    @cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *self.counts])

    def __getitem__(self, lines: np.ndarray) -> np.ndarray:
        return self.starts[np.searchsorted(self.ends, lines, side="right") - 1] + self.rows[lines]


class Names(Sequence):
    """What messages call the pictures."""

    def __init__(self, shards: list[str], places: np.ndarray):
        self.shards, self.places = shards, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> str:
        place = self.places[i]
        return f"{self.shards[place['shard']]}, byte {place['offset']}"


def is_prepared(path: Path) -> bool:
    return os.path.isfile(path / INDEX / FACTS)  # not, where the folder may not be entered


class PreparedPictures(CaptionedPictures):
    """The pictures of a prepared folder.  Raises: UserError where its index is none, or holds smaller pictures than are asked for."""

    in_blocks = True

    def __init__(self, path: Path, view: View, seed: int = 0):
        folder = path / INDEX
        try:
            self.facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            pictures, captions, size = self.facts["pictures"], self.facts["captions"], self.facts["making"]["img_size"]
            places = np.memmap(folder / "places", PLACE, "r", shape=pictures)
            self.first = np.memmap(folder / "first", "<u8", "r", shape=pictures + 1).view("<i8")
            ends = np.memmap(folder / "ends", "<u8", "r", shape=captions + 1)
            block = np.memmap(folder / "captions", np.uint8, "r")
            if (noted := folder / TEXT_STATISTICS).is_file():
                self.beside = Beside.of(path, folder, self.facts, load_file(noted))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"--data_path {path}: its index cannot be read ({one_line(error)}); remove {folder}, and run prepare_data.py again") from error
        if view.img_size > size:
            raise UserError(f"--data_path {path} was prepared at {size} pixels, and --img_size is {view.img_size}; prepare it again at that size")
        shards = [str(path / name) for name in self.facts["shards"]]
        self.paths, self.view, self.seed = Names(shards, places), view, seed
        self.captions, self.read = MappedStrings(ends, block), Pictures(shards, places[["shard", "offset", "size"]])

    def picture(self, index: int, n: int | None = None) -> Tensor:
        """As it lies there, where that is all that is asked for."""
        if self.img_size == self.facts["making"]["img_size"] and (n is None or self.view.crop == "center"):
            return to_uint8(open_picture(self.file(index)))
        return super().picture(index, n)

    def fingerprint(self, root: str | Path) -> str:
        return self.facts["fingerprint"]
