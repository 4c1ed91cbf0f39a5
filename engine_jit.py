"""One epoch of training, one round of prompts."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from denoiser import DiffusionConfig, Net, SamplerConfig, denoising_loss, sample, sample_time
from util import distributed as dist
from util.ema import Ema
from util.errors import UserError, one_line
from util.logging import Board, progress, say
from util.lr_sched import lr_at
from util.randomness import derive, normal, uniform
from util.sheet import captioned_sheet, save_sheet

# What --generate draws where no --prompt is given, and what every evaluation shows in TensorBoard. Edit freely.
test_prompts = [
    "猫の写真",
    "犬の写真",
    "風景の写真",
    "建物の写真",
    "花の写真",
    "車の写真",
    "鳥の写真",
    "食べ物の写真",
    "人物の写真",
    "動物の写真",
]


MOST_SKIPS = 10  # steps in a row with a gradient that is not finite


class Conditions(Protocol):
    """Labels or caption numbers, (B,) int64 -> y, (B, ...)."""

    null: Tensor  # y of nothing, (1, ...)
    in_loader: bool  # whether the loader's processes call it, or else the step

    def __call__(self, raw: Tensor) -> Tensor: ...


class LabelConditions:
    """Class labels are their own y; the null label is the one after the last."""

    in_loader = True

    def __init__(self, num_classes: int):
        self.null = torch.tensor([num_classes])

    def __call__(self, labels: Tensor) -> Tensor:
        return labels


@dataclass(frozen=True)
class TrainConfig:
    lr: float
    epochs: int
    steps_per_epoch: int
    warmup_epochs: float = 5
    lr_schedule: str = "constant"
    min_lr: float = 0.0
    accum_iter: int = 1
    label_drop_prob: float = 0.1
    grad_clip: float | None = None
    bf16: bool = False
    seed: int = 0
    log_freq: int = 100
    bad_images: str = "skip"


@dataclass
class TrainState:
    """What training changes."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    emas: list[Ema]
    step: int = 0  # optimizer steps done
    broken: set[str] = field(default_factory=set)  # picture files met that cannot be read


@contextmanager
def drawing_with(state: TrainState, weights: str) -> Iterator[None]:
    """Inside, the network is in evaluation mode and computes with an average, "1" or "2", or with its own weights, "raw"."""
    state.net.eval()
    with nullcontext() if weights == "raw" else state.emas[int(weights) - 1].applied(state.net):
        yield


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor without waiting for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def in_precision(net: nn.Module, device: torch.device, bf16: bool) -> Net:
    """The network under bf16 autocast, or as it is; weights, z_t and t stay float32 either way."""

    def call(z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return net(z_t, t, y)

    return call


def drop_conditions(y: Tensor, null: Tensor, numbers: Sequence[int], probability: float, seed: int) -> Tensor:
    """y (B, ...) with the null in place of a share of its rows, chosen by the samples' numbers."""
    dropped = to_device(uniform(seed, "drop", numbers) < probability, y.device)
    return torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), null, y)


def to_model_range(pictures: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def batch_loss(net: Net, batch: tuple, conditions: Conditions, null: Tensor, diffusion: DiffusionConfig, config: TrainConfig, device: torch.device) -> Tensor:
    """The loss of one batch of the loader; its noise, times and dropped conditions follow from the samples' numbers."""
    pictures, y, numbers, _ = batch
    x = to_model_range(pictures.to(device, non_blocking=True))  # pinned by the loader unless --no_pin_mem
    y = (y if conditions.in_loader else conditions(y)).to(device, non_blocking=True)
    y = drop_conditions(y, null, numbers, config.label_drop_prob, config.seed)
    t = to_device(sample_time(normal(config.seed, "t", numbers, ()), diffusion), device)
    eps = diffusion.noise_scale * normal(config.seed, "eps", numbers, x.shape[1:], device)
    return denoising_loss(net, x, eps, t, y, diffusion.t_eps)


class TextGap:
    """Is the text listened to?  The v-loss of one fixed batch under its own captions, under each other's, and under the null.

    A network that ignores its captions has the same loss under all three. The times are the quantiles of the training's.
    Each rank holds its share of the `size` samples, measured `batch_size` at a time.
    """

    def __init__(
        self, dataset, pictures: Sequence[int], size: int, conditions: Conditions, diffusion: DiffusionConfig, seed: int, batch_size: int, device: torch.device
    ):
        self.size = max(size, dist.world_size())
        found = [dataset.readable(pictures[i % len(pictures)])[:2] for i in range(self.size)]
        lines = torch.tensor([dataset.condition(index, i) for i, (_, index) in enumerate(found)])
        shift = min(range(1, self.size), key=lambda k: int((lines == lines.roll(k)).sum()))  # as few as can be keep their caption
        times = sample_time(torch.special.ndtri((torch.arange(self.size) + 0.5) / self.size), diffusion)
        mine = slice(dist.rank(), None, dist.world_size())
        self.numbers = range(self.size)[mine]
        self.pictures = torch.stack([picture for picture, _ in found[mine]]).to(device)
        self.t = times[mine].to(device)
        null = conditions.null.expand(len(self.numbers), *conditions.null.shape[1:])
        self.y = [y.to(device) for y in (conditions(lines[mine]), conditions(lines.roll(shift)[mine]), null)]
        self.diffusion, self.seed, self.batch_size = diffusion, seed, batch_size

    @torch.no_grad()
    def measure(self, net: nn.Module, bf16: bool) -> dict[str, Tensor]:
        """Loss under the own captions, and what it grows by under the others' and under the null.  Collective."""
        net.eval()
        call = in_precision(net, self.t.device, bf16)
        sums = torch.zeros(3, device=self.t.device)
        for start in range(0, len(self.numbers), self.batch_size):
            part = slice(start, start + self.batch_size)
            x = to_model_range(self.pictures[part])
            eps = self.diffusion.noise_scale * normal(self.seed, "gap", self.numbers[part], x.shape[1:], x.device)
            losses = [denoising_loss(call, x, eps, self.t[part], y[part], self.diffusion.t_eps) for y in self.y]
            sums += len(x) * torch.stack(losses)
        net.train()
        own, shuffled, null = dist.sum_over_ranks(sums) / self.size
        return {"text_gap/loss": own, "text_gap/shuffled": shuffled - own, "text_gap/null": null - own}


class Report:
    """Progress bar and TensorBoard of a training run; waits for the GPU only when a line is due."""

    def __init__(self, bar: tqdm, board: Board, images_per_step: int, skips: "Skips"):
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


class Skips:
    """Steps whose gradient is not finite change neither weights nor optimizer; counted on the device, so that nothing waits.

    The gradient is the mean over all ranks, so all skip the same steps.
    """

    def __init__(self, device: torch.device, before: Tensor | None = None):
        """before: `kept` of the run that goes on."""
        self.total, self.in_a_row, self.longest, self.longest_at = torch.zeros(4, device=device)
        if before is not None:
            self.total, self.in_a_row = before.to(device)

    def kept(self) -> Tensor:
        """For a checkpoint: all of them, and the last ones in a row."""
        return torch.stack([self.total, self.in_a_row])

    def note(self, grad_norm: Tensor, step: int) -> Tensor:
        """Returns: 1.0 where step `step` (the first is 1) is to be skipped, as a fused optimizer takes it in `found_inf`."""
        bad = (~grad_norm.isfinite()).float()
        self.total = self.total + bad
        self.in_a_row = (self.in_a_row + 1) * bad
        self.longest_at = torch.where(self.in_a_row > self.longest, step, self.longest_at)
        self.longest = torch.maximum(self.longest, self.in_a_row)
        return bad

    def too_many(self) -> int | None:
        """The last of the longest row of skipped steps, if there were MOST_SKIPS; reads the device."""
        longest, at = torch.stack([self.longest, self.longest_at]).tolist()
        return int(at) if longest >= MOST_SKIPS else None


def note_broken(state: TrainState, broken: Sequence[str], size: int, policy: str) -> None:
    """Remember unreadable pictures.  Raises: UserError under --bad_images error, and where they are over 1 % of the data."""
    state.broken.update(broken)
    if broken and policy == "error":
        raise UserError(f"unreadable picture {broken[0]}; go on without such by --bad_images skip")
    if len(state.broken) > 0.01 * size:
        raise UserError(f"{len(state.broken)} of {size} pictures cannot be read, over 1 %; the first is {min(state.broken)}")


def grad_norm_of(module: nn.Module) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def take_step(state: TrainState, config: TrainConfig, skips: Skips) -> Tensor:
    """Clip, step, averages; weights and optimizer stay as they are where the gradient is not finite.  Returns: its length, before clipping."""
    parameters = list(state.net.parameters())
    norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip) if config.grad_clip else grad_norm_of(state.net)
    state.optimizer.found_inf = skips.note(norm, state.step + 1)  # what a gradient scaler would set; the fused optimizer looks at it on the device
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    for ema in state.emas:
        ema.update(state.net, state.step)
    state.step += 1
    return norm


def train_one_epoch(
    state: TrainState,
    parallel: nn.Module,
    loader: DataLoader,
    conditions: Conditions,
    diffusion: DiffusionConfig,
    config: TrainConfig,
    epoch: int,
    first: int,
    report: Report,
    skips: Skips,
    pause: Callable[[int], Callable[[int], bool] | None],
    gap: TextGap | None,
    device: torch.device,
) -> None:
    """The steps of one epoch from number `first` on.  Collective.

    `parallel` is `state.net` as DDP runs it. Before step i, pause(i) says what is to be done after it, if anything: a line is due
    then too, so what is saved is known to be finite; where that returns False, the epoch ends there.
    `gap` is measured wherever a line of the log is due.
    """
    state.net.train()
    report.resume_clock()
    net = in_precision(parallel, device, config.bf16)
    null = conditions.null.to(device)
    batches = iter(loader)
    for i in range(first, config.steps_per_epoch):
        lr = lr_at(epoch + i / config.steps_per_epoch, config.lr, config.warmup_epochs, config.epochs, config.lr_schedule, config.min_lr)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        after = pause(i)
        torch.manual_seed(derive(config.seed, "dropout", state.step * dist.world_size() + dist.rank()))
        losses = []
        for part in range(config.accum_iter):
            batch = next(batches)
            note_broken(state, batch[3], len(loader.dataset), config.bad_images)
            with dist.no_sync(parallel, part < config.accum_iter - 1):
                loss = batch_loss(net, batch, conditions, null, diffusion, config, device)
                (loss / config.accum_iter).backward()
            losses.append(loss.detach())
        due = after is not None or (state.step + 1) % config.log_freq == 0
        values = {"text_gap/grad_norm": grad_norm_of(state.net.y_embedder)} if due and gap else {}  # before any clipping
        norm = take_step(state, config, skips)
        report.add(torch.stack(losses).mean())
        if due:
            report.line(state.step, lr, {"grad_norm": norm} | values | (gap.measure(state.net, config.bf16) if gap else {}))
            if (last := skips.too_many()) is not None:
                position = epoch * config.steps_per_epoch + i - (state.step - last)
                raise UserError(too_many_skips(last, position, loader, config, lr))
        if after is not None and not after(i):
            return


@contextmanager
def loader_deaths() -> Iterator[None]:
    """Raises: UserError where a loader's process died; torch tells of it wherever the program is."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a loader process died ({one_line(error)}); if that was for want of memory, lower --num_workers") from error


def too_many_skips(step: int, position: int, loader: DataLoader, config: TrainConfig, lr: float) -> str:
    """What is needed to see the last of the skipped steps again; it is the run's number `position`, counted from 0."""
    names = [loader.dataset.paths[index] for index in loader.sampler.pictures_of(position * config.accum_iter, config.accum_iter)]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"the gradient of {MOST_SKIPS} steps in a row was not finite, steps {step - MOST_SKIPS + 1} to {step} (lr {lr:.2e}, --seed {config.seed}); none of them "
        f"changed the weights. Try a smaller --lr or --grad_clip 1. Pictures of step {step}: {shown}"
    )


@dataclass(frozen=True)
class Painter:
    """A network with all that drawing takes; picture i depends on seed, i and its condition alone."""

    net: Net
    null: Tensor  # (1, ...)
    img_size: int
    diffusion: DiffusionConfig
    sampler: SamplerConfig
    batch_size: int
    device: torch.device
    seed: int = 0

    def paint(self, numbers: Sequence[int], y: Tensor) -> Tensor:
        """Pictures of those numbers under conditions y, (B, 3, H, W), about [-1, 1]."""
        noise = normal(self.seed, "sample", numbers, (3, self.img_size, self.img_size)).to(self.device)
        y, null = y.to(self.device), self.null.to(self.device)
        return sample(self.net, noise, y, null.expand(len(y), *null.shape[1:]), self.diffusion, self.sampler)

    def draw(self, y_of: Callable[[Sequence[int]], Tensor], count: int, what: str) -> Iterator[tuple[list[int], Tensor]]:
        """This rank's share of pictures 0 .. count - 1: their numbers and (B, 3, H, W) uint8 on the CPU.

        y_of: numbers -> conditions (B, ...).  A progress bar stands on rank 0.
        """
        mine = range(dist.rank(), count, dist.world_size())
        with progress(len(mine), what, unit="picture") as bar:
            for start in range(0, len(mine), self.batch_size):
                numbers = list(mine[start : start + self.batch_size])
                yield numbers, to_levels(self.paint(numbers, y_of(numbers)))
                bar.update(len(numbers))


def to_levels(pictures: Tensor) -> Tensor:
    """[-1, 1] to uint8 on the CPU, as a PNG holds it."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) uint8 to an RGB picture."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def save_pictures(folder: Path, numbers: Sequence[int], pictures: Tensor, digits: int) -> None:
    """(B, 3, H, W) uint8 to one PNG each, named by number."""
    for i, picture in zip(numbers, pictures):
        to_image(picture).save(folder / f"{i:0{digits}d}.png")


def generate(painter: Painter, y: Tensor, prompts: Sequence, folder: Path) -> Path:
    """Draw each prompt into folder/NNNN.png, and all of them on folder/sheet.png.  Collective.

    Args: y: (prompts, ...), their conditions.  Returns: the sheet's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for numbers, pictures in painter.draw(lambda numbers: y[numbers], len(prompts), "pictures"):
        save_pictures(folder, numbers, pictures, digits=4)
    dist.barrier()
    if dist.is_main():
        captions = [str(prompt) for prompt in prompts]
        (folder / "prompts.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        shown = [Image.open(folder / f"{i:04d}.png") for i in range(min(len(prompts), 400))]
        save_sheet(folder / "sheet.png", shown, captions[: len(shown)])
    return folder / "sheet.png"


def prompt_grid(painter: Painter, y: Tensor, prompts: Sequence) -> np.ndarray:
    """The prompts' pictures as one captioned sheet, (H, W, 3) uint8.  Collective.  y: (prompts, ...)."""
    drawn = list(painter.draw(lambda numbers: y[numbers], len(prompts), "test prompts"))
    empty = torch.empty(0, 3, painter.img_size, painter.img_size, dtype=torch.uint8)
    numbers = dist.gather_rows(torch.tensor([i for part, _ in drawn for i in part], dtype=torch.long))
    pictures = dist.gather_rows(torch.cat([empty, *(part for _, part in drawn)]))[numbers.argsort()]
    return np.asarray(captioned_sheet([to_image(p) for p in pictures], [str(prompt) for prompt in prompts], columns=5)[0])
