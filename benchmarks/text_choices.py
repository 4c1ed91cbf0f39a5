"""Which features should text be?  `python -m benchmarks.text_choices --out DIR`: the digits of the demo, every --llm_layer and --text_norm, seeds.

`--model JiT-Nano/8-Tokens --layers last mean --norms none rms standardize` asks it of the states of tokens. Trains one small network for each, all settings equal, and prints what each has learned from its captions: pictures right in colour
and digit, pictures whose nearest real one is of the asked pair, the text gap, and how far out the null lies. Resumable.
"""

import argparse
import csv
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import LAYERS
from datasets.demo import COLOURS, HELD_OUT, colour_ink, digit_prompts, load_ink
from demo.judge import DigitJudge, Pair, shares_right
from util import checkpoint

SIZE = 32
SEEN = [(colour, digit) for digit in range(10) for colour in COLOURS if (colour, digit) not in HELD_OUT]
PAIRS = [HELD_OUT[i % len(HELD_OUT)] for i in range(160)] + [SEEN[i % len(SEEN)] for i in range(160)]
PROMPTS = digit_prompts(PAIRS)
COLUMNS = ["layer", "norm", "seed", "unseen right", "seen right", "unseen nearest", "seen nearest", "loss", "gap shuffled", "gap null", "null rms"]


class Nearest:
    """The pair of the real picture that is nearest, pixel by pixel."""

    def __init__(self):
        inks, digits = load_ink(SIZE)
        self.pairs = [(colour, int(digit)) for digit in digits for colour in COLOURS]
        self.real = np.stack([np.asarray(colour_ink(ink, colour), dtype=np.float32).ravel() for ink in inks for colour in COLOURS])
        self.squares = (self.real**2).sum(1)

    def __call__(self, pictures: list[Image.Image]) -> list[Pair]:
        drawn = np.stack([np.asarray(picture, dtype=np.float32).ravel() for picture in pictures])
        return [self.pairs[i] for i in (self.squares - 2 * drawn @ self.real.T).argmin(1)]


def main_jit(*flags: str) -> None:
    subprocess.run([sys.executable, "main_jit.py", *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def draw(run: Path, *flags: str) -> list[Image.Image]:
    """A picture of each of the PROMPTS."""
    (run / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    main_jit(*flags, "--generate", "--prompts_file", str(run / "prompts.txt"))
    return [Image.open(run / "samples" / f"{i:04d}.png").convert("RGB") for i in range(len(PROMPTS))]


def make_data(root: Path) -> None:
    """The captioned digits, and a language model trained on their captions."""
    subprocess.run([sys.executable, "-m", "datasets.demo", "digits", "--out", str(root / "data"), "--size", str(SIZE)], check=True)
    subprocess.run([sys.executable, "-m", "demo.tiny_llm", "--data_path", str(root / "data"), "--out", str(root / "llm"), "--steps", "300"], check=True)


def trial(root: Path, model: str, choice: tuple[str, str, int], epochs: int, judge: DigitJudge, nearest: Nearest) -> list:
    layer, norm, seed = choice
    suffix = model.rsplit("-", 1)[1]
    run, store = root / f"{suffix}-{layer}-{norm}-{seed}", root / f"store-{suffix}-{layer}"
    common = ["--model", model, "--img_size", str(SIZE), "--llm_model_name", str(root / "llm"), "--llm_layer", layer, "--text_norm", norm]
    common += ["--device", "cpu", "--output_dir", str(run), "--resume", str(run), "--cfg", "2.5", "--num_sampling_steps", "20", "--seed", str(seed)]
    training = ["--data_path", str(root / "data"), "--text_cache_dir", str(store), "--batch_size", "64", "--lr", "1e-3", "--warmup_epochs", "0.25"]
    training += ["--lr_schedule", "cosine", "--epochs", str(epochs), "--save_last_freq", str(epochs), "--num_workers", "1", "--log_freq", "40"]
    main_jit(*common, *training)
    pictures = draw(run, *common)
    shares = [shares_right(judged[part], PAIRS[part])[2] for judged in (judge(pictures), nearest(pictures)) for part in (slice(160), slice(160, None))]
    events = EventAccumulator(str(run))
    events.Reload()
    gaps = [float(np.mean([event.value for event in events.Scalars(f"text_gap/{name}")][-3:])) for name in ("loss", "shuffled", "null")]
    saved = checkpoint.load(run / checkpoint.LAST)["text"]
    return [layer, norm, seed, *shares, *gaps, null_rms(root, layer, saved) if suffix == "Text" else float("nan")]


def null_rms(root: Path, layer: str, saved: dict) -> float:
    """Length of the empty caption's features, against that of a caption's on average."""
    from config import TextConfig
    from text_encoder import LanguageModel

    encoder = LanguageModel(TextConfig(str(root / "llm"), layer=layer)).load(torch.device("cpu"))
    captions = encoder.encode(PROMPTS[:160])
    mean, std = saved.get("mean", 0), saved.get("std", 1)
    null, captions = ((features - mean) / std for features in (encoder.null, captions))
    return float(null.square().mean().sqrt() / captions.square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, language model, runs and results.csv")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="JiT-Nano/8-Text")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
    parser.add_argument("--norms", nargs="+", default=("standardize", "none"), choices=("none", "rms", "standardize"))
    parser.add_argument("--epochs", type=int, default=3, help="of 202 steps with batch 64")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "llm" / "config.json").exists():
        make_data(args.out)
    results = args.out / f"results-{args.model.rsplit('-', 1)[1]}.csv"
    rows = list(csv.reader(results.open())) if results.exists() else []
    judge, nearest = DigitJudge(SIZE), Nearest()
    for seed, norm, layer in itertools.product(range(args.seeds), args.norms, args.layers):
        if [layer, norm, str(seed)] not in [row[:3] for row in rows]:
            rows.append([str(value) for value in trial(args.out, args.model, (layer, norm, seed), args.epochs, judge, nearest)])
            with results.open("a") as file:
                csv.writer(file).writerow(rows[-1])
    print(f"| {' | '.join(COLUMNS[:2] + COLUMNS[3:])} |\n|{'---|' * (len(COLUMNS) - 1)}")
    for norm, layer in itertools.product(args.norms, args.layers):
        values = np.array([row[3:] for row in rows if row[:2] == [layer, norm]], dtype=float)
        shown = [f"{mean:.3f} ({low:.3f}-{high:.3f})" for mean, low, high in zip(values.mean(0), values.min(0), values.max(0))]
        print(f"| `{layer}` | `{norm}` | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
