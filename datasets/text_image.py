"""Captioned pictures: images/ (.jpg .jpeg .png .webp, any depth) and captions/ (.txt, UTF-8, same relative name)."""

import unicodedata
from pathlib import Path

import numpy as np

from datasets.stream import PackedStrings, PictureDataset
from util.errors import UserError
from util.randomness import uniform

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp"}


def files_below(folder: Path, extensions: set[str]) -> dict[str, list[Path]]:
    """Relative name without extension -> files of that name, in order; hidden files are left out.

    Names are compared in NFC: macOS writes 'が' as two characters.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in extensions and not path.name.startswith(".") and path.is_file():
            name = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
            found.setdefault(name, []).append(path)
    return found


def read_captions(path: Path) -> tuple[str, ...]:
    """The non-empty lines of a caption file.  Raises: UserError if it is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; convert it, for instance: iconv -f SHIFT_JIS -t UTF-8 FILE") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def problem(what: str, names: list[str]) -> list[str]:
    """['3 pictures without captions (a, b, c)'], or nothing where there are no names."""
    return [f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"] if names else []


class TextImageFolder(PictureDataset):
    """A line of a caption file is one caption; of several, each sample shows one drawn at random.

    `missing` is "error" or "skip": what to do about pictures without captions and captions without a picture.
    Raises: UserError, one line with the count and the first names, before any picture is opened.
    """

    def __init__(self, root: str | Path, img_size: int = 256, hflip: bool = False, seed: int = 0, missing: str = "error"):
        root = Path(root)
        for name in ("images", "captions"):
            if not (root / name).is_dir():
                hint = "; it has train/, so a class model is meant?" if (root / "train").is_dir() else ""
                raise UserError(f"--data_path {root}: no folder {name}/{hint}")
        pictures = files_below(root / "images", EXTENSIONS)
        texts = {name: read_captions(paths[0]) for name, paths in files_below(root / "captions", {".txt"}).items()}
        problems = (
            problem("pictures without a caption file", [name for name in pictures if name not in texts])
            + problem("caption files without a line of text", [name for name in texts if not texts[name]])
            + problem("caption files without a picture", [name for name in texts if name not in pictures])
        )
        if problems and missing == "error":
            raise UserError(f"--data_path {root}: {'; '.join(problems)}. Mend them, or go on without them by --missing_captions skip")
        pairs = [(str(path), texts[name]) for name, paths in pictures.items() if texts.get(name) for path in paths]
        if not pairs:
            wanted = " ".join(sorted(EXTENSIONS))
            raise UserError(f"--data_path {root}: no captioned pictures; wanted images/NAME ({wanted}) with captions/NAME.txt")
        self.skipped = "; ".join(problems)
        paths, texts = zip(*pairs)
        self.captions = PackedStrings(caption for lines in texts for caption in lines)
        self.first = np.cumsum([0, *map(len, texts)])  # picture i has the captions first[i] to first[i + 1] - 1
        super().__init__(paths, img_size, hflip, seed)

    def condition(self, index: int, n: int) -> int:
        first, end = self.first[index : index + 2].tolist()
        return first + int(uniform(self.seed, "caption", [n]).item() * (end - first))

    def distinct_captions(self) -> list[str]:
        """Every caption once, in the order of the files."""
        return list(dict.fromkeys(self.captions))
