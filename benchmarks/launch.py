"""Seconds from the command to the end of its first training step: `python -m benchmarks.launch --out DIR [--model JiT-B/16] [--device cuda]`.

A class model on 16 made-up pictures: without compiling, compiled with nothing in torch's caches, and compiled again.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image


def pictures(folder: Path, size: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(16):
        path = folder / "train" / f"n{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


def seconds_to_first_step(args: argparse.Namespace, *more: str) -> float:
    """The progress bar tells of it."""
    shutil.rmtree(args.out / "run", ignore_errors=True)
    line = [sys.executable, "main_jit.py", "--model", args.model, "--img_size", str(args.img_size), "--class_num", "2", "--data_path", str(args.out / "data")]
    line += ["--output_dir", str(args.out / "run"), "--epochs", "1", "--batch_size", str(args.batch_size), "--device", args.device, *more]
    start, told = time.perf_counter(), b""
    with subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(args.out / "cache")}
    ) as run:
        while byte := run.stderr.read(1):
            told += byte
            if re.search(rb"\| [1-9]\d*/\d+ \[", told):
                seconds = time.perf_counter() - start
                run.kill()
                return seconds
    raise SystemExit(told.decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="JiT-B/16")
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    pictures(args.out / "data", args.img_size)
    shutil.rmtree(args.out / "cache", ignore_errors=True)
    print("| | seconds to the end of the first step |\n|---|---|")
    for name, more in (("not compiled", "--no-compile"), ("compiled, nothing in the caches", "--compile"), ("compiled, again", "--compile")):
        print(f"| {name} | {seconds_to_first_step(args, more):.1f} |", flush=True)


if __name__ == "__main__":
    main()
