"""What the benchmarks of speed share: networks on made-up inputs, the published path's attention, the machine's ceiling, and rounds in which all settings take turns."""

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import models_jit
import models_mmjit
from config import Model, parse_model_name
from util.errors import UserError, told_in_one_line
from util.parallel import uses_compile
from util.text import Text, Y

WIDTH = 768  # of the text's features: ModernBERT's, of 310M parameters
BASELINE = "baseline"  # the name of the setting that the others are compared with


# --- what is measured


@dataclass(frozen=True)
class Case:
    """A network, the side of its pictures and how many of them."""

    model: str
    pixels: int
    batch: int

    def __str__(self) -> str:
        return f"{self.model}:{self.pixels}:{self.batch}"

    @property
    def length(self) -> int:
        """Tokens of a caption, as --max_text_len has them."""
        return 256 if self.model.startswith("MMJiT") else 77

    def build(self) -> nn.Module:
        """On the default device."""
        known = parse_model_name(self.model)
        if known.family == "MMJiT":
            return models_mmjit.build_model(self.model, input_size=self.pixels, text_dim=WIDTH)
        return models_jit.build_model(
            self.model,
            input_size=self.pixels,
            text_dim=WIDTH if known.condition != "labels" else None,
            text_len=self.length if known.condition == "tokens" else None,
        )

    def conditions(self, device: torch.device) -> tuple[Y, Y]:
        """Of the batch, and of nothing (1, ...).  Six in ten of the tokens are there."""
        condition, batch, length = parse_model_name(self.model).condition, self.batch, self.length
        if condition == "labels":
            return torch.randint(0, 1000, (batch,), device=device), torch.full((1,), 1000, device=device)
        if condition == "pooled":
            return torch.randn(batch, WIDTH, device=device), torch.zeros(1, WIDTH, device=device)
        text = Text(torch.randn(batch, length, WIDTH, device=device), torch.rand(batch, length, device=device) < 0.6)
        return text, Text.null(length, WIDTH).to(device)


def arguments(description: str) -> argparse.ArgumentParser:
    """What the scripts are asked that take turns."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="MODEL:PIXELS:BATCH")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=10)
    return parser


def parse(text: str) -> Case:
    """Raises: UserError for what is no network, picture or batch."""
    match = re.fullmatch(r"(.+):([1-9]\d*):([1-9]\d*)", text)
    if not match:
        raise UserError(f"{text!r}: wanted MODEL:PIXELS:BATCH, such as JiT-B/16:256:128")
    return Case(Model(match[1], int(match[2])).name, int(match[2]), int(match[3]))


# --- the published path


def attention_in_float32(q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False) -> Tensor:
    """As published: q and k as float32 out of autocast, every weight in memory, an added mask of zeros; v under autocast."""
    with torch.autocast(q.device.type, enabled=False):
        weights = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
    weights = weights + q.new_zeros(len(q), 1, q.shape[-2], k.shape[-2])
    return F.dropout(weights.softmax(-1), dropout_p) @ v


@contextmanager
def published_attention() -> Iterator[None]:
    with mock.patch.object(F, "scaled_dot_product_attention", attention_in_float32):
        yield


# --- the measurement


@dataclass(frozen=True)
class Setting:
    """One way to do the work."""

    name: str
    action: Callable[[], object]
    flops: int  # of an action, as the network defines them: what is computed a second time is not counted
    calls: int = 1  # of an action: the time is told for each
    held: int = 0  # bytes that it keeps between its actions


@dataclass
class Turns:
    """Seconds of each setting in each round, FLOP/s of large products in the same rounds, peaks of memory in bytes."""

    seconds: dict[str, list[float]]
    bf16: list[float]
    fp32: list[float]
    peaks: dict[str, int]

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def fastest(self) -> str:
        return min(self.seconds, key=self.median)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(action: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Of one action, of several without a wait between them."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        action()
    synchronize(device)
    return (time.perf_counter() - start) / times


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds_of(lambda: a @ b, device)
    return 2 * size**3 / min(seconds_of(lambda: a @ b, device) for _ in range(3))


def warmed(settings: Sequence[Setting], device: torch.device) -> list[Setting]:
    """Those that fit into memory; the first action compiles."""
    found = []
    for setting in settings:
        try:
            seconds_of(setting.action, device, 3 if device.type == "cuda" else 1)
            found.append(setting)
        except torch.OutOfMemoryError:
            print(f"{setting.name}: out of memory", flush=True)
            torch.cuda.empty_cache()
    return found


def take_turns(settings: Sequence[Setting], rounds: int, device: torch.device) -> Turns:
    """Each setting once a round, so that what slows the machine slows all; on a GPU four actions without a wait of ours."""
    turns = Turns({setting.name: [] for setting in settings}, [], [], {})
    for _ in range(rounds):
        turns.bf16.append(matrix_rate(device, torch.bfloat16))
        turns.fp32.append(matrix_rate(device, torch.float32))
        for setting in settings:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            turns.seconds[setting.name].append(seconds_of(setting.action, device, 4 if device.type == "cuda" else 1))
            if device.type == "cuda":
                turns.peaks[setting.name] = torch.cuda.max_memory_allocated() - before + setting.held
    return turns


def kernels(action: Callable[[], object], device: torch.device) -> Counter:
    """Milliseconds of each kernel (on a CPU: operator) in one action."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        action()
        synchronize(device)
    milliseconds = Counter()
    for event in found.key_averages():
        time_of = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if time_of > 0 and (device.type == "cpu" or str(event.device_type).endswith("CUDA")):
            milliseconds[event.key] += time_of / 1e3
    return milliseconds


# --- what is told


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the least and the most."""
    return f"{np.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def machine(device: torch.device) -> str:
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores"
    return f"torch {torch.__version__}, {where}"


def print_table(case: Case, settings: Sequence[Setting], turns: Turns, bf16: bool, unit: str) -> None:
    """unit: what a call is."""
    ceilings = turns.bf16 if bf16 else turns.fp32
    rates = f"bf16 {spread([rate / 1e12 for rate in turns.bf16], '.3g')}, fp32 {spread([rate / 1e12 for rate in turns.fp32], '.3g')}"
    print(f"\n`{case}`, {'bf16' if bf16 else 'fp32'}, {len(ceilings)} rounds; large products: {rates} TFLOP/s\n")
    print(f"| setting | ms a {unit} | pictures/s | TFLOP/s | of the ceiling | peak memory | times as fast |\n|---|---|---|---|---|---|---|")
    for setting in settings:
        seconds, peak = turns.seconds[setting.name], turns.peaks.get(setting.name)
        share = np.median([setting.flops / second / ceiling for second, ceiling in zip(seconds, ceilings)])
        ratios = [base / second for base, second in zip(turns.seconds.get(BASELINE, ()), seconds)]
        cells = [setting.name, spread([1e3 * second / setting.calls for second in seconds], ".1f"), f"{case.batch / np.median(seconds):.3g}"]
        cells += [f"{setting.flops / np.median(seconds) / 1e12:.3g}", f"{share:.1%}", f"{peak / 1e9:.1f} GB" if peak else ""]
        print(f"| {' | '.join([*cells, spread(ratios, '.2f') if ratios else ''])} |", flush=True)


def print_kernels(settings: Sequence[Setting], turns: Turns, device: torch.device) -> None:
    """The ten dearest of the fastest setting."""
    (fastest,) = [setting for setting in settings if setting.name == turns.fastest()]
    print(f"\nthe dearest kernels of {fastest.name!r}:")
    for kernel, milliseconds in kernels(fastest.action, device).most_common(10):
        print(f"    {milliseconds:9.2f} ms  {kernel[:140]}", flush=True)


def measure(args: argparse.Namespace, settings_of: Callable[[Case, torch.device, bool], Iterable[Setting]], unit: str) -> None:
    """The tables of all cases.  args: of `arguments`; settings_of: of a case on a device, in bf16 or not; unit: what a call is."""
    device, bf16 = torch.device(args.device), args.precision == "bf16"
    with told_in_one_line():
        cases = [parse(case) for case in args.cases]
        uses_compile(True, device)
    print(machine(device))
    for case in cases:
        settings = warmed(list(settings_of(case, device, bf16)), device)
        turns = take_turns(settings, args.rounds, device)
        print_table(case, settings, turns, bf16, unit)
        print_kernels(settings, turns, device)
