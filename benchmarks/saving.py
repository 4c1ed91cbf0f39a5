"""How long a checkpoint holds training up: `python -m benchmarks.saving --out DIR [--model JiT-B/16] [--device cuda]`, or
`torchrun --nproc_per_node=2 --nnodes=1 --node_rank=0 -m benchmarks.saving --out DIR` for one in parts, of weights that are shared out among the processes.

The whole state (weights, two averages, AdamW's moments) goes through checkpoint.Writer as in training: `write` returns when it is copied to
host memory, or from a GPU as soon as that is asked for; the file is written behind it, while the main thread does small operations. For comparison
the same operations alone, and the same state written in the foreground.
"""

import argparse
import builtins
import time
from collections.abc import Callable
from pathlib import Path

import torch

from models_jit import build_model
from util import checkpoint
from util import distributed as dist
from util.ema import Ema
from util.parts_writer import PartsWriter
from util.sharding import shard


def whole_state(model: str, img_size: int, device: torch.device) -> dict:
    net = build_model(model, input_size=img_size).to(device)
    if dist.in_group():
        shard(net, "fsdp", device)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    emas = [Ema(net, decay) for decay in (0.9999, 0.9996)]
    averages = {f"model_ema{i + 1}": checkpoint.with_prefix(ema.state_dict(net)) for i, ema in enumerate(emas)}
    return {"model": checkpoint.with_prefix(net.state_dict()), **averages, "optimizer": checkpoint.optimizer_state(optimizer, net), "step": 1}


def operations(busy: Callable[[], bool]) -> str:
    """How many small ones a second the main thread does meanwhile, and the longest time from one to the next."""
    value, count, longest = torch.zeros(8), 0, 0.0
    start = last = time.perf_counter()
    while busy():
        value.add_(1)
        now = time.perf_counter()
        count, longest, last = count + 1, max(longest, now - last), now
    return f"{count / (last - start) / 1e3:.0f}k | {longest * 1e3:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="JiT-B/16")
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device, path = dist.init(args.device), args.out / checkpoint.LAST
    state, writer = whole_state(args.model, args.img_size, device), PartsWriter(None, device) if dist.in_group() else checkpoint.Writer()
    print = builtins.print if dist.is_main() else lambda *_, **__: None
    print("| | training waits | until it is on disk | operations/s | longest gap |\n|---|---|---|---|---|")
    for _ in range(args.rounds):
        end = time.perf_counter() + 3
        print(f"| nothing is written | | | {operations(lambda end=end: time.perf_counter() < end)} |")
        start = time.perf_counter()
        writer.write(state, path)
        copied = time.perf_counter() - start
        meanwhile = operations(lambda: not writer.work.done())
        writer.wait()
        print(f"| in the background | {copied:.2f} s | {time.perf_counter() - start:.2f} s | {meanwhile} |", flush=True)
        if not dist.in_group():
            start = time.perf_counter()
            checkpoint.save(path, state)
            seconds = time.perf_counter() - start
            print(f"| in the foreground | {seconds:.2f} s | {seconds:.2f} s | | |", flush=True)
    print(f"{sum(file.stat().st_size for file in args.out.rglob('*') if file.is_file()) / 1e9:.2f} GB")
    dist.shutdown()


if __name__ == "__main__":
    main()
