"""Checkpoints: one dictionary of plain data a file, written whole or not at all, read without unpickling code.

Keys: `model`, `model_ema1`, `model_ema2` (full state dicts under the prefix `net.`), `optimizer`, or in place of these four `parts` (util/parts.py), `epoch` (the last one finished),
`step`, `epoch_step` (steps done of the epoch after), `skips`, `evaluation_due` (at this step), `world`, `job` (the run's configs), for text models
`text`, and where adapters alone are trained `base`, the hash of the weights below them. The published JiT files (an argparse Namespace as `args`, an optimizer state by position) open the same way.
"""

import argparse
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.errors import UserError, one_line
from util.files import write_whole
from util.logging import say
from util.parts import Spread, parts_of, read_parts
from util.sharding import fill, shared_as, whole
from util.staging import Staging

LAST = "checkpoint-last.pth"
RELEASED = "transformer/config.json"  # released.py reads such folders
EXPORTED, WEIGHTS = "config.json", "model.safetensors"  # exported.py reads such folders
PAINTER = "painter"  # the component of a folder that diffusers opens
IN_PAINTER = "model"  # where such a folder is in PAINTER; exports from before 28 November 2026 have its files in PAINTER itself
PREFIX = "net."


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Whole, or not at all: what `path` held before stays until the new file is there.  Raises: OSError."""
    try:
        write_whole(path, lambda file: torch.save(dict(state), file))
    except RuntimeError as error:  # torch's zip writer, where the disk is full
        path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)
        raise OSError(str(error).splitlines()[0]) from error


class Writer:
    """Writes checkpoints while training goes on, which waits only for their copy to host memory and for the one before.

    A thread is enough: torch.save lets the others run while it sums up and writes a storage, as long as it is given an open file and not a path.
    Where one cannot be written, training goes on with the last good one on disk, and says so; two in a row stop it.
    """

    def __init__(self, keep_last: int | None = None, beside: Callable[[Path, Mapping[str, Any]], None] | None = None):
        """beside: beside(folder, state) writes more of each state into the folder."""
        self.keep_last, self.beside, self.failed = keep_last, beside, 0
        self.staging = Staging()
        self.threads = ThreadPoolExecutor(1)
        self.work: Future | None = None
        self.latest: tuple | None = None  # what the last one is written from, until it is on disk

    def write(self, state: Mapping[str, Any], path: Path, numbered: Path | None = None) -> None:
        """`state` as it is now into `path`, and under the name `numbered` too.  Raises: UserError for the second failure in a row."""
        self.wait()
        self.latest = (self.staging.copy(state), path, numbered)
        self.start()

    def settle(self) -> None:
        """Before the state that was written last changes: its copy may still be on the way from a GPU, which then ends it first."""
        self.staging.settle()

    def start(self) -> None:
        """Begin to write the latest."""
        self.work = self.threads.submit(self._write, *self.latest)

    def wait(self) -> None:
        """Until nothing is being written any more.  Raises: UserError for the second failure in a row."""
        if self.work is None:
            return
        error, self.work = self.work.exception(), None
        if not error:
            self.failed, self.latest = 0, None
            return
        self.failed += 1
        error = self.reason(error)
        if self.failed > 1:
            raise UserError(f"two checkpoints in a row could not be written ({error}); the last good one is untouched. Make room, or name another --output_dir")
        say(f"warning: no checkpoint could be written ({error}); training goes on, the last good one stays. Make room before the next")

    def reason(self, error: BaseException) -> str:
        return str(error)

    def close(self) -> None:
        """At the end of a run, when there is no next: a last one that failed is tried once more.  Raises: UserError where it fails again."""
        self.wait()
        if self.failed:
            self.start()
            self.wait()

    def _write(self, state: Mapping[str, Any], path: Path, numbered: Path | None) -> None:
        self.staging.wait()
        self.keep(state, path, numbered)
        if self.beside:
            self.beside(path.parent, state)

    def keep(self, state: Mapping[str, Any], path: Path, numbered: Path | None) -> None:
        """Under its names.  Raises: OSError."""
        save(numbered or path, state)
        if numbered:
            keep_as(numbered, path)
            remove_old(numbered, self.keep_last)
        remove_unused_parts(path.parent)


def keep_as(path: Path, name: Path) -> None:
    """The file under a second name too: the same bytes where the file system can link, else a copy.  Raises: OSError."""
    beside = name.with_name(f".{name.name}.tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:
        with open(path, "rb") as file:
            write_whole(name, lambda copy: shutil.copyfileobj(file, copy))
    else:
        os.replace(beside, name)


def numbered_in(folder: Path) -> list[Path]:
    """checkpoint-N.pth, in the order of N."""
    found = [path for path in folder.glob("checkpoint-*.pth") if path.stem.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("checkpoint-")))


def remove_old(newest: Path, keep_last: int | None) -> None:
    """The numbered checkpoints beside `newest`, but for the last `keep_last` and itself."""
    for path in numbered_in(newest.parent)[:-keep_last] if keep_last else []:
        if path != newest:
            path.unlink(missing_ok=True)


def remove_unused_parts(folder: Path) -> None:
    """Those that no file in the folder says any more, whatever its name."""
    if parts := [*folder.glob("checkpoint-step-*")]:
        used = set()
        for path in folder.glob("*.pth"):
            with nullcontext() if path.name.startswith("checkpoint-") else suppress(UserError, AttributeError):  # others may be anything
                used.add(parts_of(load_plain(path)))
        for one in parts:
            if one.name not in used:
                shutil.rmtree(one, ignore_errors=True)


def is_released(folder: Path) -> bool:
    return (folder / RELEASED).is_file()


def is_exported(folder: Path) -> bool:
    return (folder / EXPORTED).is_file() and (folder / WEIGHTS).is_file()


def find(resume: str, output_dir: str = "", flag: str = "--resume") -> Path | None:
    """The file that --resume, or another flag, means: itself, or the last checkpoint in the folder; or a folder that is exported, or as MiniT2I's are.

    Returns: None only where the folder is `output_dir` and holds no checkpoint yet.  Raises: UserError for anything else.
    """
    path = Path(resume)
    if path.is_file():
        return path
    if (path / LAST).is_file():
        return path / LAST
    if is_released(path):
        return path
    for folder in (path, path / PAINTER / IN_PAINTER, path / PAINTER):
        if is_exported(folder):
            return folder
    numbered = numbered_in(path)
    if output_dir and path.resolve() == Path(output_dir).resolve() and not numbered:
        return None
    what = f"holds {', '.join(p.name for p in numbered[:3])} but no {LAST}; name the file" if numbered else f"is no checkpoint and holds no {LAST}"
    raise UserError(f"{flag} {resume}: {what if path.exists() else 'no such file or folder'}")


def load_plain(path: Path, flag: str = "--resume") -> Any:
    """What is in the file.  Raises: UserError where it cannot be read, or would run code."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken zip, a pickle with code in it, a file cut short: each its own exception
        raise UserError(f"{flag} {path}: not a loadable checkpoint ({type(error).__name__}: {one_line(error)})") from error


def load(path: Path, flag: str = "--resume") -> dict[str, Any]:
    """Read a checkpoint of ours or a published one; of one in parts the tensors are Spreads.  Raises: UserError where it is neither, or would run code."""
    state = load_plain(path, flag)
    if isinstance(state, dict) and "parts" in state:
        try:
            state |= read_parts(path, state)
        except UserError:
            if parts_of(load_plain(path, flag)) == parts_of(state):
                raise
            return load(path, flag)  # a run has saved meanwhile
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{flag} {path}: not a JiT checkpoint; wanted a dictionary with the key 'model'")
    state["args"] = vars(state["args"]) if isinstance(state.get("args"), argparse.Namespace) else state.get("args") or {}
    return state


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """The state dict; of a network whose own weights stay as they are, what is trained alone."""
    if all(param.requires_grad for param in net.parameters()):
        return net.state_dict()
    return {name: param for name, param in net.named_parameters() if param.requires_grad}


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, as float32."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode() + state[name].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def with_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {PREFIX + name: value for name, value in state.items()}


def without_prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights for a network that expects `expected`.  Raises: UserError naming the first that does not fit."""
    state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    for name in expected:
        if name not in state:
            raise UserError(f"{source} does not fit the model: the checkpoint has no {name}; is --model the one that it was trained with?")
        if state[name].shape != expected[name].shape:
            found, wanted = tuple(state[name].shape), tuple(expected[name].shape)
            raise UserError(f"{source} does not fit the model: {name} is {found}, wanted {wanted}; see --model, --img_size, --class_num")
    if extra := [name for name in state if name not in expected]:
        raise UserError(f"{source} does not fit the model: the model has no {extra[0]}; see --model")
    return state


@torch.no_grad()
def load_into(state: Mapping[str, Tensor], values: Mapping[str, Tensor | Spread]) -> None:
    """The tensors that a state dict refers to."""
    for name, target in state.items():
        fill(target, values[name])


def optimizer_state(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by parameter name."""
    names = {param: name for name, param in net.named_parameters()}
    return {names[param]: dict(values) for param, values in optimizer.state.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, net: nn.Module, state: Mapping[str, Any]) -> bool:
    """Returns: False, with nothing loaded, for a state that is not by name (a published checkpoint's)."""
    names, params = {param: name for name, param in net.named_parameters()}, dict(net.named_parameters())
    order = [names[param] for group in optimizer.param_groups for param in group["params"]]
    if not set(order) <= set(state):
        return False
    groups = optimizer.state_dict()["param_groups"]

    def own(value: Any, param: Tensor) -> Any:  # not mapped to the file any more
        if not isinstance(value, Tensor | Spread):  # another optimizer's than AdamW may hold numbers
            return value
        return (shared_as(param, value) if value.shape == param.shape else whole(value)).to(param.device, copy=True)

    state = {name: {key: own(value, params[name]) for key, value in state[name].items()} for name in order}
    optimizer.load_state_dict({"state": {i: state[name] for i, name in enumerate(order)}, "param_groups": groups})
    return True
