"""What the main process of a training run does besides the network: `python -m benchmarks.host_work --out DIR [--code CHECKOUT]`.

step    processor time of the main thread in a step at batch 128: all of train_one_epoch but network, loss, backward, AdamW and the averages' arithmetic.
        Pictures of 8 x 8, since a GPU draws the noise itself: what is left is the cost of asking for it
epochs  milliseconds of the first step of an epoch and of the others: photographs, a loader process a core, steps that sleep as if a GPU took them
--code runs another checkout.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.data_routes import photographs

WATCHED = """
import sys, time
sys.path.insert(0, ".")
from statistics import mean, median
import denoiser, torch
seconds, per_epoch, argv = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
if hasattr(denoiser, "Objective"):
    denoiser.Objective.__call__ = lambda self, net, x, *rest: x.flatten()[0]
else:
    denoiser.denoising_loss = lambda net, x, *rest: x.flatten()[0]
torch.Tensor.backward = torch.optim.AdamW.step = torch._foreach_lerp_ = lambda *rest: None
import engine_jit, main_jit
take, clocks = engine_jit.take_step, []

def watched(*rest):
    norm = take(*rest)
    time.sleep(seconds)
    clocks.append((time.thread_time(), time.perf_counter()))
    return norm

engine_jit.take_step = watched
main_jit.main(argv)
own, wall = ([1000 * (after[i] - before[i]) for before, after in zip(clocks, clocks[1:])] for i in (0, 1))
first = [wall[i] for i in range(per_epoch - 1, len(wall), per_epoch)]
others = [value for i, value in enumerate(wall) if i >= 3 and (i + 1) % per_epoch]
print(f"main thread {median(own[3:]):.2f} ms a step, {sorted(own[3:])[len(own) // 10]:.2f} in the fastest tenth")
if first:
    print(f"a step {mean(others):.0f} ms, the first of an epoch {' '.join(f'{value:.0f}' for value in first)}")
"""


def watch(code: Path, out: Path, pictures: list[bytes], seconds: float, flags: dict[str, object]) -> str:
    """Lines of one run over those pictures, its steps `seconds` long."""
    shutil.rmtree(out, ignore_errors=True)
    for i, picture in enumerate(pictures):
        folder = out / "data" / "train" / f"n{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:05d}.jpg").write_bytes(picture)
    (out / "watched.py").write_text(WATCHED)
    flags |= {"class_num": 2, "device": "cpu", "lr": 1e-4, "log_freq": 10**6, "data_path": out / "data", "output_dir": out / "run"}
    line = [sys.executable, str(out / "watched.py"), str(seconds), str(len(pictures) // int(flags["batch_size"]))]
    line += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(line, cwd=code, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)})
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return "; ".join(re.findall(r"^(?:main thread|a step) .*", done.stdout, re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="JiT-S/8", help="as many parameters as JiT-B, which are smaller")
    parser.add_argument("--batch_size", type=int, default=128, help="of step")
    parser.add_argument("--seconds", type=float, default=0.8, help="that a step of epochs sleeps")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count())
    parser.add_argument("--code", type=Path, default=Path("."), help="the checkout whose main_jit.py runs")
    args = parser.parse_args()
    out, code = args.out.resolve(), args.code.resolve()
    common = {"num_workers": args.num_workers, "save_last_freq": 10**6}
    step = {"model": args.model, "img_size": 8, "batch_size": args.batch_size, "epochs": 1}
    print("step:", watch(code, out, photographs(64 * args.batch_size, (12, 12)), 0, common | step), flush=True)
    epochs = {"model": "JiT-Nano/8", "img_size": 64, "batch_size": 64, "epochs": 6}
    print("epochs:", watch(code, out, photographs(7 * 64, (640, 480)), args.seconds, common | epochs))


if __name__ == "__main__":
    main()
