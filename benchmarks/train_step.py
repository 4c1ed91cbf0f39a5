"""What a training step costs: `python -m benchmarks.train_step [--device cuda] MODEL:PIXELS:BATCH ...`, such as JiT-B/16-Tokens:256:128.

A whole step of engine_jit on made-up pictures and text that are on the device already: noise, loss, backward, AdamW, both averages. Prints milliseconds (the median),
pictures a second, FLOP/s, their share of the machine's own rate for a large matrix product of the same run, and the peak of memory; then the dearest kernels.
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import engine_jit as engine
import models_jit
import models_mmjit
from config import DiffusionConfig, Model, Train, parse_model_name
from datasets.stream import Batch
from denoiser import Objective, sample_time
from resume import TrainState
from util.ema import Ema
from util.errors import UserError, told_in_one_line
from util.parallel import in_precision
from util.randomness import normal
from util.skips import Skips
from util.text import Text

WIDTH = 768  # of the text's features: ModernBERT's, of 310M parameters


def build(name: str, size: int, length: int) -> nn.Module:
    known = parse_model_name(name)
    if known.family == "MMJiT":
        return models_mmjit.build_model(name, input_size=size, text_dim=WIDTH)
    return models_jit.build_model(
        name, input_size=size, text_dim=WIDTH if known.condition != "labels" else None, text_len=length if known.condition == "tokens" else None
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(action, rounds: int, device: torch.device) -> list[float]:
    found = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return found


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds_of(lambda: a @ b, 3, device)
    return 2 * size**3 / float(np.median(seconds_of(lambda: a @ b, 10, device)))


class Step:
    """One step after another, as train_one_epoch takes them."""

    def __init__(self, name: str, size: int, batch: int, device: torch.device, bf16: bool):
        known = parse_model_name(name)
        length = 256 if known.family == "MMJiT" else 77
        torch.manual_seed(0)
        net = build(name, size, length).to(device)
        self.state = TrainState(net=net, optimizer=engine.make_optimizer(net, 0.0, device), emas=[Ema(net, 0.9999), Ema(net, 0.9996)])
        self.net, self.skips = in_precision(net, device, bf16), Skips(device, None)
        pictures = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        if known.condition == "labels":
            y, null = torch.randint(0, 1000, (batch,), device=device), torch.tensor([1000], device=device)
        elif known.condition == "pooled":
            y, null = torch.randn(batch, WIDTH, device=device), torch.zeros(1, WIDTH, device=device)
        else:
            y, null = (
                Text(torch.randn(batch, length, WIDTH, device=device), torch.rand(batch, length, device=device) < 0.6),
                Text.null(length, WIDTH).to(device),
            )
        numbers, diffusion = list(range(batch)), DiffusionConfig()
        t, dropped = sample_time(normal(0, "t", numbers, ()), diffusion).numpy(), np.arange(batch) % 10 == 0
        self.batch = Batch(pictures, y, t, dropped, numbers, [])
        self.training = SimpleNamespace(
            conditions=SimpleNamespace(in_loader=True), null=null, objective=Objective(diffusion), config=Train(lr=1e-4), seed=0, device=device
        )

    def __call__(self) -> Tensor:
        loss = engine.batch_loss(self.net, self.batch, self.training)
        loss.backward()
        engine.take_step(self.state, None, self.skips)
        return loss.detach()


def kernels(step: Step, device: torch.device) -> tuple[Counter, int]:
    """Milliseconds of each kernel (on a CPU: operator) in one step, and how many there are."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        step()
        synchronize(device)
    milliseconds, calls = Counter(), 0
    for event in found.key_averages():
        time_of = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if time_of > 0 and (device.type == "cpu" or str(event.device_type).endswith("CUDA")):
            milliseconds[event.key] += time_of / 1e3
            calls += event.count
    return milliseconds, calls


def parse(setting: str) -> tuple[str, int, int]:
    """Raises: UserError for what is no network, picture or batch."""
    match = re.fullmatch(r"(.+):([1-9]\d*):([1-9]\d*)", setting)
    if not match:
        raise UserError(f"{setting!r}: wanted MODEL:PIXELS:BATCH, such as JiT-B/16:256:128")
    return Model(match[1], int(match[2])).name, int(match[2]), int(match[3])


def measure(name: str, size: int, batch: int, rounds: int, device: torch.device, bf16: bool, ceiling: float) -> None:
    step = Step(name, size, batch, device, bf16)
    with FlopCounterMode(display=False) as counter:
        step()
    seconds_of(step, 3, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(step, rounds, device)
    middle, rate = float(np.median(seconds)), counter.get_total_flops() / float(np.median(seconds))
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else ""
    milliseconds, calls = kernels(step, device)
    cells = [f"{1e3 * middle:.1f} ({1e3 * min(seconds):.1f}-{1e3 * max(seconds):.1f})", f"{batch / middle:.0f}"]
    cells += [f"{counter.get_total_flops() / batch / 1e9:.4g}", f"{rate / 1e12:.3g}", f"{rate / ceiling:.1%}", memory, str(calls)]
    print(f"| `{name}` | {size} | {batch} | {' | '.join(cells)} |", flush=True)
    attention = [(key, value) for key, value in milliseconds.items() if re.search("flash|fmha|attention|cudnn.*sdpa", key, re.IGNORECASE)]
    for key, value in [*milliseconds.most_common(6), *attention]:
        print(f"    {value:8.2f} ms  {key[:140]}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="MODEL:PIXELS:BATCH")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    with told_in_one_line():
        settings = [parse(setting) for setting in args.settings]
    device, bf16 = torch.device(args.device), args.precision == "bf16"
    ceiling = matrix_rate(device, torch.bfloat16 if bf16 else torch.float32)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores"
    print(f"torch {torch.__version__}, {where}, {args.precision}: {ceiling / 1e12:.3g} TFLOP/s in a large matrix product\n")
    print(
        "| model | pixels | batch | ms a step | pictures/s | GFLOP a picture | TFLOP/s | of the product's | peak memory | kernels |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for setting in settings:
        try:
            measure(*setting, args.rounds, device, bf16, ceiling)
        except torch.OutOfMemoryError:
            print(f"| {' | '.join(map(str, setting))} | out of memory |", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
