"""Weights that are shared out among processes against whole ones: `python -m benchmarks.sharded --out DIR [--steps 300]`.

The same toy run in one process, in two under DDP, and in two under FSDP, for JiT and MM-JiT, in float32. Printed: the largest relative difference of any step's loss from that of one
process, the largest difference of a weight or average at the end, steps a second, and what checkpoints take.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.kill_test import largest_difference, make_inputs
from util import checkpoint

BATCH, EPOCH = 12, 16  # pictures a step, steps an epoch
MODELS = {"JiT-Nano/8-Text": ["--lr", "1e-3"], "MMJiT-Nano/8": ["--lr", "2e-4", "--max_text_len", "32"]}  # at 1e-3 MM-JiT makes 3e-2 of a rounding in 300 steps
WAYS = (("one process", 1, "ddp"), ("two, ddp", 2, "ddp"), ("two, fsdp", 2, "fsdp"))


def train(args: argparse.Namespace, model: str, processes: int, parallel: str) -> tuple[Path, float]:
    """Returns: the run's folder, and seconds from its first step."""
    run = args.out / f"{model.split('-')[0]}-{processes}-{parallel}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    flags = ["--model", model, "--img_size", "16", "--device", "cpu", "--precision", "fp32", "--num_workers", "0", "--parallel", parallel]
    flags += [
        "--data_path",
        str(args.out / "data"),
        "--llm_model_name",
        str(args.out / "llm"),
        "--output_dir",
        str(run),
        "--batch_size",
        str(BATCH // processes),
    ]
    flags += ["--epochs", str(-(-args.steps // EPOCH)), "--log_freq", "1", *MODELS[model]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, "main_jit.py", *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    times = [event.wall_time for event in events_of(run)]
    return run, (len(times) - 1) / (times[-1] - times[0])


def events_of(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), {"scalars": 0})
    events.Reload()
    return events.Scalars("train_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--models", nargs="*", default=[*MODELS])
    args = parser.parse_args()
    make_inputs(args.out)
    print(
        "| network | | steps | loss, first and last | largest difference of a loss, relative | of a weight or average | steps/s |\n|---|---|---|---|---|---|---|"
    )
    for model in args.models:
        whole = None
        for name, processes, parallel in WAYS:
            run, speed = train(args, model, processes, parallel)
            losses, state = [event.value for event in events_of(run)], checkpoint.load(run / checkpoint.LAST)
            whole = whole or (losses, state)
            off = max(abs(mine - yours) / yours for mine, yours in zip(losses, whole[0], strict=True))
            print(
                f"| {model} | {name} | {len(losses)} | {losses[0]:.4f}, {losses[-1]:.4f} | {off:.1e} | {largest_difference(state, whole[1]):.1e} | {speed:.1f} |",
                flush=True,
            )
    print(time.strftime("%Y-%m-%d"))


if __name__ == "__main__":
    main()
