"""Processes that work for a run, its loader's and others: how they begin and end, and what is said of one that died."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from util import distributed as dist
from util.errors import UserError, one_line

Item, Result = TypeVar("Item"), TypeVar("Result")


def own_cores() -> int:
    """This process's share of the machine's cores, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // dist.local_world_size())


def loader_options(count: int) -> dict[str, Any]:
    """Of a DataLoader with so many processes: forked, since the other ways copy the data set into each by pickling it.

    The generator is its own, or it would draw from the one that training uses.
    """
    start = "fork" if count else None
    return {"num_workers": count, "generator": torch.Generator(), "worker_init_fn": in_worker, "multiprocessing_context": start}


def in_worker(_: int = 0) -> None:
    """For a loader's processes: they end when they are told to, and otherwise with the process that they read for."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def loader_deaths() -> Iterator[None]:
    """Raises: UserError where a loader's process died or raised one; torch may raise either anywhere in the main thread, the traceback in its message."""
    try:
        yield
    except UserError as error:
        if "in DataLoader worker" not in str(error):
            raise
        raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a loader process died ({one_line(error)}); if memory ran out, lower --num_workers") from error


def in_processes(work: Callable[[Item], Result], items: Sequence[Item], count: int, remedy: str) -> Iterator[tuple[Item, Result]]:
    """Each item with work(item), as they are done, by so many forked processes, or by this one where that is fewer than two.

    The processes end with this one, however it ends, and at once where this is closed before its end. Each has a pipe of its own: a death is the end of its pipe.
    Raises: UserError, with the remedy, where one of them died; what `work` raises.
    """
    if count < 2:
        yield from ((item, work(item)) for item in items)
        return
    context, lifeline = get_context("fork"), os.pipe()
    taken, processes, pipes = context.Value("q", 0), [], []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work_on, args=(work, items, taken, theirs, lifeline), daemon=True)
            begin(process, remedy)
            processes.append(process)
            theirs.close()
            pipes.append(ours)
        while pipes:
            for pipe in wait(pipes):
                if (answer := received(pipe, remedy)) is None:
                    pipes.remove(pipe)
                    continue
                number, result, error = answer
                if error:
                    raise error
                yield items[number], result
    finally:
        os.close(lifeline[1])
        for process in processes:
            process.join()
        os.close(lifeline[0])


def begin(process: BaseProcess, remedy: str) -> None:
    """Raises: UserError, with the remedy, where the machine has no room for it."""
    try:
        process.start()
    except OSError as error:
        raise UserError(f"a process cannot be started ({error.strerror}); {remedy}") from error


def received(pipe: Connection, remedy: str) -> tuple[int, Any, Exception | None] | None:
    """What a process sent: the number of an item with its result or error, None when it is done.  Raises: UserError where it died."""
    try:
        return pipe.recv()
    except (EOFError, OSError):  # between answers, and within one
        raise UserError(f"a process died; {remedy}") from None


def work_on(work: Callable[[Item], Result], items: Sequence[Item], taken: Any, answers: Connection, lifeline: tuple[int, int]) -> None:
    """For such a process: the next item that none has taken, until there are no more.  lifeline: a pipe that nobody can write to once it is to end."""
    in_worker()
    os.close(lifeline[1])
    threading.Thread(target=lambda: os.read(lifeline[0], 1) or os._exit(1), daemon=True).start()
    while True:
        with taken.get_lock():
            number, taken.value = taken.value, taken.value + 1
        if number >= len(items):
            answers.send(None)
            return
        try:
            answer = number, work(items[number]), None
        except Exception as error:
            answer = number, None, ExceptionWithTraceback(error, error.__traceback__)
        answers.send(answer)
