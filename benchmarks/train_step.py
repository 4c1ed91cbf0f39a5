"""What a training step costs: `python -m benchmarks.train_step [--device cuda] MODEL:PIXELS:BATCH ...`, such as JiT-B/16-Tokens:256:128.

A whole step of engine_jit on made-up pictures and text that are on the device already: noise, loss, backward, AdamW, both averages. The settings take turns:
`baseline`, as published (attention in float32, plain AdamW, averages parameter by parameter, the loss read at every step), `eager`, `compiled`, and each of ours with
--grad_checkpointing where asked. The ceiling is a large matrix product of the same rounds. Last the ten dearest kernels of the fastest setting.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import engine_jit as engine
from benchmarks.speed import BASELINE, Case, Setting, arguments, measure, published_attention
from config import DiffusionConfig, Train
from datasets.stream import Batch
from denoiser import Objective, v_loss
from resume import TrainState
from util.ema import Ema
from util.parallel import Parallel, compiled, twin
from util.skips import Skips

CPU = torch.device("cpu")


class PlainEma(Ema):
    """One parameter after another."""

    @torch.no_grad()
    def update(self, trained: Sequence[Tensor], n: int) -> None:
        decay = self.decay_at(n)
        for average, param in zip(self.average.values(), trained, strict=True):
            average.mul_(decay).add_(param, alpha=1 - decay)


class Work:
    """What the steps of all settings share: weights and a batch, on the device."""

    def __init__(self, case: Case, device: torch.device, bf16: bool):
        torch.manual_seed(0)
        with torch.device(device):
            self.net = case.build()
        self.device, self.bf16 = device, bf16
        y, self.null = case.conditions(device)
        pictures = torch.randint(0, 256, (case.batch, 3, case.pixels, case.pixels), dtype=torch.uint8, device=device)
        t, dropped = np.linspace(0.05, 0.95, case.batch, dtype=np.float32), np.arange(case.batch) % 10 == 0
        self.batch = Batch(pictures, y, t, dropped, list(range(case.batch)), [])

    def state(self, plain: bool = False) -> TrainState:
        """Optimizer and averages; plain: nothing in them is fused."""
        optimizer = torch.optim.AdamW(self.net.parameters(), betas=(0.9, 0.95)) if plain else engine.make_optimizer(self.net, 0.0, self.device)
        kind = PlainEma if plain else Ema
        return TrainState(net=self.net, optimizer=optimizer, emas=[kind(self.net, 0.9999), kind(self.net, 0.9996)])


def take_plain_step(state: TrainState) -> None:
    """As published: the length of the gradient is not looked at."""
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    for ema in state.emas:
        ema.update(state.trained, state.step)
    state.step += 1


class Step:
    """One step after another, as train_one_epoch takes them."""

    def __init__(self, work: Work, state: TrainState, *, published: bool = False, compile: bool = False, checkpointing: bool = False):
        self.batch, self.state, self.published, self.skips = work.batch, state, published, Skips(work.device)
        net = twin(work.net)
        net.grad_checkpointing = checkpointing
        self.parallel = Parallel(net, work.device, work.bf16, compile)
        self.training = SimpleNamespace(
            conditions=SimpleNamespace(in_loader=True),
            null=work.null,
            objective=Objective(DiffusionConfig(), compiled(v_loss) if compile else v_loss),
            config=Train(lr=1e-4),
            seed=0,
            device=work.device,
        )

    def loss(self) -> Tensor:
        with published_attention() if self.published else nullcontext():
            return engine.batch_loss(self.parallel, self.batch, self.training)

    def __call__(self) -> None:
        loss = self.loss()
        loss.backward()
        if self.published:
            loss.item()
            take_plain_step(self.state)
        else:
            engine.take_step(self.state, None, self.skips)


def flops_of(case: Case) -> int:
    """Of a step, whose tensors hold nothing; attention as two products and the four of their gradients."""
    with FakeTensorMode(), published_attention():
        work = Work(case, CPU, bf16=False)
        step = Step(work, work.state())
        with FlopCounterMode(display=False) as counter:
            step()
    return counter.get_total_flops()


def settings_of(case: Case, device: torch.device, bf16: bool, checkpointing: bool) -> Iterator[Setting]:
    flops, work = flops_of(case), Work(case, device, bf16)
    held = 20 * sum(param.numel() for param in work.net.parameters())  # weights, AdamW's two moments, two averages; float32
    yield Setting(BASELINE, Step(work, work.state(plain=True), published=True), flops, held=held)
    state = work.state()
    for again in (False, True) if checkpointing else (False,):
        for compile in (False, True):
            name = f"{'compiled' if compile else 'eager'}{', checkpointing' if again else ''}"
            yield Setting(name, Step(work, state, compile=compile, checkpointing=again), flops, held=held)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--grad_checkpointing", action="store_true")
    args = parser.parse_args()
    measure(args, partial(settings_of, checkpointing=args.grad_checkpointing), "step")


if __name__ == "__main__":
    main()
