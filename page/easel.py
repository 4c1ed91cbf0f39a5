"""Where the page's pictures are painted: one drawing at a time, into files that are served as they are.  No gradio here."""

import secrets
import shutil
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from evaluation.records import describe
from page.asked import Order, Part
from sampling import LoadedPainter, save_pictures

KEPT = 40  # drawings whose files stay


class Stopped(Exception):
    """The visitor does not want the rest."""


@dataclass
class Canvas:
    """An order as far as it is drawn."""

    visitor: str
    folder: Path
    pictures: list[tuple[Path, str]] = field(default_factory=list)  # each file and its note
    prompts: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    stopped: bool = False

    def zipped(self) -> Path:
        """All its files, and what they are of, line by line."""
        path = self.folder / "pictures.zip"
        with zipfile.ZipFile(path, "w") as file:
            for picture, _ in self.pictures:
                file.write(picture, picture.name)
            file.writestr("prompts.txt", "\n".join(self.prompts) + "\n")
            file.writestr("settings.txt", "\n".join(self.settings) + "\n")
        return path


class Easel:
    """Draws orders with a painter, each into a folder whose name nobody can guess."""

    def __init__(self, painter: LoadedPainter, folder: Path):
        if painter.job.text:
            _ = painter.encoder  # now, not while the first visitor waits
        self.painter, self.folder, self.lock = painter, folder, threading.Lock()
        self.current: Canvas | None = None
        self.kept: deque[Path] = deque()

    def draw(self, order: Order, visitor: str, tell: Callable[[float], None]) -> Iterator[Canvas]:
        """The canvas after each part of it; its files are those of --generate, byte for byte.

        Args: tell: of the share that is done, 0 to 1, at every step of the solver.  Raises: Stopped.
        """
        self.current = canvas = Canvas(visitor, self.new_folder())
        for part in order.parts:
            done, size = len(canvas.pictures), len(part.prompts)

            def go_on(t: float, done: int = done, size: int = size) -> None:
                if canvas.stopped:
                    raise Stopped
                tell((done + size * t) / order.count)

            with self.lock, times_told(self.painter.weights.net, go_on):
                pictures = self.painter(part.prompts, part.sampler, order.seed, part.first)
            places = range(done, done + size)
            save_pictures(canvas.folder, places, pictures, digits=4)
            canvas.pictures += [(canvas.folder / f"{place:04d}.png", note) for place, note in zip(places, part.notes)]
            canvas.prompts += map(str, part.prompts)
            canvas.settings += [f"{place:04d}.png: {self.setting(order, part, i)}" for i, place in enumerate(places)]
            yield canvas

    def setting(self, order: Order, part: Part, i: int) -> str:
        """How picture i of a part is drawn, in a line."""
        how = describe(self.painter.job.drawing.weights, self.painter.weights.step, part.sampler, order.seed)
        return f"picture {part.first + i}, {how}"

    def new_folder(self) -> Path:
        """The oldest one goes."""
        folder = self.folder / secrets.token_hex(16)
        folder.mkdir()
        self.kept.append(folder)
        if len(self.kept) > KEPT:
            shutil.rmtree(self.kept.popleft(), ignore_errors=True)
        return folder

    def stop(self, visitor: str | None = None) -> None:
        """The visitor's own drawing, if it is the one that is being made; None: whosever it is."""
        if self.current and visitor in (None, self.current.visitor):
            self.current.stopped = True


@contextmanager
def times_told(net: nn.Module, tell: Callable[[float], None]) -> Iterator[None]:
    """Inside, each call of the network first tells its time t: 0 noise, 1 data."""
    handle = net.register_forward_pre_hook(lambda _, inputs: tell(inputs[1][0].item()))
    try:
        yield
    finally:
        handle.remove()
