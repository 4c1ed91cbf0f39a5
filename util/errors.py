"""The one error that a user is meant to read, and how a process ends with it."""

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

BEFORE_LEAVING: list[Callable[[], None]] = []  # ends the lines that are still open, such as a progress bar's


class UserError(ValueError):
    """What a user can put right; every program prints it as one line: what was found, what was wanted, which flag to turn."""


def one_line(error: BaseException, longest: int = 200) -> str:
    """What an exception says, for a message of ours to quote."""
    return " ".join(str(error).split())[:longest]


def need_package(name: str, who: str, install: str = "") -> None:
    """Raises: UserError where an extra's package is not installed.  who: the flag or program that needs it; install: how pip is to be asked for it."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{who} needs its package: pip install {install or name}")


def leave(message: str, code: int) -> NoReturn:
    """Print one line and end the process, in a torchrun group at once: waiting for the other ranks could last for ever."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # the same error on rank 0 ends the run before; a line of this rank is for one of its own
    for action in BEFORE_LEAVING:
        action()
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if "WORLD_SIZE" in os.environ:
        os._exit(code)
    sys.exit(code)


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """A program's body; what a user can put right ends it in one line."""
    try:
        yield
    except UserError as error:
        leave(f"error: {error}", 1)
