"""What goes out and draws the same: `python -m benchmarks.roads_out --out DIR [--model JiT-B/16-Text --img_size 256]`.

A network is trained for a few steps on noise, exported in every way, and the same prompts drawn by each: sizes, equal bytes, and how far bf16 weights are off.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.text_path import caption, make_data, make_llm

CODE = """
import sys
from diffusers import DiffusionPipeline
folder, out, *prompts = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
for i, image in enumerate(pipe(prompts).images):
    image.save(f"{out}/{i:04d}.png")
"""


def call(*command: str, cwd: Path | None = None) -> None:
    print("$ python", *command if len(command) < 30 else (*command[:6], "..."), flush=True)
    subprocess.run([sys.executable, *command], check=True, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def train(args: argparse.Namespace) -> Path:
    import torch

    make_data(args.out / "data", 16, args.img_size)
    llm = make_llm(args.out / "llm", "tiny", torch.device("cpu"))
    call("main_jit.py", "--model", args.model, "--img_size", str(args.img_size), "--data_path", str(args.out / "data"), "--llm_model_name", str(llm),
         "--output_dir", str(args.out / "run"), "--resume", str(args.out / "run"), "--batch_size", "4", "--epochs", "2", "--warmup_epochs", "0", "--lr", "3e-4",
         "--num_sampling_steps", "10", "--cfg", "2", "--held_out", "0", "--log_freq", "4", "--device", "cpu")  # fmt: skip
    return args.out / "run"


def draw(model: Path, out: Path, prompts: list[str]) -> list[Path]:
    """By --generate."""
    call(
        "main_jit.py",
        "--generate",
        "--resume",
        str(model),
        "--output_dir",
        str(out),
        "--device",
        "cpu",
        *(part for line in prompts for part in ("--prompt", line)),
    )
    return [out / "samples" / f"{i:04d}.png" for i in range(len(prompts))]


def draw_elsewhere(folder: Path, out: Path, prompts: list[str]) -> list[Path]:
    """By diffusers, in a folder without this code."""
    out.mkdir()
    call("-c", CODE, str(folder.resolve()), str(out.resolve()), *prompts, cwd=out)
    return [out / f"{i:04d}.png" for i in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", default="JiT-B/16-Text")
    parser.add_argument("--img_size", type=int, default=256)
    args = parser.parse_args()
    os.environ["HF_MODULES_CACHE"] = str((args.out / "modules").resolve())
    args.out.mkdir(parents=True)
    run, prompts = train(args), [caption(i) for i in range(2)]
    wanted = draw(run, args.out / "drawn", prompts)
    print(f"\n{args.model} at {args.img_size} pixels, two prompts, Heun 10, cfg 2\n")
    print("| road | MB | PNG files equal to the checkpoint's | mean and largest difference, levels of 255 |\n|---|---|---|---|")
    print(f"| checkpoint-last.pth, --generate | {os.path.getsize(run / 'checkpoint-last.pth') / 1e6:.0f} | | |")
    for name, flags in {"safetensors, fp32": [], "safetensors, bf16": ["--dtype", "bf16"], "diffusers, fp32": ["--diffusers"]}.items():
        folder = args.out / name.replace(", ", "-")
        call("export.py", "--resume", str(run), "--out", str(folder), "--with_text_encoder", *flags)
        drawn = (draw_elsewhere if "--diffusers" in flags else draw)(folder, args.out / f"drawn-{folder.name}", prompts)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and "text_encoder" not in path.parts) / 1e6
        same = sum(one.read_bytes() == other.read_bytes() for one, other in zip(wanted, drawn))
        gaps = np.stack([np.abs(np.asarray(Image.open(one), dtype=int) - np.asarray(Image.open(other), dtype=int)) for one, other in zip(wanted, drawn)])
        print(f"| {name} | {size:.0f} | {same} of {len(prompts)} | {gaps.mean():.3f}, {gaps.max()} |", flush=True)


if __name__ == "__main__":
    main()
