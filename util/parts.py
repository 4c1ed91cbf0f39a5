"""The tensors of a checkpoint that was written in parts: a folder of safetensors beside its file, in which each process has written its share of every tensor.

Nothing is unpickled. Whoever wrote it, and however many they were, a tensor is read whole or some of its rows.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from util.errors import UserError, one_line

SECTIONS = ("model", "model_ema1", "model_ema2", "optimizer")  # of a checkpoint, that are in parts
SEPARATOR = "/"
OFFSETS = "DCP_SHARDING_INFO"  # in a file's metadata, as torch writes it


def flat(state: Mapping[str, Any], before: str = "", separator: str = SEPARATOR) -> Iterator[tuple[str, Any]]:
    """What is in nested dictionaries, by the path to it."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}{separator}", separator)
        else:
            yield before + name, value


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(SEPARATOR)
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return found


class Part(NamedTuple):
    """Rows of a tensor, in an open file."""

    first: int
    last: int  # the one after
    file: Any

    def rows(self, name: str, first: int, last: int) -> Tensor:
        return self.file.get_slice(name)[max(first, self.first) - self.first : min(last, self.last) - self.first]


class Spread:
    """A tensor in parts: spread[first:last] reads those rows, spread[:] all."""

    def __init__(self, name: str, shape: torch.Size, parts: list[Part]):
        self.name, self.shape, self.parts = name, shape, parts

    def __getitem__(self, rows: slice) -> Tensor:
        if not self.shape:
            return self.parts[0].file.get_tensor(self.name)
        first, last, _ = rows.indices(self.shape[0])
        wanted = [part.rows(self.name, first, last) for part in self.parts if part.first < last and first < part.last]
        return torch.cat(wanted) if wanted else self.parts[0].rows(self.name, 0, 0)


def open_parts(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Tensors as `nested` has them.  Raises: UserError where they are not all there, each row once."""
    found: dict[str, list[Part]] = {name: [] for name in shapes}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, "pt")
            offsets = json.loads(file.metadata()[OFFSETS])
            for name in file.keys():  # noqa: SIM118
                shape, offset = file.get_slice(name).get_shape(), offsets[name]["saved_offsets"]
                if list(shape[1:]) != list(shapes[name][1:]) or any(offset[1:]):
                    raise ValueError(f"{name} is {tuple(shape)} at {tuple(offset)} in {path.name}, wanted rows of {tuple(shapes[name])}")
                first, rows = (offset[0], shape[0]) if shape else (0, 1)
                if rows:
                    found[name].append(Part(first, first + rows, file))
        for name, parts in found.items():
            parts.sort(key=lambda part: part[:2])
            ends = [0, *(part.last for part in parts)]
            if [part.first for part in parts] != ends[:-1] or ends[-1] != (shapes[name] or (1,))[0]:
                raise ValueError(f"rows of {name} are missing, or there twice")
    except Exception as error:  # cut short, no safetensors: safetensors' own exception
        raise UserError(f"{folder} does not hold the tensors of its checkpoint ({one_line(error)})") from error
    return nested({name: Spread(name, torch.Size(shapes[name]), parts) for name, parts in found.items()})


def parts_of(state: Mapping[str, Any]) -> str | None:
    """The name of the folder that a checkpoint's file says, if it says one."""
    said = state.get("parts")
    with suppress(TypeError, KeyError):
        return str(said["folder"])
    return None


def read_parts(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of the checkpoint's file `path`, which says `state`.  Raises: UserError."""
    folder, shapes = parts_of(state), state["parts"].get("shapes") if isinstance(state["parts"], Mapping) else None
    plain = isinstance(shapes, Mapping) and all(
        isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape) for shape in shapes.values()
    )
    if not folder or not plain or Path(folder).name != folder or not (path.parent / folder).is_dir():
        raise UserError(f"{path} needs the folder {folder!r} next to it, which holds its tensors and is missing")
    return {name: {} for name in SECTIONS} | open_parts(path.parent / folder, shapes)
