"""Files that are whole or not there, their hashes, and folders that can be written to."""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from util.errors import UserError
from util.logging import say

STALE = 600  # seconds since its last byte after which a half-written file is a dead job's


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], shared: bool = False) -> None:
    """`write` beside, sync, rename: `path` holds the old file or the new one, never half of one.

    `shared`: several jobs may write it, so their half-written files are told apart.  Raises: OSError and what `write` raises, with nothing left behind.
    """
    mark = f".{os.uname().nodename}.{os.getpid()}" if shared else ""
    temporary = path.with_name(f".{path.name}{mark}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_stale(folder: Path) -> None:
    """What killed jobs left half-written."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # another job was quicker; a folder
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()


def sync(path: Path) -> None:
    """To the disk: a file, or the names in a folder.  Raises: OSError for a file."""
    place = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # some network file systems cannot sync a folder; the file is there
            os.fsync(place)
    finally:
        os.close(place)


def beside(path: str | Path, name: str) -> Path:
    """Path of the file `name` that belongs to the data at `path`: in it if that is a folder, next to it if a file."""
    path = Path(path)
    return path.with_name(f"{path.name}.{name}") if path.is_file() else path / name


def writable_folder(path: str | Path, flag: str) -> Path:
    """The folder, made if need be.  Raises: UserError where nothing can be written in it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written to: {error.strerror}") from error
    return path


def read_lines(path: str | Path, flag: str) -> list[str]:
    """The lines of a UTF-8 file that hold text.  Raises: UserError where there are none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} cannot be read as UTF-8 text: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{flag} {path} holds no line of text")
    return lines


class Lock:
    """Keeps a folder for this process until it ends, however it ends, or frees it.

    A POSIX record lock: the system lets go of it when the process dies, and forked children do not hold it, so a lock is never stale.
    Raises: UserError where another process holds it.
    """

    def __init__(self, folder: Path, flag: str):
        self.file: IO[str] | None = None
        try:
            self.file = open(folder / ".lock", "a+")  # noqa: SIM115 (held until the process ends)
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            raise UserError(f"{flag} {folder} is in use by another job ({self.file.read().strip()}); wait for it, or name another {flag}") from None
        except OSError as error:  # a file system without locks, or another user's file
            say(f"warning: {folder} cannot be locked ({error.strerror}); see to it that no other job uses it")
            return
        with suppress(OSError):  # on a full disk the lock holds all the same
            self.file.truncate(0)
            self.file.write(f"{os.uname().nodename}, process {os.getpid()}\n")
            self.file.flush()

    def free(self) -> None:
        if self.file:
            self.file.close()


def sha256_of(path: str | Path) -> str:
    """As `sha256sum` prints it."""
    with open(path, "rb") as file:
        value = hashlib.sha256()
        while block := file.read(1 << 22):
            value.update(block)
    return value.hexdigest()
