"""Does the picture show what the caption says?  Networks trained on scenes that a program draws, and a program that judges what they draw.

`python -m benchmarks.alignment run GROUP ...` trains, draws and judges the experiments of a group one after another, below --out (runs/alignment). What is there already
is kept, and a run that was killed goes on where it stopped; several calls on different groups share the work. `table GROUP` prints what is there.
"""

import argparse
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

from datasets.scenes import Scene, SceneSet, captions, corpus, random_scene, write_scenes
from demo.scene_judge import judge, rates

BATCH = 64
EPOCH = 25_000  # pictures: the data holds 64 more, which are held out
ASPECTS = ("shape", "colour", "binding", "relation", "everything")
DATA = {"two": SceneSet("two", EPOCH + 64, 32)}
LENGTHS = {"two": 32}
PIECES = {"ja": "1", "en": "3"}  # characters at most: an unseen pair is told in seen tokens


@dataclass(frozen=True)
class Experiment:
    name: str
    model: str
    data: str = "two"
    seed: int = 0
    lr: float = 1e-3
    noise: float = 1.0
    epochs: int = 8  # of 25,000 pictures
    judged: int = 1000  # pictures of each kind
    flags: tuple[str, ...] = ()


NETWORKS = {"pooled": "JiT-Nano/8-Text", "tokens": "JiT-Nano/8-Tokens", "mmjit": "MMJiT-Nano/8", "adaln": "MMJiT-Nano5/8-AdaLN"}
RATES, NOISES = (5e-4, 1e-3, 2e-3), (1.0, 1.5, 2.0)


def sweep() -> Iterator[Experiment]:
    """Learning rate, then noise scale, of each network, an epoch each."""
    for lr, noise in [*((lr, 1.0) for lr in RATES), *((1e-3, noise) for noise in NOISES[1:])]:
        for name, model in NETWORKS.items():
            yield Experiment(f"sweep-{name}-lr{lr:g}-noise{noise:g}", model, lr=lr, noise=noise, epochs=1, judged=100)


def pilot() -> Iterator[Experiment]:
    """The same at 200k pictures, where they differ: one seed."""
    for name, lr, noise in (
        *(("tokens", 1e-3, 1.0), ("mmjit", 1e-3, 2.0), ("tokens", 2e-3, 1.0), ("mmjit", 2e-3, 2.0), ("pooled", 2e-3, 1.0), ("adaln", 1e-3, 1.0)),
        *(("tokens", 1e-3, 2.0), ("mmjit", 1e-3, 1.0), ("adaln", 2e-3, 1.0), ("adaln", 1e-3, 2.0), ("pooled", 1e-3, 1.0), ("pooled", 2e-3, 2.0)),
    ):
        yield Experiment(f"two-{name}-lr{lr:g}-noise{noise:g}-seed0", NETWORKS[name], lr=lr, noise=noise, judged=500)


GROUPS = {"sweep": tuple(sweep()), "pilot": tuple(pilot())}


# --- what an experiment needs


def call(*command: str) -> None:
    print("$ python", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def prompts_of(level: str, seen: bool, count: int, language: str) -> tuple[list[Scene], list[str]]:
    """Scenes to draw, and a caption of each."""
    scenes, lines = [], []
    for i in range(count):
        rng = random.Random(f"prompt/{level}/{seen}/{i}")
        scenes.append(random_scene(level, rng, seen))
        lines.append(rng.choice(captions(scenes[-1], language)))
    return scenes, lines


def make_data(root: Path, name: str) -> tuple[Path, Path]:
    """Folders of the data and of the language model that reads it, made once."""
    options = DATA[name]
    data, llm = root / "data" / name, root / f"llm-{options.language}"
    if not (data / "captions").is_dir():
        beside = data.with_suffix(".part")
        write_scenes(beside, options)
        beside.rename(data)
    if not (llm / "tokenizer.json").exists():
        text = root / f"corpus-{options.language}.txt"
        text.write_text("\n".join(corpus(options.language)) + "\n", encoding="utf-8")
        call("-m", "demo.tiny_llm", "--text", str(text), "--out", str(llm), "--longest", PIECES[options.language], "--steps", "600")
    return data, llm


def train(one: Experiment, root: Path) -> float:
    """Until its last epoch, from where it stands.  Returns: seconds."""
    (data, llm), run = make_data(root, one.data), root / "runs" / one.name
    flags = ["--model", one.model, "--img_size", str(DATA[one.data].size), "--data_path", str(data), "--output_dir", str(run), "--resume", str(run)]
    flags += ["--llm_model_name", str(llm), "--max_text_len", str(LENGTHS[one.data]), "--noise_scale", str(one.noise), "--seed", str(one.seed)]
    flags += ["--epochs", str(one.epochs), "--batch_size", str(BATCH), "--lr", str(one.lr), "--lr_schedule", "cosine", "--warmup_epochs", "0.25"]
    flags += ["--cfg", "2.5", "--num_sampling_steps", "20", "--device", "cpu", "--num_workers", "0", "--save_last_freq", "1", "--log_freq", "100"]
    started = time.perf_counter()
    call("-m", "benchmarks.alignment_variants", *flags, *one.flags)
    return time.perf_counter() - started


def draw(run: Path, lines: Sequence[str]) -> list[Image.Image]:
    listing = run / "prompts.txt"
    listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
    call("-m", "benchmarks.alignment_variants", "--generate", "--resume", str(run), "--prompts_file", str(listing), "--device", "cpu", "--gen_bsz", "128")
    return [Image.open(run / "samples" / f"{i:04d}.png").convert("RGB") for i in range(len(lines))]


def measure(one: Experiment, root: Path) -> dict:
    """Shares right with their 95 % intervals, of seen and of unseen scenes."""
    options, found = DATA[one.data], {}
    kinds = {kind: prompts_of(options.level, kind == "seen", one.judged, options.language) for kind in ("seen", "unseen")}
    pictures = draw(root / "runs" / one.name, [line for _, lines in kinds.values() for line in lines])
    for i, (kind, (scenes, _)) in enumerate(kinds.items()):
        found[kind] = rates([judge(picture, scene) for picture, scene in zip(pictures[i * one.judged :], scenes)])
    return found


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
    print(row(one, found, seconds), flush=True)


def row(one: Experiment, found: dict, seconds: float) -> str:
    cells = [f"{found[kind][aspect][0]:.1%}" for kind in ("seen", "unseen") for aspect in ASPECTS]
    return f"| {one.name} | {one.model} | {one.lr:g} | {one.noise:g} | {one.seed} | {' | '.join(cells)} | {seconds / 60:.1f} |"


def table(group: Sequence[Experiment], root: Path) -> None:
    for one in group:
        path = root / "results" / f"{one.name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            print(row(one, found["rates"], found["seconds"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("groups", nargs="+", choices=sorted(GROUPS))
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    args = parser.parse_args()
    for name in args.groups:
        for one in GROUPS[name] if args.what == "run" else ():
            run_one(one, args.out)
        if args.what == "table":
            table(GROUPS[name], args.out)


if __name__ == "__main__":
    main()
