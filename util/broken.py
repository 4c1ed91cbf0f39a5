"""Broken pictures, those that cannot be read: how many a data set may have, and the list of those that were met."""

import errno
from collections.abc import Sequence
from pathlib import Path

from util import distributed as dist
from util.errors import UserError, one_line
from util.files import write_whole
from util.logging import say

MOST = 0.01  # share of a data set's pictures
LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}  # of a file; others pass


def too_many(count: int, size: int) -> bool:
    return count > MOST * size


def most(size: int) -> int:
    """How many of `size` pictures may be broken."""
    return int(MOST * size)


def check_allowed(lines: Sequence[str], policy: str) -> None:
    """Raises: UserError for a broken picture under --bad_images error."""
    if lines and policy == "error":
        raise UserError(f"broken picture {lines[0]}; to skip broken pictures give --bad_images skip")


def check_of_picture(name: str, error: Exception) -> None:
    """Raises: UserError for an error of the disk, the network or the memory, which says nothing about the picture."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None and error.errno not in LASTING):
        raise UserError(f"{name} cannot be read now ({one_line(error) or 'no memory left'}); run the command again: finished work is kept") from error


class Broken:
    """The broken pictures that were met, a line each with file name and reason: this rank's, and after `write` all ranks'."""

    def __init__(self, folder: Path, size: int, policy: str, known: Sequence[str] = ()):
        """size: of the data set; policy: --bad_images, "error" or "skip"; known: lines of before."""
        self.path, self.size, self.policy = folder / "bad_images.txt", size, policy
        self.lines: set[str] = set(known)
        self.told = 0

    def note(self, lines: Sequence[str]) -> None:
        """Raises: UserError under --bad_images error, and where too many are broken; the list is written before."""
        if not lines:
            return
        self.lines.update(lines)
        check_allowed(lines, self.policy)
        if too_many(len(self.lines), self.size):
            self._write()
        self._check()

    def write(self) -> None:
        """Write all ranks' list.  Collective.  Raises: UserError where too many are broken."""
        self.lines.update(*dist.gather_objects(self.lines))
        if len(self.lines) > self.told:
            self.told = len(self.lines)
            say(f"{len(self.lines)} broken pictures so far, listed in {self.path}")
            if dist.is_main():
                self._write()
            dist.barrier()
        self._check()

    def _check(self) -> None:
        if too_many(len(self.lines), self.size):
            raise UserError(f"{len(self.lines)} of {self.size} pictures cannot be read, over 1 %; {self.path} lists them, the first is {min(self.lines)}")

    def _write(self) -> None:
        """Add to what the file holds; any rank may do it."""
        try:
            before = self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if self.path.exists() else []
            text = "\n".join(sorted({*before, *self.lines})) + "\n"
            write_whole(self.path, lambda file: file.write(text.encode("utf-8", "surrogateescape")), shared=True)
        except OSError as error:
            say(f"warning: {self.path} cannot be written ({error.strerror})")
