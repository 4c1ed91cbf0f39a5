"""Evaluation within training: figures, if any can be had, and the test prompts' pictures, to TensorBoard."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import sampling
from evaluation.evaluator import Evaluator, call_out_initial
from resume import Weights
from util import distributed as dist
from util.trackers import Board

EVALUATED = ".evaluated"  # holds the step of the latest evaluation that came to its end


@dataclass(frozen=True)
class OnlineEvaluation:
    evaluator: Evaluator | None  # None where nothing can be measured
    painter: sampling.Painter
    prompts: Sequence
    y: Tensor  # of the prompts
    weights: str
    count: int
    folder: Path

    def __call__(self, state: Weights, board: Board) -> None:
        """Leaves weights, optimizer and random states as they are.  Collective."""
        if self.evaluator:
            call_out_initial(state, self.weights)
            with self.evaluator.on_device():
                record = self.evaluator(self.weights, self.painter.sampler, self.count)
            board.scalars(record.scalars(), state.step)
        with state.drawing(self.weights):
            board.image("test_prompts", sampling.draw_sheet(self.painter, self.y, self.prompts), state.step)
        torch.cuda.empty_cache()  # training goes on with tensors of other sizes
        if dist.is_main():
            with suppress(OSError):  # on a full disk it may be made twice
                (self.folder / EVALUATED).write_text(str(state.step))

    def made(self, step: int) -> bool:
        """Whether the evaluation of this step came to its end.  Collective."""
        path = self.folder / EVALUATED
        return dist.from_main(path.is_file() and path.read_text() == str(step))
