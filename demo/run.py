"""The demos, whole: data, language model, training, a stop and a resumption, pictures, and a judge.

`python -m demo.run digits` (make demo), `scenes` (make demo-scenes) and `emoji` (make demo-emoji). Every step is a command that a user could
type, printed before it runs; the data is an ordinary images/ + captions/ folder and the language model an ordinary folder.
"""

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from datasets.demo import COLOURS, DIGITS, HELD_OUT, digit_captions, digit_prompts
from datasets.scenes import Scene, captions, random_scene
from demo.judge import DigitJudge, Pair, nearest_share, shares_right
from demo.scene_judge import judge, rates
from util.errors import UserError, told_in_one_line
from util.sheet import save_sheet

PROCESSES = min(2, os.cpu_count() or 1)
STARTED = time.perf_counter()


def step(title: str) -> None:
    print(f"\n== {title}  ({time.perf_counter() - STARTED:.0f} s)", flush=True)


def call(*command: str) -> None:
    """Run this Python on `command`, shown first; stop with it if it fails."""
    print("$ python", shlex.join(command), flush=True)
    done = subprocess.run([sys.executable, *command], env={"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // PROCESSES)), **os.environ})
    if done.returncode:
        sys.exit(done.returncode)


def torchrun(processes: int, *flags: str) -> None:
    call("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "main_jit.py", *flags)


def language_model(llm: str | None, data: Path, out: Path, steps: int) -> str:
    """The name to give to --llm_model_name: the user's, or a small one trained on the captions."""
    if llm:
        return llm
    step("a small language model, trained on the captions")
    call("-m", "demo.tiny_llm", "--data_path", str(data), "--out", str(out), "--steps", str(steps))
    return str(out)


def draw(processes: int, device: str, run: Path, prompts: list[str]) -> list[Image.Image]:
    """The prompts' pictures by --generate, in order; the checkpoint says the rest."""
    listing = run / "prompts.txt"
    listing.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    torchrun(processes, "--generate", "--resume", str(run), "--prompts_file", str(listing), "--device", device)
    return [Image.open(run / "samples" / f"{i:04d}.png").convert("RGB") for i in range(len(prompts))]


def text_gap(run: Path) -> str:
    """What TensorBoard shows last of whether the captions are listened to."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    loss, shuffled, null = (events.Scalars(f"text_gap/{name}")[-1].value for name in ("loss", "shuffled", "null"))
    return f"does the model use the captions? v-loss of held-out pictures {loss:.3f}, with each other's captions {shuffled:+.3f}, with none {null:+.3f}"


def judge_digits(judge: DigitJudge, title: str, pictures: list[Image.Image], pairs: list[Pair]) -> float:
    """Print the shares and the mistakes.  Returns: the share with both colour and digit right."""
    found = judge(pictures)
    colour, digit, both = shares_right(found, pairs)
    print(f"{title}: colour {colour:.1%}  digit {digit:.1%}  both {both:.1%}  of {len(pairs)} pictures")
    wrong = [f"{w[0]}{DIGITS[w[1]]}→{f[0]}{DIGITS[f[1]]}" for f, w in zip(found, pairs) if f != w]
    if wrong:
        print(f"  wrong: {' '.join(wrong)}")
    return both


def train_in_two(training: list[str], epochs: int) -> None:
    """Half of the epochs, a stop, and the rest from where it stopped."""
    step(f"training, epochs 1 to {epochs // 2}")
    torchrun(PROCESSES, *training, "--epochs", str(epochs // 2))
    step(f"training goes on where it stopped, to epoch {epochs}, its learning rate falling to 0")
    torchrun(PROCESSES, *training, "--epochs", str(epochs), "--lr_schedule", "cosine")


def digits(out: Path, llm: str | None, epochs: int) -> None:
    data, run, size = out / "data", out / "run", 32
    step("1,797 real handwritten digits in eight colours, with Japanese captions")
    call("-m", "datasets.demo", "digits", "--out", str(data), "--size", str(size))
    name = language_model(llm, data, out / "llm", steps=300)
    training = ["--model", "JiT-Nano/8-Text", "--img_size", str(size), "--llm_model_name", name, "--device", "cpu", "--num_workers", "1"]
    training += ["--data_path", str(data), "--output_dir", str(run), "--resume", str(run), "--batch_size", str(64 // PROCESSES), "--lr", "1e-3"]
    training += ["--warmup_epochs", "0.25", "--log_freq", "40", "--save_last_freq", "1", "--cfg", "2.5", "--num_sampling_steps", "20"]
    train_in_two(training, epochs)
    print(text_gap(run))

    step("pictures of pairs seen in training and of pairs never seen")
    seen = [(colour, digit) for digit in range(10) for colour in COLOURS if (colour, digit) not in HELD_OUT]
    pairs = [HELD_OUT[i % len(HELD_OUT)] for i in range(200)] + [seen[i % len(seen)] for i in range(200)]
    prompts = digit_prompts(pairs)
    pictures = draw(PROCESSES, "cpu", run, prompts)

    step("the same with a CLIP, here a small one trained now: does each picture match its own caption?")
    call("-m", "demo.tiny_clip", "--out", str(out / "clip"), "--size", str(size), "--steps", "400")
    asked = out / "captions.txt"
    asked.write_text("".join(f"{digit_captions(colour, digit)[0]}\n" for colour in COLOURS for digit in range(10)), encoding="utf-8")
    evaluation = ["--evaluate_gen", "--resume", str(run), "--num_images", "240", "--eval_captions", str(asked), "--device", "cpu", "--num_workers", "1"]
    torchrun(PROCESSES, *evaluation, "--clip_model", str(out / "clip"), "--inception_weights", "none")

    step("the judge")
    judge = DigitJudge(size)
    print(f"the digit judge itself: {judge.accuracy:.1%} right on 300 real digits held back from it")
    judge_digits(judge, "pairs seen in training", pictures[200:], pairs[200:])
    both = judge_digits(judge, "pairs never seen      ", pictures[:200], pairs[:200])
    sheet = out / "sheet.png"
    shown = [*range(24), *range(200, 272)]
    save_sheet(sheet, [pictures[i] for i in shown], [prompts[i] for i in shown], columns=12)
    print(f"\n{sheet.resolve()}: the first two rows are pairs never seen in training  ({time.perf_counter() - STARTED:.0f} s)")
    if both < 0.9:
        sys.exit(f"error: only {both:.1%} of the pictures of unseen pairs are right; wanted 90 % at least (95 % is usual)")


def asked_scenes(seen: bool, count: int) -> tuple[list[Scene], list[str]]:
    """Scenes of two things to draw, and a caption of each."""
    rng = random.Random(f"asked/{seen}")
    scenes = [random_scene("two", rng, seen) for _ in range(count)]
    return scenes, [rng.choice(captions(scene)) for scene in scenes]


def judge_scenes(title: str, pictures: list[Image.Image], scenes: list[Scene]) -> float:
    """Print the shares with their intervals of 95 %.  Returns: the share with everything right."""
    found = rates([judge(picture, scene) for picture, scene in zip(pictures, scenes)])
    print(f"{title}: " + "  ".join(f"{name} {share:.1%} ({low:.1%} to {high:.1%})" for name, (share, low, high) in found.items()))
    return found["everything"][0]


def scenes(out: Path, llm: str | None, epochs: int) -> None:
    data, run, size, count = out / "data", out / "run", 32, 200
    step("drawn scenes of two things and how they stand, with Japanese captions; a fifth of the things is never drawn")
    text, words = out / "corpus.txt", out / "words.txt"
    call("-m", "datasets.scenes", "--out", str(data), "--level", "two", "--count", "25064", "--size", str(size), "--corpus", str(text), "--words", str(words))
    if not llm:
        step("a small language model, trained on sentences; its tokens are words, none of them new in a thing never seen")
        llm = str(out / "llm")
        call("-m", "demo.tiny_llm", "--text", str(text), "--words", str(words), "--out", llm, "--steps", "150")
    training = ["--model", "JiT-Nano/8-Tokens", "--img_size", str(size), "--noise_scale", "2", "--llm_model_name", llm, "--max_text_len", "16"]
    training += ["--data_path", str(data), "--output_dir", str(run), "--resume", str(run), "--batch_size", str(64 // PROCESSES), "--lr", "2e-3"]
    training += ["--warmup_epochs", "0.25", "--save_last_freq", "1", "--cfg", "2.5", "--num_sampling_steps", "20", "--num_workers", "0", "--device", "cpu"]
    train_in_two(training, epochs)
    print(text_gap(run))

    step("pictures of things seen in training and of things never seen")
    unseen, seen = asked_scenes(False, count), asked_scenes(True, count)
    prompts = unseen[1] + seen[1]
    pictures = draw(PROCESSES, "cpu", run, prompts)
    judge_scenes("things seen in training", pictures[count:], seen[0])
    share = judge_scenes("things never seen      ", pictures[:count], unseen[0])
    sheet, shown = out / "sheet.png", [*range(24), *range(count, count + 24)]
    save_sheet(sheet, [pictures[i].resize((64, 64), Image.Resampling.NEAREST) for i in shown], [prompts[i] for i in shown], columns=12)
    print(f"\n{sheet.resolve()}: in the first two rows a thing of each picture was never seen in training  ({time.perf_counter() - STARTED:.0f} s)")
    if share < 0.9:
        sys.exit(f"error: only {share:.1%} of the pictures of unseen things are right; wanted 90 % at least")


def captions_of(data: Path) -> dict[str, str]:
    """The caption of each picture, by its name without extension, in the order of those."""
    return {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted((data / "captions").glob("*.txt"), key=lambda path: path.stem)}


def emoji(out: Path, llm: str | None, epochs: int | None) -> None:
    import torch

    gpu = torch.cuda.is_available()
    data, run, size = out / "data", out / "run", 64 if gpu else 32
    processes = torch.cuda.device_count() if gpu else PROCESSES
    step("emoji with their Japanese names")
    call("-m", "datasets.demo", "emoji" if gpu else "emoji64", "--out", str(data), "--size", str(size))
    name = language_model(llm, data, out / "llm", steps=300)
    training = ["--model", "JiT-S/8-Text" if gpu else "JiT-Nano/8-Text", "--img_size", str(size), "--llm_model_name", name, "--data_path", str(data)]
    training += ["--output_dir", str(run), "--cfg", "2.0", "--interval_min", "0.1", "--num_sampling_steps", "25"]
    training += ["--batch_size", str((256 if gpu else 64) // processes), "--lr", "5e-4" if gpu else "1e-3"]
    total = epochs or (3000 if gpu else 5000)
    training += ["--warmup_epochs", str(total // 50), "--lr_schedule", "cosine", "--epochs", str(total), "--save_last_freq", str(total // 10)]
    training += ["--num_workers", "1" if not gpu else "8", "--log_freq", "20", "--resume", str(run)]
    step("training")
    torchrun(processes, *training)

    step("pictures")
    captions_by_stem = captions_of(data)
    stems, names = list(captions_by_stem), list(captions_by_stem.values())
    repeats = 1 if gpu else 4
    pictures = draw(processes, "auto", run, names * repeats)
    real = [Image.open(data / "images" / f"{stem}.png").convert("RGB") for stem in stems]
    share = nearest_share(pictures, real, [*range(len(stems))] * repeats)
    sheet = out / "sheet.png"
    save_sheet(sheet, pictures[:64], names[:64], columns=16)
    print(f"nearest to their own caption's picture: {share:.1%} of {len(pictures)}")
    print(f"\n{sheet.resolve()}  ({time.perf_counter() - STARTED:.0f} s)")


def clear(out: Path, own: bool) -> None:
    """A folder without what an earlier demo left.  own: that nobody else uses.  Raises: UserError for one that holds anything else."""
    mark = out / ".demo"
    if not own and not mark.exists() and out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} holds files that no demo made, and a demo begins by removing data/, llm/, run/ and clip/; name a new folder")
    for name in ("data", "llm", "run", "clip"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digits", "scenes", "emoji"))
    parser.add_argument("--out", type=Path, default=None, help="folder for everything (default: demo_output/WHAT)")
    parser.add_argument("--llm", default=None, help="a hub name or folder in place of the small model trained here")
    parser.add_argument("--epochs", type=int, default=None)
    args = parser.parse_args()
    out = args.out or Path("demo_output") / args.what
    with told_in_one_line():
        clear(out, own=args.out is None)
    if args.what == "digits":
        digits(out, args.llm, args.epochs or 7)
    elif args.what == "scenes":
        scenes(out, args.llm, args.epochs or 5)
    else:
        emoji(out, args.llm, args.epochs)


if __name__ == "__main__":
    main()
