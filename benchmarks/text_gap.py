"""What the text gap looks like: `python -m benchmarks.text_gap --out DIR`: the digits of the demo with their captions, and with captions that lie.

Trains the same network on both and draws both runs' text_gap curves, as TensorBoard shows them, into DIR/text_gap.png.
"""

import argparse
import random
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SIZE = 32


def call(*command: str) -> None:
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def mix_captions(data: Path, out: Path) -> None:
    """The same pictures and the same captions, but not each other's."""
    shutil.copytree(data, out)
    files = sorted((out / "captions").iterdir())
    texts = [path.read_text(encoding="utf-8") for path in files]
    random.Random(0).shuffle(texts)
    for path, text in zip(files, texts):
        path.write_text(text, encoding="utf-8")


def curve(run: Path, tag: str) -> tuple[list[int], list[float]]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.step for event in events.Scalars(tag)], [event.value for event in events.Scalars(tag)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; what is there is used again")
    parser.add_argument("--epochs", type=int, default=4, help="of 201 steps with batch 64")
    args = parser.parse_args()
    data, lies, llm = args.out / "data", args.out / "lies", args.out / "llm"
    if not llm.exists():
        call("-m", "datasets.demo", "digits", "--out", str(data), "--size", str(SIZE))
        mix_captions(data, lies)
        call("-m", "demo.tiny_llm", "--data_path", str(data), "--out", str(llm), "--steps", "300")
    common = ["main_jit.py", "--model", "JiT-Nano/8-Text", "--img_size", str(SIZE), "--llm_model_name", str(llm), "--device", "cpu", "--num_workers", "1"]
    common += ["--batch_size", "64", "--lr", "1e-3", "--warmup_epochs", "0.25", "--epochs", str(args.epochs), "--save_last_freq", str(args.epochs)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, folder, title in zip(axes, (data, lies), ("captions that fit their pictures: healthy", "captions mixed up: nothing to listen to")):
        run = args.out / f"run-{folder.name}"
        if not run.exists():
            call(*common, "--data_path", str(folder), "--output_dir", str(run), "--log_freq", "20")
        for tag, style in (("text_gap/loss", "k:"), ("text_gap/shuffled", "C0-"), ("text_gap/null", "C1-")):
            axis.plot(*curve(run, tag), style, label=tag)
        axis.set(title=title, xlabel="step", ylim=(-0.05, 0.55))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("v-loss")
    axes[1].legend()
    figure.savefig(args.out / "text_gap.png", dpi=110)
    print(args.out / "text_gap.png")


if __name__ == "__main__":
    main()
