"""Signals that ask a run to stop: the step is finished, a checkpoint written, and the process ends with 0."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from util import distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_PRESS = 1.0  # seconds: Ctrl-C reaches a process from the terminal and again from torchrun


class Stop:
    """Notes the first signal; a second one, a second or more later, ends the process at once, also where it waits for another rank.

    Every rank takes notice after the same step: `agreed` tells what the ranks told each other at its last call, so none waits for the others.
    """

    def __init__(self):
        self.name = ""
        self.leave: Callable[[], None] | None = None  # what to do at once, where nothing is lost by it
        self.exchange = dist.Exchange()
        reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        threading.Thread(target=watch, args=(reading,), daemon=True).start()
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)

    def close(self) -> None:
        """Signals do again what they did before."""
        signal.set_wakeup_fd(-1)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.close(self.writing)

    def _note(self, number: int, frame) -> None:
        if not self.name:
            self.name = signal.Signals(number).name
            if self.leave:
                self.leave()

    def agreed(self) -> bool:
        """Whether any rank had noted a signal at the call before this one.  Collective."""
        return self.exchange.any(bool(self.name))

    def agreed_now(self) -> bool:
        """Whether any rank has noted a signal.  Collective; waits for the others."""
        return dist.sum_over_ranks(torch.tensor(float(bool(self.name)))).item() > 0

    @contextmanager
    def at_once(self, leave: Callable[[], None]) -> Iterator[None]:
        """Inside, a signal calls `leave` at once, which ends the process.  For phases in which nothing unsaved can be lost."""
        self.leave = leave
        if self.name:
            leave()
        try:
            yield
        finally:
            self.leave = None


def watch(reading: int) -> None:
    """Ends the process at the second signal. A thread, since a handler waits for the main thread, which may wait in a collective."""
    first = None
    while number := os.read(reading, 1):
        now = time.monotonic()
        if number[0] not in SIGNALS:
            continue
        if first is None:
            first = now
        elif now - first > ONE_PRESS:
            os._exit(128 + number[0])
    os.close(reading)
