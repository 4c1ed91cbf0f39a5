"""Where a run's figures go besides the console: TensorBoard, or trackio or wandb, on rank 0 only."""

import hashlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from config import Run
from util import distributed as dist
from util.errors import need_package, one_line
from util.logging import say


def check(run: Run) -> None:
    """Raises: UserError where the tracker's package is not installed."""
    if run.tracker != "tensorboard":
        need_package(run.tracker, f"--tracker {run.tracker}")


class TensorBoard:
    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """wandb, or trackio, which has its calls. A run is known by its folder, so a resumed one goes on in the same place."""

    def __init__(self, run: Run, settings: Mapping[str, Any]):
        folder = Path(run.output_dir).resolve()
        name = f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"
        self.package = importlib.import_module(run.tracker)
        more = {"id": name, "dir": str(folder)} if run.tracker == "wandb" else {}
        self.package.init(project=run.tracker_project, name=name, config=dict(settings), resume="allow", **more)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.package.log(dict(values), step=step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self.package.log({name: self.package.Image(picture)}, step=step)

    def close(self) -> None:
        self.package.finish()


class Board:
    """The tracker of a run on rank 0, nothing elsewhere.  What goes wrong with it ends the tracking, not the training."""

    def __init__(self, run: Run, settings: Mapping[str, Any], step: int = 0):
        """settings: of the run, plain; step: where it goes on: what TensorBoard holds of later steps is hidden."""
        self.name, self.tracker = run.tracker, None
        if dist.is_main():
            self._try(lambda: self._open(run, settings, step))

    def _open(self, run: Run, settings: Mapping[str, Any], step: int) -> None:
        self.tracker = TensorBoard(Path(run.output_dir), step) if run.tracker == "tensorboard" else Hosted(run, settings)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self.tracker:
            self._try(lambda: self.tracker.scalars(values, step))

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """picture: (H, W, 3) uint8."""
        if self.tracker:
            self._try(lambda: self.tracker.image(name, picture, step))

    def close(self) -> None:
        if self.tracker:
            self._try(self.tracker.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a full disk, no network, no account: each its own exception
            self.tracker = None
            say(f"warning: {self.name} cannot be written to ({one_line(error)}); this run logs no more to it")
