"""Captioned pictures, wherever they come from: what a source finds, and the data set that is made of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from datasets.stream import PackedStrings, PictureDataset, View
from util.errors import UserError
from util.randomness import uniform


@dataclass
class Rows:
    """Captioned pictures in a source's order, picture i with at least one caption.

    `paths`: the files; where `read` gives their bytes, what messages call them. `bad`: a line for each row that cannot be used, with its reason.
    `problems`: what --missing_captions decides on. `twins`: how many pictures are the same file as one before. `root`: what the paths begin with.
    """

    paths: Sequence[str]
    captions: Sequence[Sequence[str]]
    read: Callable[[int], BinaryIO] | None = None
    bad: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    twins: int = 0
    root: str | None = None


class CaptionedPictures(PictureDataset):
    """Each sample shows one of its picture's captions, drawn at random."""

    def __init__(self, rows: Rows, view: View, seed: int = 0):
        super().__init__(rows.paths, view, seed)
        self.bad, self.read, self.root = rows.bad, rows.read, rows.root
        self.captions = PackedStrings(caption for lines in rows.captions for caption in lines)
        self.first = np.cumsum([0, *map(len, rows.captions)])  # picture i has the captions first[i] to first[i + 1] - 1

    def file(self, index: int) -> str | BinaryIO:
        return self.read(index) if self.read else super().file(index)

    def condition(self, index: int, n: int) -> int:
        first, end = self.first[index : index + 2].tolist()
        return first + int(uniform(self.seed, "caption", [n]).item() * (end - first))

    def distinct_captions(self) -> list[str]:
        """Every caption once, in the order of the data."""
        return list(dict.fromkeys(self.captions))


def not_utf8(what: object) -> UserError:
    return UserError(f"{what} is not UTF-8; convert it, for instance: iconv -f SHIFT_JIS -t UTF-8 FILE")


def several(value: object) -> tuple[str, ...]:
    """The captions of a row: of a text, or of a list of texts.  Raises: ValueError for anything else, and where none holds text."""
    texts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a caption is {next(type(text).__name__ for text in texts if not isinstance(text, str))}, wanted text")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError("a caption that holds half a character") from None
    found = tuple(line for text in texts if (line := " ".join(text.replace("\r\n", "\n").split("\n")).strip()))
    if not found:
        raise ValueError("no caption")
    return found
