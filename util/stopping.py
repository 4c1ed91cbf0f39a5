"""Signals that ask a run to stop: the step is finished, a checkpoint written, and the process ends with 0."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from util import distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_PRESS = 1.0  # seconds: Ctrl-C reaches a process from the terminal and again from torchrun


class Stop:
    """Notes the first signal; a second one, a second or more later, ends the process at once.

    Every rank takes notice after the same step: `agreed` tells what the ranks told each other at its last call, so none waits for the others.
    """

    def __init__(self):
        self.name, self.at = "", 0.0
        self.leave: Callable[[], None] | None = None  # what to do at once, where nothing is lost by it
        self.exchange = dist.Exchange()
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def close(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.name and now - self.at > ONE_PRESS:
            os._exit(128 + number)
        if not self.name:
            self.name, self.at = signal.Signals(number).name, now
            if self.leave:
                self.leave()

    def agreed(self) -> bool:
        """Whether any rank had noted a signal at the call before this one.  Collective."""
        return self.exchange.any(bool(self.name))

    @contextmanager
    def at_once(self, leave: Callable[[], None]) -> Iterator[None]:
        """Inside, all is saved: a signal calls `leave`, which ends the process."""
        self.leave = leave
        if self.name:
            leave()
        try:
            yield
        finally:
            self.leave = None
