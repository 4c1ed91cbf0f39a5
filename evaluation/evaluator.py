"""Evaluation of weights under a setting: pictures drawn over all ranks, measured as they are drawn, the figures written down with all they depend on.

Picture i follows from the seed, i and its condition alone.
"""

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import SamplerConfig
from evaluation.measures import Measure, Subjects
from evaluation.records import Record, as_plain, read_record, write_list, write_record
from resume import Weights
from sampling import Painter, save_pictures
from util import distributed as dist
from util.checkpoint import digest
from util.errors import one_line
from util.extractors import on_device
from util.logging import say

MUCH_INITIAL = 0.05  # share of initial weights in an average that is called out
LIBRARIES = ("torch", "torchvision", "torch-fidelity", "transformers", "timm", "numpy", "pillow")


def evaluate(
    painter: Painter, y_of: Callable[[Tensor], Tensor], subjects: Subjects, measures: Sequence[Measure], folder: Path | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Draw a picture of each subject over all ranks and measure them as they are drawn.  Collective.

    Args: y_of: the subjects' conditions -> what the network takes, (B, ...); folder: where to keep the pictures as PNG, if at all.
    Returns: rank 0's figures, and the seconds that rank 0 spent.
    """
    started = time.perf_counter()
    seconds = {"drawing": 0.0, "features": 0.0}
    for measure in measures:
        measure.begin(subjects)
    drawn = painter.draw(lambda numbers: y_of(subjects.conditions[numbers]), len(subjects), "evaluation")
    while True:
        before = time.perf_counter()
        batch = next(drawn, None)
        seconds["drawing"] += time.perf_counter() - before
        if batch is None:
            break
        if folder:
            folder = saved(folder, batch)
        before = time.perf_counter()
        for measure in measures:
            measure.add(*batch)
        seconds["features"] += time.perf_counter() - before
    figures = {}
    for measure in measures:
        figures |= measure.figures()
    seconds["rest"] = time.perf_counter() - started - sum(seconds.values())
    return dist.from_main(figures), seconds


def call_out_initial(state: Weights, which: str) -> None:
    """An average that still holds much of the initial weights draws noise, however well training goes.  A published file says no step."""
    shares = {str(i + 1): ema.initial_share(state.step) for i, ema in enumerate(state.emas)}
    if state.step and shares.get(which, 0) >= MUCH_INITIAL:
        better = ["raw", *(other for other, share in shares.items() if share < MUCH_INITIAL)]
        say(f"warning: EMA {which} is {shares[which]:.0%} initial weights at step {state.step:,}; use --eval_ema {' or '.join(better)}")


class Point(NamedTuple):
    """What one evaluation is of: weights, sampler, number of pictures, and all in all what its record will depend on."""

    weights: str
    sampler: SamplerConfig
    count: int
    setting: dict[str, Any]


@dataclass(frozen=True)
class Evaluator:
    """evaluator(weights, sampler, count) -> Record, which is written down in `folder` too, with the pictures where `save_images` says so."""

    state: Weights
    painter: Painter
    measures: Sequence[Measure]
    y_of: Callable[[Tensor], Tensor]  # conditions of subjects -> what the network takes
    subjects: Mapping[int, Subjects]  # by number of pictures
    facts: Mapping[str, Any]  # of the run: model, precision, text
    folder: Path
    checkpoint: str | None = None  # the file whose weights these are
    save_images: bool = False
    hashes: dict[tuple[str, int], str] = field(default_factory=dict)  # of weights at a step, once for all settings of a sweep

    def on_device(self) -> AbstractContextManager[None]:
        """All that is measured, is measured inside."""
        return on_device([measure.extractor for measure in self.measures])

    def __call__(self, weights: str, sampler: SamplerConfig, count: int) -> Record:
        """Draw and measure.  Collective."""
        return self.measure(self.point(weights, sampler, count))

    def measure(self, point: Point) -> Record:
        """Collective."""
        path, subjects = self.path_of(point.setting), self.subjects[point.count]
        folder = pictures_folder(path) if self.save_images else None
        with self.state.drawing(point.weights):
            figures, seconds = evaluate(replace(self.painter, sampler=point.sampler), self.y_of, subjects, self.measures, folder)
        record = Record(figures, point.setting, self._made(subjects, seconds))
        say(f"{record.line()}  {path.name}{f', pictures in {folder}' if folder else ''}")
        if dist.is_main():
            with warned(path):
                write_record(path, record)
                if folder:
                    write_list(folder, subjects.captions or subjects.conditions.tolist())
        return record

    def recall(self, point: Point) -> Record | None:
        """The record of the same setting that was written down before, if any.  Collective."""
        path = self.path_of(point.setting)
        known = dist.from_main(read_record(path, point.setting) if dist.is_main() else None)
        if known:
            say(f"{known.line()}  as measured before: {path.name}")
        return known

    def point(self, weights: str, sampler: SamplerConfig, count: int) -> Point:
        """Reads all weights once, for their hash.  Collective."""
        with self.state.drawing(weights):
            return Point(weights, sampler, count, self._setting(weights, replace(self.painter, sampler=sampler), self.subjects[count]))

    def path_of(self, setting: dict[str, Any]) -> Path:
        return self.folder / f"{Record({}, setting).name}.json"

    def _setting(self, weights: str, painter: Painter, subjects: Subjects) -> dict[str, Any]:
        """What a record depends on, on all ranks as rank 0 sees it.  Collective."""
        if not dist.is_main():
            return dist.from_main(None)
        decay = None if weights == "raw" else self.state.emas[int(weights) - 1].decay
        setting = {
            **self.facts,
            "weights": {"which": weights, "decay": decay, "step": self.state.step or None, "sha256": self._hash(weights)},
            "img_size": painter.img_size,
            "diffusion": asdict(painter.diffusion),
            "sampling": asdict(painter.sampler),
            "seed": painter.seed,
            "pictures": len(subjects),
            "subjects_sha256": subjects.digest(),
            "libraries": {name: version(name) for name in LIBRARIES},
        }
        for measure in self.measures:
            setting |= measure.facts(subjects)
        return dist.from_main(as_plain(setting))

    def _hash(self, weights: str) -> str:
        """Of the network as it computes now."""
        key = (weights, self.state.step)
        if key not in self.hashes:
            self.hashes[key] = digest(self.state.drawn.state_dict())
        return self.hashes[key]

    def _made(self, subjects: Subjects, seconds: Mapping[str, float]) -> dict[str, Any]:
        device = self.painter.device
        return {
            "checkpoint": self.checkpoint,
            "subjects": subjects.source,
            "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "processes": dist.world_size(),
            "batch": self.painter.batch_size or self.painter.room.pictures,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "pictures_per_second": round(len(subjects) / sum(seconds.values()), 3),
        }


def pictures_folder(path: Path) -> Path:
    """An empty folder beside a record's file, for its pictures.  Collective."""
    folder = path.with_suffix("")
    with warned(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if dist.is_main():
            for old in folder.glob("*.png"):
                old.unlink()
    dist.barrier()
    return folder


def saved(folder: Path, batch: tuple[list[int], Tensor]) -> Path | None:
    """Where to save the next batch: nowhere, once one could not be."""
    with warned(folder):
        save_pictures(folder, *batch, digits=6)
        return folder
    return None


@contextmanager
def warned(path: Path) -> Iterator[None]:
    """A full disk costs what was to be written, and not the figures, nor the run that is evaluated."""
    try:
        yield
    except OSError as error:
        say(f"warning: {path} cannot be written ({one_line(error)})")
