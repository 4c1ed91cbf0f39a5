"""One epoch of training, a step and its loss."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader

from conditioning import Conditions, drop_conditions
from config import Train
from datasets.stream import Batch
from datasets.transforms import to_model_range
from denoiser import Net, Objective
from resume import Saver, TrainState
from util import distributed as dist
from util.broken import Broken
from util.errors import UserError
from util.lr_sched import lr_at
from util.muon import Muon
from util.parallel import Parallel, to_device
from util.randomness import normal, seed_step
from util.report import Report
from util.schedule import Due, Schedule
from util.sharding import whole
from util.skips import MOST_SKIPS, Skips
from util.stopping import Stop
from util.text import Y

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


@dataclass
class Training:
    """All that the steps of a run take."""

    state: TrainState
    parallel: Parallel  # the network, as training calls it
    loader: DataLoader
    conditions: Conditions
    null: Y  # conditions.null, on the device
    objective: Objective
    config: Train
    peak_lr: float
    schedule: Schedule
    report: Report
    skips: Skips
    broken: Broken
    stop: Stop
    save: Saver
    gap: Callable[[], dict[str, Tensor]] | None  # evaluation.text_gap, for text models
    seed: int
    device: torch.device


def make_optimizer(net: nn.Module, weight_decay: float, device: torch.device, kind: str = "adamw") -> torch.optim.Optimizer:
    """AdamW as in the paper's table 9, no decay on biases, norms and one-dimensional tensors; `muon`: Muon for the matrices of the blocks."""
    matrices = [param for block in net.repeated for param in block.parameters() if param.ndim == 2] if kind == "muon" else []
    own = {id(param) for param in matrices}
    groups = [group | {"params": [param for param in group["params"] if id(param) not in own]} for group in param_groups_weight_decay(net, weight_decay)]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))
    return Muon(matrices, weight_decay, adamw) if matrices else adamw


def batch_loss(net: Net, batch: Batch, training: Training) -> Tensor:
    """The loss of one batch of the loader; its noise follows from the samples' numbers, as the times and dropped conditions that came with it do."""
    conditions, device = training.conditions, training.device
    x = to_model_range(batch.pictures.to(device, non_blocking=True).contiguous())  # pinned by the loader unless --no_pin_mem
    y = (batch.y if conditions.in_loader else conditions(batch.y)).to(device, non_blocking=True)
    y = drop_conditions(y, training.null, to_device(torch.from_numpy(batch.dropped), device))
    t = to_device(torch.from_numpy(batch.t), device)
    noise = normal(training.seed, "eps", batch.numbers, x.shape[1:], device)
    return training.objective(net, x, noise, t, y)


def grad_norm_of(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of the gradients of these parameters, ().  Collective where they are sharded."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def take_step(state: TrainState, grad_clip: float | None, skips: Skips) -> Tensor:
    """Clip, step, averages; weights and optimizer stay as they are where the gradient is not finite.  Returns: the gradient's norm before clipping."""
    norm = whole(nn.utils.clip_grad_norm_(state.trained, grad_clip)) if grad_clip else grad_norm_of(state.trained)
    state.optimizer.found_inf = skips.note(norm, state.step + 1)  # what a gradient scaler would set; the fused optimizer looks at it on the device
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    for ema in state.emas:
        ema.update(state.trained, state.step)
    state.step += 1
    return norm


def set_lr(training: Training, epoch: float) -> float:
    """Set and return the learning rate.  epoch: fractional, 0 at the run's first step."""
    config = training.config
    lr = lr_at(epoch, training.peak_lr, config.warmup_epochs, config.epochs, config.lr_schedule, config.min_lr)
    for group in training.state.optimizer.param_groups:
        group["lr"] = lr
    return lr


def add_gradients(training: Training, batches: Iterator[Batch]) -> Tensor:
    """Backward passes of one optimizer step, one per accumulation part.  Returns: the mean loss, (), still on the device."""
    losses, parts = [], training.config.accum_iter
    for part in range(parts):
        batch = next(batches)
        training.broken.note(batch.broken)
        with training.parallel.keeps_gradients(part < parts - 1):
            loss = batch_loss(training.parallel, batch, training)
            (loss / parts).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def train_one_epoch(training: Training, batches: Iterator[Batch], epoch: int, first: int) -> Due:
    """The steps of one epoch from number `first` on, of the run's batches.  Returns: what is due after the last one that was taken.  Collective.

    Nothing waits for the GPU but a line of the log (and, with --text_cache off, transformers itself for its mask). Where a checkpoint is due a line is too, so what is saved is known to be finite.
    """
    state, schedule, due = training.state, training.schedule, Due()
    training.report.resume_clock()
    for i in range(first, schedule.steps_per_epoch):
        lr = set_lr(training, epoch + i / schedule.steps_per_epoch)
        due = schedule.after(epoch, i, state.step + 1, training.stop.agreed())
        seed_step(training.seed, state.step * dist.world_size() + dist.rank(), training.device)
        loss = add_gradients(training, batches)
        measured = due.log and training.gap and not training.config.lora_rank
        values = {"text_gap/grad_norm": grad_norm_of(state.net.y_embedder.parameters())} if measured else {}  # before clipping
        training.save.settle()  # the last checkpoint may still be on its way from the GPU
        norm = take_step(state, training.config.grad_clip, training.skips)
        training.report.add(loss)
        if due.log:
            training.report.line(state.step, lr, {"grad_norm": norm} | values | (training.gap() if training.gap else {}))
            check_skips(training, schedule.steps_per_epoch * epoch + i, lr)
        if due.save:
            with dist.patience(dist.ALONE):  # rank 0 may have to wait for the checkpoint before
                training.broken.write()
                training.save(due, schedule.progress(epoch, i, state.step))
        if due.stop:
            break
    return due


def check_skips(training: Training, position: int, lr: float) -> None:
    """After the run's step number `position`, counted from 0.  Raises: UserError for MOST_SKIPS in a row, with what it takes to see the last one again."""
    if (last := training.skips.too_many()) is None:
        return
    position -= training.state.step - last
    loader, parts = training.loader, training.config.accum_iter
    names = [loader.dataset.paths[index] for index in loader.sampler.pictures_of(position * parts, parts)]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise UserError(
        f"the gradient of {MOST_SKIPS} steps in a row was not finite, steps {last - MOST_SKIPS + 1} to {last} (lr {lr:.2e}, --seed {training.seed}); none of them "
        f"changed the weights. Try a smaller --lr or --grad_clip 1. Pictures of step {last}: {shown}"
    )
