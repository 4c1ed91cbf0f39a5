"""Where pictures come from: one function opens them, one reads them for training.  A new kind of data is a file beside this one and a line here."""

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from config import Data, Model
from datasets.captioned import CaptionedPictures, Rows
from datasets.imagenet import ClassFolder
from datasets.parquet import find_pictures, holds_pictures
from datasets.prepared import PreparedPictures, is_prepared
from datasets.shards import facts_beside
from datasets.stream import Batch, BlockShuffle, Collate, PictureDataset, Shuffle, StreamSampler, View
from datasets.tables import SUFFIXES, find_rows, is_folder
from datasets.tar import find_samples
from datasets.text_image import EXTENSIONS, find_pairs
from util import broken
from util.errors import UserError
from util.files import beside
from util.logging import say
from util.randomness import stream
from util.workers import loader_options, own_cores


def open_data(data: Data, model: Model, seed: int) -> PictureDataset:
    """The data of --data_path as the model needs it.  Collective.  Raises: UserError where it cannot be used."""
    if model.is_text:
        return open_captioned(data, View(model.img_size, bool(data.hflip), data.crop), seed)
    dataset = ClassFolder(data.path, model.class_num, View(model.img_size, data.hflip is not False, data.crop), seed)
    if len(dataset.classes) < model.class_num:
        say(f"warning: {len(dataset.classes)} class folders and --class_num {model.class_num}: the other classes are never trained")
    return dataset


def open_pictures(data: Data, img_size: int) -> PictureDataset:
    """For pictures alone: class folders where there is train/, else captioned pictures.  Collective."""
    if os.path.isdir(Path(data.path) / "train"):  # not, where the folder may not be entered
        return ClassFolder(data.path, None, View(img_size))
    return open_captioned(data, View(img_size))


# Captioned pictures.


def open_captioned(data: Data, view: View, seed: int = 0) -> CaptionedPictures:
    """Says what is there.  Collective.  Raises: UserError where it cannot be used, before any picture is opened."""
    path = Path(data.path)
    kind = format_of(data)
    check_columns(data, kind)
    if kind == "shards":
        return open_prepared(path, view, seed)
    rows = FORMATS[kind](path, data)
    rows.root = rows.root or str(path if path.is_dir() else path.parent)
    check_missing(rows, data)
    check_bad(rows, data)
    if not rows.paths:
        raise UserError(f"--data_path {path}: no captioned pictures; wanted {WANTED}")
    lengths = [len(line) for lines in rows.captions for line in lines]
    say(
        f"{path} ({kind}): {len(rows.paths):,} pictures, {len(lengths):,} captions of {sum(lengths) / len(lengths):.0f} characters on average, "
        f"{max(lengths)} at most; {rows.twins:,} pictures are the same file as another"
    )
    return CaptionedPictures(rows, view, seed)


def open_prepared(path: Path, view: View, seed: int) -> PreparedPictures:
    """What prepare_data.py made."""
    dataset = PreparedPictures(path, view, seed)
    facts = dataset.facts
    say(
        f"{path} (shards): {facts['pictures']:,} pictures of {facts['making']['img_size']} pixels in {len(facts['shards']):,} shards, {facts['captions']:,} captions; "
        f"{facts['left_out']:,} were left out, {facts['duplicates']:,} are the same file as another"
    )
    return dataset


def check_columns(data: Data, kind: str) -> None:
    """Raises: UserError for a flag that this kind of data knows nothing of."""
    for name in ("image_column", "caption_column", "image_root"):
        if getattr(data, name) is not None and name not in COLUMNS[kind]:
            remedy = "; give it to prepare_data.py" if kind == "shards" else "; leave it out"
            raise UserError(f"--{name} {getattr(data, name)} has no effect on --data_path {data.path}, which is read as {kind}{remedy}")


def check_missing(rows: Rows, data: Data) -> None:
    """Raises: UserError for pictures without captions, or the other way round, unless they are to be left out."""
    if rows.problems and data.missing == "error":
        raise UserError(f"--data_path {data.path}: {'; '.join(rows.problems)}. Fix them, or skip them with --missing_captions skip")
    if rows.problems:
        say(f"--missing_captions skip: left out {'; '.join(rows.problems)}")


def check_bad(rows: Rows, data: Data) -> None:
    """Rows that cannot be used are what broken pictures are.  Raises: UserError under --bad_images error, and where they are too many."""
    if not rows.bad:
        return
    count, total = len(rows.bad), len(rows.bad) + len(rows.paths)
    if data.broken == "error" or broken.too_many(count, total):
        limit = "--bad_images error" if data.broken == "error" else "over 1 %"
        raise UserError(f"--data_path {data.path}: {count:,} of {total:,} rows cannot be used ({limit}); the first is {rows.bad[0]}")
    say(f"{count:,} of {total:,} rows cannot be used and are left out; the first is {rows.bad[0]}")


def tables_of(path: Path) -> list[Path]:
    """metadata.* in a folder, or the file itself."""
    return sorted(path.glob("metadata.*")) if path.is_dir() else [path]


def packed_in(path: Path) -> dict[str, list[Path]]:
    """Tar and Parquet files in a folder and in the folders in it, in order, or the file itself; folders of single pictures are not searched.

    Without what img2dataset writes beside its shards, and without tables of an image folder. Millions of pictures may lie beside them: none is looked at.
    """
    found: dict[str, list[Path]] = {".tar": [], ".parquet": []}
    folders, files = [path] if path.is_dir() else [], [] if path.is_dir() else [path]
    for folder in folders:
        for entry in entries_of(folder, needed=folder == path):
            if entry.name.startswith("."):
                continue
            if not is_folder(entry):
                files += [Path(entry.path)] if entry.name.lower().endswith((*found,)) else []
            elif folder == path and entry.name not in ("images", "captions", "train"):
                folders.append(Path(entry.path))
    for file in sorted(files):
        found.get(file.suffix.lower(), []).append(file)
    shards = {shard.with_suffix("") for shard in found[".tar"]}
    found[".parquet"] = [table for table in found[".parquet"] if table.with_suffix("") not in shards and table.stem != "metadata"]
    return found


def files_of(path: Path, kind: str) -> list[Path]:
    """kind: "tar" or "parquet".  Raises: UserError for shards of prepare_data.py: without their index some may be missing, and they hold a picture's captions in another way."""
    found = packed_in(path)[f".{kind}"]
    if kind == "tar" and (made := next((shard for shard in found if facts_beside(shard).exists()), None)):
        raise UserError(
            f"--data_path {path}: {made} was made by prepare_data.py; give its folder as --data_path, and if that has no index/ yet, run the prepare_data.py command again first"
        )
    return found


def entries_of(folder: Path, needed: bool) -> Iterator[os.DirEntry]:
    """Raises: UserError where a folder that is needed may not be read; any other one is passed over."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        if needed:
            raise UserError(f"--data_path {folder} cannot be read: {error.strerror}") from error
        warn_once(f"warning: {folder} cannot be read ({error.strerror}), and what is in it is left out")


@lru_cache
def warn_once(line: str) -> None:
    """A folder is listed more than once."""
    say(line)


def open_table(path: Path, data: Data) -> Rows:
    tables = [table for table in tables_of(path) if table.suffix.lower() in SUFFIXES]
    if not tables:
        raise UserError(f"--data_path {path}: no table; wanted one that ends in {' '.join(SUFFIXES)}, or a folder with metadata.*")
    if len(tables) > 1:
        raise UserError(f"--data_path {path} holds {' and '.join(table.name for table in tables)}; give one of them as --data_path")
    return find_rows(tables[0], data.image_root, data.image_column, data.caption_column)


FORMATS: dict[str, Callable[[Path, Data], Rows]] = {
    "folder": lambda path, data: find_pairs(path),
    "table": open_table,
    "parquet": lambda path, data: find_pictures(files_of(path, "parquet"), data.image_column, data.caption_column),
    "tar": lambda path, data: find_samples(files_of(path, "tar"), data.caption_column, beside(path, "tar_index")),
}
COLUMNS: dict[str, tuple[str, ...]] = {
    "folder": (),
    "table": ("image_column", "caption_column", "image_root"),
    "parquet": ("image_column", "caption_column"),
    "tar": ("caption_column",),
    "shards": (),
}
WANTED = (
    f"images/NAME ({' '.join(sorted(EXTENSIONS))}) with captions/NAME.txt, a table ({' '.join(SUFFIXES)}, or metadata.* in a folder), "
    "Parquet files with pictures inside, or tar shards"
)


def formats_of(path: Path) -> list[str]:
    """What there is, as far as names say."""
    if path.is_dir():
        packed = packed_in(path)
        found = {
            "folder": (path / "images").is_dir() and (path / "captions").is_dir(),
            "table": any(table.suffix.lower() in SUFFIXES for table in tables_of(path)),
            "parquet": bool(packed[".parquet"]),
            "tar": bool(packed[".tar"]),
        }
        return [name for name, there in found.items() if there]
    return {".tar": ["tar"], ".parquet": ["table", "parquet"]}.get(path.suffix.lower(), ["table"] if path.suffix.lower() in SUFFIXES else [])


def format_of(data: Data) -> str:
    """Raises: UserError where it cannot be told, or is none."""
    path = Path(data.path)
    if not path.exists():
        raise UserError(f"--data_path {path} is not there")
    if data.format != "auto":
        return data.format
    if is_prepared(path):
        return "shards"
    if path.suffix.lower() == ".parquet" and path.is_file():
        return "parquet" if holds_pictures(path, data.image_column) else "table"
    found = formats_of(path)
    if len(found) > 1:
        raise UserError(f"--data_path {path} may be {' or '.join(found)}; say which by --data_format")
    if not found and path.is_file():
        raise UserError(f"--data_path {path}: wanted a folder, or a file that ends in {' '.join((*SUFFIXES, '.tar'))}")
    if not found and not any((path / name).is_dir() for name in ("images", "captions", "train")):
        raise UserError(f"--data_path {path}: no captioned pictures; wanted {WANTED}")
    return found[0] if found else "folder"  # which says what it lacks


def workers(data: Data) -> int:
    """Loader processes: as asked, at most this process's share of the machine's cores."""
    return min(data.workers, own_cores())


def make_loader(dataset: PictureDataset, sampler: StreamSampler, collate: Collate, data: Data, device: torch.device) -> DataLoader:
    """Batches of one rank.  Its processes are forked with CUDA up, as is common: they never touch it."""
    return DataLoader(
        dataset,
        sampler.batch_size,
        sampler=sampler,
        collate_fn=collate,
        pin_memory=data.pin_mem and device.type == "cuda",
        **loader_options(workers(data)),
    )


def batches_of(loader: DataLoader) -> Iterator[Batch]:
    """All that is left of the run, through the epochs' ends.  The loader's processes begin at the first batch, and end when this is closed."""
    yield from loader


def hold_out(dataset: PictureDataset, wanted: int, seed: int) -> tuple[Shuffle | BlockShuffle, Tensor]:
    """The order of the pictures to train on, and the indices of those to hold out: `wanted`, but a hundredth of all at most."""
    size, draws = len(dataset), stream(seed, "held out", 0)
    count = min(wanted, size // 100)
    if dataset.in_blocks:
        held_out = torch.randint(size // max(count, 1), (count,), generator=draws) + torch.arange(count) * (size // max(count, 1))  # one of each part
        return BlockShuffle(size, held_out, seed), held_out
    order = torch.randperm(size, generator=draws)
    return Shuffle(order[count:].sort().values, seed), order[:count]
