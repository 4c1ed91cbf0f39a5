"""What a run says while it trains: a progress bar and TensorBoard, both on rank 0 only."""

import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from util import distributed as dist
from util.errors import BEFORE_LEAVING

OPEN_BARS: weakref.WeakSet = weakref.WeakSet()


def say(text: str) -> None:
    """One line on rank 0, above a progress bar if there is one."""
    if dist.is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress(total: int, what: str, initial: int = 0, unit: str = "step") -> tqdm:
    """A bar with speed and time left; where the output is a file it is redrawn more rarely."""
    interval = 0.5 if sys.stderr.isatty() else 5.0
    delay = 1.0 if unit == "caption" else 0.0  # a few prompts take no time
    bar = tqdm(total=total, initial=initial, desc=what, unit=unit, mininterval=interval, maxinterval=interval, delay=delay, disable=not dist.is_main())
    OPEN_BARS.add(bar)
    return bar


def close_bars() -> None:
    """Each ends its line, so that what is printed next has one of its own."""
    for bar in list(OPEN_BARS):
        bar.close()


BEFORE_LEAVING.append(close_bars)


class Board:
    """TensorBoard on rank 0, nothing elsewhere."""

    def __init__(self, folder: Path, step: int = 0):
        """step: where the run goes on; what was logged after it is hidden."""
        self.writer = None
        if dist.is_main():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._try(lambda writer, name=name, value=value: writer.add_scalar(name, value, step))

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """picture: (H, W, 3) uint8."""
        self._try(lambda writer: writer.add_image(name, picture, step, dataformats="HWC"))

    def close(self) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, action: Callable[[Any], None]) -> None:
        """A full disk ends the events, not the training."""
        if self.writer:
            try:
                action(self.writer)
            except OSError as error:
                self.writer = None
                say(f"warning: TensorBoard's events cannot be written ({error}); this run logs no more of them")
