"""What a run says while it trains, in lines and progress bars, on rank 0 only."""

import os
import sys
import threading
import weakref

from tqdm import tqdm

from util import distributed as dist
from util.errors import BEFORE_LEAVING

OPEN_BARS: weakref.WeakSet = weakref.WeakSet()


def own_lock() -> None:
    """tqdm's usual lock is one for all forked processes: one that is killed while it writes holds it for ever, and the others wait."""
    tqdm.set_lock(threading.RLock())


own_lock()
os.register_at_fork(after_in_child=own_lock)


def say(text: str) -> None:
    """One line on rank 0, above a progress bar if there is one; what the output cannot hold, such as a file's name that is not UTF-8, by its escapes."""
    if dist.is_main():
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()


def progress_bar(total: int, what: str, initial: int = 0, unit: str = "step") -> tqdm:
    """A bar with speed and time left; where the output is a file it is redrawn more rarely."""
    interval = 0.5 if sys.stderr.isatty() else 5.0
    bar = tqdm(total=total, initial=initial, desc=what, unit=unit, mininterval=interval, maxinterval=interval, disable=not dist.is_main())
    OPEN_BARS.add(bar)
    return bar


def close_bars() -> None:
    """Each ends its line, so that what is printed next has one of its own."""
    for bar in list(OPEN_BARS):
        bar.close()


BEFORE_LEAVING.append(close_bars)
