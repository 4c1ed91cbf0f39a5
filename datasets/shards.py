"""Prepared data: tar shards of squares at training size, and an index that is written once and mapped into memory by all processes.

A shard is an ordinary tar in WebDataset's naming, made by `prepare_shard`, whole or not at all, the same to the byte whoever makes it. Beside it stands what is known of its
samples, as safetensors. `build_index` puts all of that into arrays in `index/`. Opening a hundred million pictures takes seconds then, and next to no memory a process.
"""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from datasets.captioned import CaptionedPictures, Rows
from datasets.stream import View
from datasets.tar import Pictures
from datasets.transforms import center_crop, open_rgb, to_uint8
from util.errors import UserError, one_line
from util.files import write_whole

VERSION = 1
INDEX, FACTS = "index", "facts.json"
ENCODERS = {
    "jpeg": ("jpg", {"format": "JPEG", "quality": 95, "subsampling": 0}),  # 4:4:4
    "png": ("png", {"format": "PNG"}),
    "webp": ("webp", {"format": "WEBP", "lossless": True}),
}
HEADER = 512  # bytes before a file in a tar
PLACE = np.dtype([("shard", "<u4"), ("size", "<u4"), ("offset", "<u8")])


class Making(NamedTuple):
    """How shards are made."""

    img_size: int
    image_format: str = "jpeg"
    min_size: int = 0  # of a picture's short side


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def facts_beside(shard: Path) -> Path:
    return shard.with_suffix(".safetensors")


def prepare_shard(out: Path, number: int, rows: Rows, which: range, making: Making) -> Path:
    """The shard of those rows; it is done where its name is there.  Raises: OSError."""
    shard = out / shard_name(number)
    if not shard.exists():
        made = Made(making)
        write_whole(shard.with_suffix(".tar.part"), partial(made.write, rows=rows, which=which), shared=True)
        write_whole(facts_beside(shard), lambda file: file.write(made.facts()), shared=True)
        with suppress(FileNotFoundError):  # another process made it too, and was quicker
            shard.with_suffix(".tar.part").rename(shard)
    return shard


class Made:
    """A shard as it is written, and what is known of its samples then."""

    def __init__(self, making: Making):
        self.making, self.hash = making, hashlib.sha256()
        self.places: list[tuple[int, int]] = []  # offset, size
        self.sizes: list[tuple[int, int]] = []  # of the pictures as they were
        self.hashes: list[int] = []  # of their files
        self.captions: list[tuple[str, ...]] = []
        self.left_out: list[str] = []

    def write(self, file: BinaryIO, rows: Rows, which: range) -> None:
        suffix, _ = ENCODERS[self.making.image_format]
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, i in enumerate(which):
                try:
                    raw = rows.read(i).read() if rows.read else Path(rows.paths[i]).read_bytes()
                    picture, size = self.square(raw)
                except Exception as error:  # decoders raise nearly anything
                    self.left_out.append(f"{rows.paths[i]}: {one_line(error)}")
                    continue
                self.places.append((self.add(tar, f"{number:08d}.{suffix}", picture), len(picture)))
                self.add(tar, f"{number:08d}.txt", "\n".join(rows.captions[i]).encode())
                self.sizes.append(size)
                self.hashes.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"))
                self.captions.append(tuple(rows.captions[i]))

    def square(self, raw: bytes) -> tuple[bytes, tuple[int, int]]:
        """The picture as it is trained on, and the size that it had.  Raises: ValueError where that was too small."""
        image = open_rgb(io.BytesIO(raw))
        if min(image.size) < self.making.min_size:
            raise ValueError(f"{image.width} x {image.height}, smaller than --min_size {self.making.min_size}")
        _, how = ENCODERS[self.making.image_format]
        made = io.BytesIO()
        center_crop(image, self.making.img_size).save(made, **how)
        return made.getvalue(), image.size

    def add(self, tar: tarfile.TarFile, name: str, value: bytes) -> int:
        """Returns: where the value begins."""
        info = tarfile.TarInfo(name)
        info.size, place = len(value), tar.offset + HEADER
        tar.addfile(info, io.BytesIO(value))
        self.hash.update(name.encode() + value)
        return place

    def facts(self) -> bytes:
        lines = [line.encode() for captions in self.captions for line in captions]
        arrays = {
            "places": np.array(self.places, dtype=np.uint64).reshape(-1, 2),
            "sizes": np.array(self.sizes, dtype=np.uint32).reshape(-1, 2),
            "hashes": np.array(self.hashes, dtype=np.uint64),
            "counts": np.array([len(captions) for captions in self.captions], dtype=np.uint32),
            "lengths": np.array([len(line) for line in lines], dtype=np.uint32),
            "captions": np.frombuffer(b"".join(lines), dtype=np.uint8),
        }
        facts = {"version": VERSION, "making": self.making._asdict(), "left_out": self.left_out, "sha256": self.hash.hexdigest()}
        return save(arrays, {"facts": json.dumps(facts)})


# --- the index


def read_facts(shard: Path, only: str | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """only: the one array that is wanted.  Raises: UserError where they are damaged."""
    try:
        with safe_open(facts_beside(shard), "np") as file:
            return json.loads(file.metadata()["facts"]), {name: file.get_tensor(name) for name in ([only] if only else file.keys())}
    except Exception as error:  # cut short, no safetensors: safetensors' own exception
        raise UserError(f"{facts_beside(shard)} cannot be read ({one_line(error)}); remove it and {shard.name}, and prepare them again") from error


def build_index(out: Path, shards: Sequence[Path], making: Making, drop_duplicates: bool) -> dict[str, Any]:
    """The arrays of all shards, in a folder that is there whole or not at all.  Returns: what it says of them.  Raises: UserError, OSError."""
    part = out / f".{INDEX}.tmp"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    seen = Duplicates(out, shards)
    counts = {"pictures": 0, "captions": 0, "characters": 0, "duplicates": 0, "left_out": 0}
    names, fingerprint = [], hashlib.sha256()
    with (
        open(part / "places", "wb") as places,
        open(part / "counts", "wb") as numbers,
        open(part / "lengths", "wb") as lengths,
        open(part / "captions", "wb") as text,
    ):
        for number, shard in enumerate(shards):
            facts, arrays = read_facts(shard)
            if facts["making"] != making._asdict():
                raise UserError(f"{shard} was made with {facts['making']}, and this is {making._asdict()}; name another --out")
            kept = seen.first_ones(number, len(arrays["hashes"]))
            counts["duplicates"] += int((~kept).sum())
            if not drop_duplicates:
                kept[:] = True
            keep = np.repeat(kept, arrays["counts"])
            place = np.empty(len(arrays["places"]), PLACE)
            place["shard"], place["offset"], place["size"] = number, arrays["places"][:, 0], arrays["places"][:, 1]
            places.write(place[kept].tobytes())
            numbers.write(arrays["counts"][kept].tobytes())
            lengths.write(arrays["lengths"][keep].tobytes())
            text.write(arrays["captions"][np.repeat(keep, arrays["lengths"])].tobytes())
            counts["pictures"] += int(kept.sum())
            counts["captions"] += int(keep.sum())
            counts["left_out"] += len(facts["left_out"])
            names.append(shard.name)
            fingerprint.update(facts["sha256"].encode() + kept.tobytes())
    cumulated(part, "counts", "first", counts["pictures"])
    cumulated(part, "lengths", "ends", counts["captions"])
    found = {"version": VERSION, "making": making._asdict(), **counts, "shards": names, "fingerprint": fingerprint.hexdigest()[:32]}
    (part / FACTS).write_text(json.dumps(found), encoding="utf-8")
    shutil.rmtree(out / INDEX, ignore_errors=True)
    part.rename(out / INDEX)
    return found


class Duplicates:
    """Which pictures are the file of one before."""

    def __init__(self, out: Path, shards: Sequence[Path]):
        hashes = [read_facts(shard, "hashes")[1]["hashes"] for shard in shards]
        self.starts = np.cumsum([0, *map(len, hashes)])
        self.first = np.zeros(self.starts[-1], dtype=bool)
        self.first[np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]), return_index=True)[1]] = True

    def first_ones(self, shard: int, count: int) -> np.ndarray:
        return self.first[self.starts[shard] : self.starts[shard] + count].copy()


def cumulated(folder: Path, name: str, becomes: str, count: int) -> None:
    """Numbers of uint32 in a file to their sums, of uint64, from 0 on."""
    numbers = np.memmap(folder / name, "<u4", "r") if count else np.empty(0, "<u4")
    total = 0
    with open(folder / becomes, "wb") as file:
        file.write(np.zeros(1, "<u8").tobytes())
        for start in range(0, count, 1 << 20):
            sums = total + np.cumsum(numbers[start : start + (1 << 20)], dtype="<u8")
            total = sums[-1]
            file.write(sums.tobytes())
    (folder / name).unlink()


class MappedStrings(Sequence):
    """The captions of an index.  ends: where each begins in the block, and the last one ends."""

    def __init__(self, ends: np.ndarray, block: np.ndarray):
        self.ends, self.block = ends, block

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.block[self.ends[i] : self.ends[i + 1]].tobytes().decode()


class Names(Sequence):
    """What messages call the pictures."""

    def __init__(self, shards: list[str], places: np.ndarray):
        self.shards, self.places = shards, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> str:
        place = self.places[i]
        return f"{self.shards[place['shard']]}, byte {place['offset']}"

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def is_prepared(path: Path) -> bool:
    return (path / INDEX / FACTS).is_file()


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
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--data_path {path}: its index cannot be read ({one_line(error)}); remove {folder}, and run prepare_data.py again") from error
        if view.img_size > size:
            raise UserError(f"--data_path {path} was prepared at {size} pixels, and --img_size is {view.img_size}; prepare it again at that size")
        shards = [str(path / name) for name in self.facts["shards"]]
        self.paths, self.view, self.seed, self.fingerprints = Names(shards, places), view, seed, {}
        self.bad, self.root = [], str(path)
        self.captions, self.read = MappedStrings(ends, block), MappedPictures(shards, places)

    def picture(self, index: int, n: int | None = None) -> Tensor:
        """As it lies there, where that is all that is asked for."""
        image = Image.open(self.file(index))
        if image.size == (self.img_size, self.img_size) and image.mode == "RGB" and (n is None or self.view.crop == "center"):
            return to_uint8(image)
        return super().picture(index, n)

    def fingerprint(self, root: str | Path) -> str:
        return self.facts["fingerprint"]


class MappedPictures(Pictures):
    """As Pictures, out of an index."""

    def __call__(self, i: int) -> BinaryIO:
        place = self.places[i]
        return self.at(self.shards[place["shard"]], int(place["offset"]), int(place["size"]))
