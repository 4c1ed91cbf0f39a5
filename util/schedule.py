"""What is due after a step, and the one position of a run.  Pure: no files, no clock, no tensors."""

from dataclasses import dataclass
from typing import Any

from config import Save

NUMBERED_EVERY = 100  # epochs between the checkpoints that are kept under a number


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two steps."""

    epoch: int = 0  # the one that is being trained
    epoch_step: int = 0  # steps of it that are done
    step: int | None = 0  # optimizer steps done in all; None where a published file does not say
    skips: Any = None  # Skips.kept() at this step
    evaluation_due: bool = False  # whether an evaluation belongs here, between two epochs


@dataclass(frozen=True)
class Due:
    """What is to be done after a step, in this order."""

    log: bool = False
    save: bool = False
    numbered: bool = False  # saved under the epoch's number too
    evaluate: bool = False
    stop: bool = False


@dataclass(frozen=True)
class Schedule:
    save: Save
    epochs: int
    steps_per_epoch: int
    log_freq: int = 100
    evaluates: bool = False

    def after(self, epoch: int, i: int, step: int, stopping: bool) -> Due:
        """What is due after step `i` of the epoch, the run's number `step` (the first is 1); `stopping`: a signal has asked for the end."""
        ends, last = i == self.steps_per_epoch - 1, epoch == self.epochs - 1
        evaluate = ends and self.evaluates and (last or (epoch + 1) % self.save.eval_every == 0)
        numbered = ends and epoch > 0 and epoch % NUMBERED_EVERY == 0
        regular = ends and (last or (epoch + 1) % self.save.every_epochs == 0)
        in_between = self.save.every_steps is not None and step % self.save.every_steps == 0
        save = stopping or regular or in_between or evaluate or numbered
        return Due(save or step % self.log_freq == 0, save, numbered, evaluate, stopping)

    def progress(self, epoch: int, i: int, step: int) -> Progress:
        """The position after that step."""
        return Progress(epoch + 1, 0, step) if i == self.steps_per_epoch - 1 else Progress(epoch, i + 1, step)
