"""What adapters can learn: `python -m benchmarks.lora --emoji demo_output/emoji --out DIR`, after `make demo-emoji`.

A new style, the same emoji in grey outlines with captions of their own, is learned in 400 steps by the whole network and by adapters, from the outlines alone
and from both styles. Each picture that is drawn should be nearer to its own caption's picture than to all others of both styles. Resumable.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.text_choices import main_jit
from datasets.demo import write_pair
from datasets.transforms import to_image
from demo.judge import nearest_share
from demo.run import captions_of
from sampling import LoadedPainter, load_painter
from util.sheet import save_sheet

STEPS, RANK, REPEATS = 400, 32, 4
DATA = ("outlines", "both")
TRIALS = (  # data, what is trained, learning rate
    ("both", "whole", 3e-4), ("both", "whole", 1e-3), ("both", "adapters", 1e-3), ("both", "adapters", 3e-3),
    ("outlines", "whole", 1e-3), ("outlines", "adapters", 3e-3),
)  # fmt: skip


def outlined(picture: Image.Image) -> Image.Image:
    """Its edges as grey lines on white."""
    edges = np.hypot(*np.gradient(np.asarray(picture.convert("L"), dtype=np.float32)))
    return Image.fromarray((255 - np.clip(2 * edges, 0, 150)).astype(np.uint8)).convert("RGB")


def make_data(root: Path, emoji: Path) -> None:
    """outlines/ and both/, as images/ + captions/."""
    if (root / "both").is_dir():
        return
    for name in DATA:
        for part in ("images", "captions"):
            (root / f"{name}.part" / part).mkdir(parents=True, exist_ok=True)
    for stem, caption in captions_of(emoji / "data").items():
        picture = Image.open(emoji / "data" / "images" / f"{stem}.png").convert("RGB")
        write_pair(root / "both.part", stem, picture, [caption])
        for name in DATA:
            write_pair(root / f"{name}.part", f"{stem}-outline", outlined(picture), [f"{caption}の線画"])
    for name in DATA:
        (root / f"{name}.part").rename(root / name)


def pictures_of(folder: Path) -> tuple[list[str], list[Image.Image]]:
    """Captions and pictures, in the order of their names."""
    captions = captions_of(folder)
    return list(captions.values()), [Image.open(folder / "images" / f"{stem}.png").convert("RGB") for stem in captions]


def judged(painter: LoadedPainter, data: Path, sheet: Path) -> dict[str, float]:
    """Shares of drawn pictures that are nearest to their own caption's, of each style."""
    captions, real = pictures_of(data)
    drawn = [to_image(picture) for picture in painter(captions * REPEATS)]
    found = {}
    for style, mine in (("outlines", True), ("base", False)):
        chosen = [i for i in range(len(drawn)) if captions[i % len(captions)].endswith("の線画") == mine]
        found[style] = nearest_share([drawn[i] for i in chosen], real, [i % len(captions) for i in chosen])
    save_sheet(sheet, drawn[:32], captions[:32], columns=8)
    return found


def trial(root: Path, emoji: Path, what: str, data: str, lr: float) -> dict[str, float]:
    run = root / f"{what}-{data}-{lr:g}"
    if not (run / "result.json").exists():
        epochs = STEPS if data == "outlines" else STEPS // 2
        flags = ["--lora_rank", str(RANK)] if what == "adapters" else whole_flags(emoji)
        started = time.perf_counter()
        main_jit("--init_from", str(emoji / "run"), *flags, "--data_path", str(root / data), "--output_dir", str(run), "--epochs", str(epochs), "--batch_size", "64",
                 "--lr", f"{lr:g}", "--lr_schedule", "cosine", "--warmup_epochs", str(epochs // 20), "--save_last_freq", str(epochs), "--held_out", "0",
                 "--num_workers", "0", "--log_freq", "40", "--device", "cpu")  # fmt: skip
        seconds = time.perf_counter() - started
        painter = load_painter(emoji / "run" if what == "adapters" else run, device="cpu")
        if what == "adapters":
            painter.add_lora(run)
        result = judged(painter, root / "both", run / "drawn.png") | {"seconds": seconds, "bytes": size_of(run)}
        (run / "result.json").write_text(json.dumps(result))
    return json.loads((run / "result.json").read_text())


def size_of(run: Path) -> int:
    """Of what one keeps of the run: the adapters' file, or the network's weights as export.py writes them."""
    if (run / "adapter_model.safetensors").exists():
        return (run / "adapter_model.safetensors").stat().st_size
    return sum(value.numel() * 4 for value in load_painter(run, device="cpu").weights.net.state_dict().values())


def whole_flags(emoji: Path) -> Sequence[str]:
    """What adapters take from their base."""
    job = load_painter(emoji / "run", device="cpu").job
    return ("--model", job.model.name, "--img_size", str(job.model.img_size), "--llm_model_name", str(emoji / "llm"), "--cfg", str(job.drawing.sampler.cfg_scale),
            "--interval_min", str(job.drawing.sampler.cfg_interval[0]), "--num_sampling_steps", str(job.drawing.sampler.steps))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, default=Path("demo_output/emoji"), help="what make demo-emoji has written")
    parser.add_argument("--out", type=Path, required=True, help="folder for data and runs")
    args = parser.parse_args()
    shutil.rmtree(args.out / "outlines.part", ignore_errors=True)
    shutil.rmtree(args.out / "both.part", ignore_errors=True)
    make_data(args.out, args.emoji)
    base = judged(load_painter(args.emoji / "run", device="cpu"), args.out / "both", args.out / "base.png")
    print("| trained | on | rate | outlines right | base's prompts right | kept, MB | seconds |\n|---|---|---|---|---|---|---|")
    print(f"| nothing | | | {base['outlines']:.1%} | {base['base']:.1%} | | |", flush=True)
    for data, what, lr in TRIALS:
        found = trial(args.out, args.emoji, what, data, lr)
        print(f"| {what} | {data} | {lr:g} | {found['outlines']:.1%} | {found['base']:.1%} | {found['bytes'] / 1e6:.2f} | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
