"""What a resumed run keeps of the checkpoint that it went on from: `python -m benchmarks.resumed_memory --out DIR [--model JiT-B/16] [--code FOLDER]`.

One epoch of one step is trained and saved, then resumed. Printed in the second step of the resumed run: how much of the checkpoint's file is mapped into the
process, how much of that is resident, and the process's resident memory. --code runs another checkout.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

WATCHED = """
import re, sys
sys.path.insert(0, ".")
import engine_jit, main_jit
take, steps = engine_jit.take_step, []

def look(*rest):
    norm = take(*rest)
    steps.append(1)
    if len(steps) == 2:
        text = open("/proc/self/smaps").read()
        parts = re.findall(r"checkpoint[^\\n]*\\.pth\\n(?:.*\\n)*?Size: +(\\d+) kB\\n(?:.*\\n)*?Rss: +(\\d+) kB", text)
        mapped, resident = (sum(int(part[i]) for part in parts) / 1000 for i in (0, 1))
        rss = re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())
        print(f"maps of the checkpoint {len(parts)}, mapped {mapped:.0f} MB, resident of it {resident:.0f} MB, process {int(rss[1]) / 1000:.0f} MB", flush=True)
    return norm

engine_jit.take_step = look
main_jit.main(sys.argv[1:])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="JiT-B/16")
    parser.add_argument("--img_size", type=int, default=64)
    parser.add_argument("--code", type=Path, default=Path("."), help="the checkout whose main_jit.py runs")
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        (out / "data" / "train" / f"n{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (args.img_size, args.img_size, 3), dtype=np.uint8)).save(out / "data" / "train" / f"n{i % 2}" / f"{i}.png")
    flags = ["--model", args.model, "--img_size", str(args.img_size), "--class_num", "2", "--device", "cpu", "--num_workers", "0", "--batch_size", "1"]
    flags += ["--data_path", str(out / "data"), "--output_dir", str(out / "run"), "--resume", str(out / "run"), "--lr", "1e-4", "--warmup_epochs", "0"]
    (out / "watched.py").write_text(WATCHED)
    for epochs in (1, 2):
        line = [sys.executable, str(out / "watched.py"), *flags, "--epochs", str(epochs)]
        done = subprocess.run(line, cwd=args.code, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(args.code.resolve())})
        if done.returncode:
            sys.exit(done.stderr[-2000:])
    print(re.search(r"maps of.*", done.stdout)[0])
    print(f"the checkpoint: {(out / 'run' / 'checkpoint-last.pth').stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
