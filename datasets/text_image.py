"""A folder with images/ (.jpg .jpeg .png .webp, any depth) and captions/ (.txt, UTF-8, same relative name); a line of a caption file is one caption."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from datasets.captioned import Rows, not_utf8
from util.errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp"}


def files_below(folder: Path, extensions: set[str]) -> dict[str, list[Path]]:
    """Relative name without extension -> files of that name, in order; hidden files are left out.

    Names are compared in NFC: macOS writes 'が' as two characters.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(names_below(folder)):
        if path.suffix.lower() in extensions and not path.name.startswith(".") and path.is_file():
            name = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
            found.setdefault(name, []).append(path)
    return found


def names_below(folder: Path) -> Iterator[Path]:
    """All files below `folder`, through links to folders too, except those that lead back into `folder` or to a folder that the link lies in."""
    above: dict[str, set[tuple[int, int]]] = {str(folder): {identity(folder)}}
    for place, folders, names in os.walk(folder, followlinks=True):
        way = above.pop(place)
        inside = {name: identity(os.path.join(place, name)) for name in folders if not leads_back(os.path.join(place, name), folder)}
        folders[:] = [name for name in inside if inside[name] not in way]
        above |= {os.path.join(place, name): way | {inside[name]} for name in folders}
        yield from (Path(place, name) for name in names)


def leads_back(path: str, folder: Path) -> bool:
    return os.path.islink(path) and Path(path).resolve().is_relative_to(folder.resolve())


def identity(path: str | Path) -> tuple[int, int]:
    """What tells a folder from others, whatever it is called."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def read_captions(path: Path) -> tuple[str, ...]:
    """The non-empty lines of a caption file.  Raises: UserError if it is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def problem(what: str, names: list[str]) -> list[str]:
    """['3 pictures without captions (a, b, c)'], or nothing where there are no names."""
    return [f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"] if names else []


def find_pairs(root: Path) -> Rows:
    """Raises: UserError where the two folders are not there."""
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
    pairs = [(path, texts[name]) for name, paths in pictures.items() if texts.get(name) for path in paths]
    twins = len(pairs) - len({identity(path) for path, _ in pairs})
    return Rows([str(path) for path, _ in pairs], [lines for _, lines in pairs], problems=problems, twins=twins)
