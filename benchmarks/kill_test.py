"""A run killed at random moments against one that was not: `python -m benchmarks.kill_test --out DIR [--kills 100] [--processes 2]`.

Every start is the same command line; SIGKILL goes to one process or to all of them, at a moment drawn from the start's first second to long after
its first steps, so imports, reading, steps, writing and renaming of checkpoints are all hit. Printed at the end: kills, starts that went on from a checkpoint, bytes of
half-written files that were left, and whether weights, averages and optimizer are the uninterrupted run's to the bit.

`--changing`: every third start has another number of processes, and another form of checkpoint, file or parts; then sums are taken in another order, and it is the
largest difference that is printed, and how many steps a start did again.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from datasets.demo import COLOURS, colour_ink, digit_captions, load_ink, make_folders, write_pair
from demo.tiny_llm import build_llama, train_tokenizer
from util import checkpoint
from util.sharding import whole


def make_inputs(out: Path) -> None:
    """200 pictures with captions, and a language model."""
    make_folders(out / "data")
    inks, digits = load_ink(16)
    for i in range(200):
        colour = list(COLOURS)[i % len(COLOURS)]
        write_pair(out / "data", f"{i:03d}", colour_ink(inks[i], colour), digit_captions(colour, digits[i]))
    torch.manual_seed(0)
    tokenizer = train_tokenizer([text for colour in COLOURS for digit in range(10) for text in digit_captions(colour, digit)])
    build_llama(tokenizer, width=64, depth=2).save_pretrained(out / "llm")
    tokenizer.save_pretrained(out / "llm")


CHANGING = ((1, "ddp"), (2, "fsdp"), (3, "fsdp"), (2, "ddp"), (1, "fsdp"), (4, "fsdp"))  # processes, --parallel
BATCH = 12


def command(out: Path, run: Path, args: argparse.Namespace, number: int = 0) -> list[str]:
    """That of start `number`."""
    processes, parallel = CHANGING[number // 3 % len(CHANGING)] if args.changing else (args.processes, args.parallel)
    grouped = processes > 1 or parallel != "ddp"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if grouped else []
    flags = ["--model", "JiT-Nano/8-Text", "--img_size", "16", "--device", "cpu", "--num_workers", "1", "--batch_size", str(BATCH // processes)]
    flags += ["--parallel", parallel]
    flags += ["--data_path", str(out / "data"), "--llm_model_name", str(out / "llm"), "--output_dir", str(run), "--resume", str(run), "--lr", "1e-3"]
    flags += ["--epochs", str(args.epochs), "--save_freq_steps", "4", "--log_freq", "1" if args.changing else "1000", "--precision", args.precision]
    flags += [] if args.changing else ["--proj_dropout", "0.1"]  # whose numbers are each process's own
    return [sys.executable, *launcher, "main_jit.py", *flags]


def family(pid: int) -> list[int]:
    """The process and all that come from it; torchrun's ranks have sessions of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def start(line: list[str], log: Path) -> subprocess.Popen:
    return subprocess.Popen(line, stdout=open(log, "a"), stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def step_of(run: Path) -> int:
    path = run / checkpoint.LAST
    return checkpoint.load(path)["step"] if path.exists() else 0


def kill_and_restart(run: Path, args: argparse.Namespace, rng: random.Random, seconds: float) -> dict[str, int]:
    found = {"kills": 0, "starts that went on from a checkpoint": 0, "half-written bytes left": 0, "kills while a checkpoint was being written": 0}
    while found["kills"] < args.kills:
        found["starts that went on from a checkpoint"] += step_of(run) > 0
        process = start(command(args.out, run, args, found["kills"]), run / "log.txt")
        try:
            patience = (4 if args.changing else 1.5) * seconds  # several processes take longer to start
            if code := process.wait(rng.uniform(0, patience)):
                raise SystemExit(f"the run ended by itself with {code} after {found['kills']} kills; see {run / 'log.txt'}")
            print(f"done before the last kill, after {found['kills']}; give more --epochs for more", flush=True)
            return found
        except subprocess.TimeoutExpired:
            processes = family(process.pid)
        victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
        for pid in victims:
            kill(pid)
        found["kills"] += 1
        half = [path.stat().st_size for place in run.glob(".checkpoint*.tmp") for path in (place.iterdir() if place.is_dir() else [place])]
        found["half-written bytes left"] += sum(half)
        found["kills while a checkpoint was being written"] += bool(half)
        time.sleep(0.2)
        for pid in processes:  # what a single kill did not take along: a rank whose torchrun was killed goes on, and keeps the folder
            kill(pid)
        process.wait()
        if found["kills"] % 10 == 0:
            print(f"{found['kills']} kills, at step {step_of(run)}", flush=True)
    return found


def equal(a: dict, b: dict) -> bool:
    """Bit for bit."""
    parts = [(a[key], b[key]) for key in ("model", "model_ema1", "model_ema2")] + [(a["optimizer"][name], b["optimizer"][name]) for name in a["optimizer"]]
    return a["step"] == b["step"] and all(torch.equal(whole(value), whole(right[name])) for left, right in parts for name, value in left.items())


def done_again(run: Path) -> int:
    """The most steps that one start did again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    most, before = 0, 0
    for path in sorted(run.glob("events.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(path))
        events.Reload()
        if "train_loss" in events.Tags()["scalars"]:
            steps = [event.step for event in events.Scalars("train_loss")]
            most, before = max(most, before - steps[0] + 1), steps[-1]
    return most


def largest_difference(a: dict, b: dict) -> float:
    """Of the weights and averages."""
    return max((whole(value) - whole(b[key][name])).abs().max().item() for key in ("model", "model_ema1", "model_ema2") for name, value in a[key].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--changing", action="store_true", help="processes and form of checkpoint change every third time")
    parser.add_argument("--epochs", type=int, default=120, help="of 16 steps; enough that the run does not end before the last kill")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    make_inputs(args.out)
    whole, killed = args.out / "whole", args.out / "killed"
    for run in (whole, killed):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
    process, began = start(command(args.out, whole, args), whole / "log.txt"), time.perf_counter()
    while not step_of(whole):
        time.sleep(0.1)
    seconds = time.perf_counter() - began
    if process.wait():
        raise SystemExit(f"the uninterrupted run failed; see {whole / 'log.txt'}")
    print(f"uninterrupted: {time.perf_counter() - began:.0f} s, first checkpoint after {seconds:.1f} s", flush=True)
    rng = random.Random(0)
    found = kill_and_restart(killed, args, rng, seconds)
    if code := start(command(args.out, killed, args), killed / "log.txt").wait():
        raise SystemExit(f"the last start ended with {code}; see {killed / 'log.txt'}")
    for name, value in found.items():
        print(f"{name}: {value}")
    a, b = (checkpoint.load(run / checkpoint.LAST) for run in (whole, killed))
    if args.changing:
        print(
            f"steps: {a['step']} and {b['step']}; most steps done again by one start: {done_again(killed)}; largest difference: {largest_difference(a, b):.1e}"
        )
        return
    print(f"steps: {a['step']}; weights, averages and optimizer equal to the bit: {equal(a, b)}")
    sys.exit(not equal(a, b))


if __name__ == "__main__":
    main()
