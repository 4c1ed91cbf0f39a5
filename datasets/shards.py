"""Tar shards of squares at training size, made and read one by one.

A shard is an ordinary tar in WebDataset's naming, made by `prepare_shard`, whole or not at all, the same to the byte whoever makes it. Beside it stands what is known of its
samples, as safetensors; and the features of its captions, where prepare_data.py was given a language model.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from datasets.captioned import Rows
from datasets.stream import MappedStrings
from datasets.transforms import center_crop, open_rgb
from util.broken import check_allowed, check_of_picture
from util.errors import UserError, one_line
from util.feature_store import FOLDERS
from util.files import write_whole

VERSION = 1
ENCODERS = {
    "jpeg": ("jpg", {"format": "JPEG", "quality": 95, "subsampling": 0}),  # 4:4:4
    "png": ("png", {"format": "PNG"}),
    "webp": ("webp", {"format": "WEBP", "lossless": True}),
}
HEADER = 512  # bytes before a file in a tar


class Making(NamedTuple):
    """How shards are made."""

    img_size: int
    image_format: str = "jpeg"
    min_size: int = 0  # of a picture's short side


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def facts_beside(shard: Path) -> Path:
    return shard.with_suffix(".safetensors")


def prepare_shard(out: Path, number: int, rows: Rows, which: range, writer: "ShardWriter") -> Path:
    """The shard of those rows; one that is there is whole, and stays as it is.  Raises: OSError; UserError for what is broken, if that is asked for."""
    shard = out / shard_name(number)
    if not shard.exists():
        features_beside(shard).unlink(missing_ok=True)  # of a shard that was here before, and other captions
        writer.note_broken(rows.bad)
        write_whole(shard.with_suffix(".tar.part"), partial(writer.write, rows=rows, which=which), shared=True)
        write_whole(facts_beside(shard), lambda file: file.write(writer.facts()), shared=True)
        with suppress(FileNotFoundError):  # another process made it too, and was quicker
            shard.with_suffix(".tar.part").rename(shard)
    return shard


class ShardWriter:
    """A shard as it is written, and what is known of its samples then.  of: what it is made of; policy: --bad_images, "error" or "skip"."""

    def __init__(self, making: Making, of: str, policy: str):
        self.making, self.of, self.policy, self.hash = making, of, policy, hashlib.sha256()
        self.places: list[tuple[int, int]] = []  # offset, size
        self.sizes: list[tuple[int, int]] = []  # of the pictures as they were
        self.hashes: list[int] = []  # of their files
        self.captions: list[tuple[str, ...]] = []
        self.broken: list[str] = []
        self.too_small = 0

    def note_broken(self, lines: Sequence[str]) -> None:
        """What cannot be used.  Raises: UserError under --bad_images error."""
        check_allowed(lines, self.policy)
        self.broken += lines

    def write(self, file: BinaryIO, rows: Rows, which: range) -> None:
        suffix, _ = ENCODERS[self.making.image_format]
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, i in enumerate(which):
                try:
                    raw = rows.read(i).read() if rows.read else Path(rows.paths[i]).read_bytes()
                    picture, size = self.square(raw)
                except Exception as error:  # decoders raise nearly anything
                    check_of_picture(rows.paths[i], error)
                    self.note_broken([f"{rows.paths[i]}: {one_line(error)}"])
                    continue
                if picture is None:
                    self.too_small += 1
                    continue
                self.places.append((self.add(tar, f"{number:08d}.{suffix}", picture), len(picture)))
                self.add(tar, f"{number:08d}.txt", "\n".join(rows.captions[i]).encode())
                self.sizes.append(size)
                self.hashes.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"))
                self.captions.append(tuple(rows.captions[i]))

    def square(self, raw: bytes) -> tuple[bytes | None, tuple[int, int]]:
        """The picture as it is trained on, None where it is smaller than --min_size, and the size that it had.  Raises: nearly anything, where it is broken."""
        image = open_rgb(io.BytesIO(raw))
        if min(image.size) < self.making.min_size:
            return None, image.size
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
        facts = {"version": VERSION, "making": self.making._asdict(), "of": self.of, "sha256": self.hash.hexdigest()}
        facts |= {"broken": self.broken, "too_small": self.too_small}
        return save(arrays, {"facts": json.dumps(facts)})


# --- read


def read_facts(shard: Path, only: Sequence[str] | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """only: the arrays that are wanted.  Raises: UserError where they are damaged."""
    try:
        with safe_open(facts_beside(shard), "np") as file:
            facts = json.loads(file.metadata()["facts"])
            if missing := {"of", "broken", "too_small"} - facts.keys():
                raise ValueError(f"it does not say {missing.pop()!r}")
            return facts, {name: file.get_tensor(name) for name in (file.keys() if only is None else only)}
    except Exception as error:  # cut short, no safetensors: safetensors' own exception
        raise UserError(f"{facts_beside(shard)} cannot be read ({one_line(error)}); remove it and {shard.name}, and prepare them again") from error


def text_store(folder: Path) -> Path:
    """That of a folder of shards."""
    return folder / FOLDERS["mean"]


def features_beside(shard: Path) -> Path:
    """A shard of the text store, with the captions of a shard of pictures in their order."""
    return text_store(shard.parent) / facts_beside(shard).name


def captions_of(shard: Path) -> list[str]:
    """All that were made, those left out of the index too.  Raises: UserError where they are damaged."""
    _, arrays = read_facts(shard)
    return [*MappedStrings(np.cumsum([0, *arrays["lengths"]], dtype=np.int64), arrays["captions"])]
