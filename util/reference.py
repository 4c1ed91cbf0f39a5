"""Files of reference statistics: `mu` and `sigma`, as the published ones of JiT and ADM have them, and in ours also what they are of."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.errors import UserError, one_line
from util.files import sha256_of, write_whole
from util.metrics import Statistics

FACTS = ("extractor", "img_size", "crop", "n", "files", "data")
CROP = "ADM centre crop, BOX then BICUBIC"


@dataclass(frozen=True)
class Reference:
    values: Statistics
    path: Path
    sha256: str
    facts: dict[str, str | int]  # those of FACTS that the file says; nothing in a published one


def read(path: Path) -> Reference:
    """Raises: UserError for a file that holds no such statistics."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            values = {name: file[name].astype(np.float64) for name in ("mu", "sigma") if name in names}
            facts = {name: file[name] for name in FACTS if name in names}
    except FileNotFoundError:
        raise UserError(f"--fid_stats {path}: no such file") from None
    except Exception as error:  # no zip, cut short, arrays of Python objects or of text
        raise UserError(f"--fid_stats {path}: not readable as reference statistics ({one_line(error)})") from error
    if len(values) < 2:
        raise UserError(f"--fid_stats {path}: no reference statistics; wanted the arrays mu and sigma, found {', '.join(names) or 'none'}")
    width = values["mu"].shape[-1] if values["mu"].ndim else 0
    if values["mu"].shape != (width,) or values["sigma"].shape != (width, width):
        raise UserError(f"--fid_stats {path}: mu is {values['mu'].shape} and sigma {values['sigma'].shape}; wanted (D,) and (D, D)")
    if not all(np.isfinite(value).all() for value in values.values()):
        raise UserError(f"--fid_stats {path}: not all of its numbers are finite")
    facts = {name: value.item() for name, value in facts.items() if value.ndim == 0}  # another's array of that name says nothing
    return Reference(values, path, sha256_of(path), facts)


def check(reference: Reference, extractor: str, width: int, img_size: int) -> None:
    """Raises: UserError for statistics of another size, crop or network than the pictures are to be seen through."""
    found, path = len(reference.values["mu"]), reference.path
    if found != width:
        raise UserError(f"--fid_stats {path} holds {found} features a picture, and the network gives {width}; is it of another network?")
    for field, wanted in (("img_size", img_size), ("crop", CROP), ("extractor", extractor)):
        if reference.facts.get(field, wanted) != wanted:
            raise UserError(
                f"--fid_stats {path} was made with {field} {reference.facts[field]}, this run has {wanted}; make one by prepare_ref.py --img_size {img_size}"
            )


def write(path: Path, values: Statistics, facts: dict[str, str | int]) -> None:
    """Whole, or not at all; several jobs may do it at once.  Raises: UserError where it cannot be written."""
    try:
        write_whole(path, lambda file: np.savez(file, **values, **facts), shared=True)
    except OSError as error:
        raise UserError(f"reference statistics {path} cannot be written: {error.strerror}") from error
