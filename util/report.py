"""What a training run says of itself: its first lines, and the lines of its log."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from config import TrainJob
from util import distributed as dist
from util.logging import say
from util.skips import Skips
from util.trackers import Board

LOW_LR = 2e-5  # below this a run of the recipe's length hardly learns: PixelGen and JiT train at 2e-4


@dataclass(frozen=True)
class Sizes:
    """What is counted before a run begins."""

    trained: int  # parameters of the network
    frozen: int  # parameters of the language model
    pictures: int
    held_out: int
    steps_per_epoch: int
    workers: int


def first_lines(job: TrainJob, sizes: Sizes, device: torch.device, bf16: bool) -> Iterator[str]:
    """What the run is, and warnings of what will hardly work."""
    train, model, processes = job.train, job.model, dist.world_size()
    batch, lr = train.effective_batch(processes), train.peak_lr(processes)
    held_out = f" and {sizes.held_out} held out" if sizes.held_out else ""
    yield f"model: {model.name} at {model.img_size} pixels, {sizes.trained / 1e6:.2f}M parameters trained, {sizes.frozen / 1e6:.2f}M frozen in the LLM"
    yield f"data: {sizes.pictures} pictures{held_out}, {sizes.steps_per_epoch} steps per epoch, {sizes.workers} loader processes"
    parts = f"{train.batch_size} x {train.accum_iter} accumulated x {processes} processes"
    yield f"batch: {batch} = {parts}; lr {lr:.3e}; {'bf16' if bf16 else 'fp32'} on {device}"
    if train.parallel != "ddp":
        yield f"weights, averages and optimizer are shared out among {processes} processes ({train.parallel})"
    if train.lr is None and lr < LOW_LR and not train.init_from:
        yield (
            f"warning: --blr {train.blr} and an effective batch of {batch} give a learning rate of {lr:.1e}, below {LOW_LR:.0e}: "
            "training will be very slow. Set --lr (1e-4 to 2e-4 for JiT-B and larger), or raise --accum_iter"
        )
    if train.min_lr > lr:
        yield f"warning: --min_lr {train.min_lr:g} is above the peak, {lr:.1e}: the learning rate will rise to it"
    if model.img_size > 256 and job.diffusion.noise_scale == 1:
        yield f"warning: --noise_scale 1 at {model.img_size} pixels; the paper scales the noise by img_size / 256, here {model.img_size / 256:g}"
    if train.label_drop_prob == 0 and job.drawing.sampler.cfg_scale != 1:
        yield "warning: with --label_drop_prob 0 the network never learns the null that --cfg needs"
    if train.warmup_epochs >= train.epochs:
        yield f"warning: --warmup_epochs {train.warmup_epochs:g} is not shorter than --epochs {train.epochs}; the learning rate never reaches its peak"
    if batch > sizes.pictures:
        yield f"warning: a step takes {batch} pictures and there are {sizes.pictures}; each is shown several times a step"


class Report:
    """Progress bar and TensorBoard of a training run; waits for the GPU only when a line is due."""

    def __init__(self, bar: tqdm, board: Board, images_per_step: int, skips: Skips):
        self.bar, self.board, self.images_per_step, self.skips = bar, board, images_per_step, skips
        self.skipped = skips.total.item()  # those that have been told
        self._start()

    def _start(self) -> None:
        self.losses, self.since = [], time.perf_counter()

    def resume_clock(self) -> None:
        """Leave out of the speed what was done between epochs."""
        if not self.losses:
            self.since = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Note the loss of a step without reading it."""
        self.losses.append(loss)
        self.bar.update()

    def line(self, step: int, lr: float, values: Mapping[str, Tensor]) -> None:
        """Read and log the mean loss since the last line, of the steps where it is finite, and this step's `values`.  Collective."""
        losses = torch.stack(self.losses)
        finite = losses.isfinite()
        counted = dist.sum_over_ranks(torch.stack([losses.where(finite, 0).sum(), finite.sum()]))
        total, count, skipped, *read = torch.stack([*counted, self.skips.total, *(value.float() for value in values.values())]).tolist()
        loss, scalars = total / count if count else math.nan, dict(zip(values, read))
        if skipped > self.skipped:
            say(f"warning: {skipped - self.skipped:.0f} of {len(losses)} steps before step {step} were skipped: their gradient was not finite")
        self.skipped = skipped
        speed = len(losses) * self.images_per_step / (time.perf_counter() - self.since)
        self.board.scalars({"train_loss": loss, "lr": lr, "images_per_second": speed, "skipped_steps": skipped, **scalars}, step)
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", images_per_s=f"{speed:.0f}")
        self._start()
