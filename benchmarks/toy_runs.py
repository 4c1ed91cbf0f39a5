"""Fixed toy runs, so that a change of the code can be held against the code before it: `python -m benchmarks.toy_runs --out DIR --inputs DIR`.

Text and class models, one process and two, each trained once straight and once with a kill by SIGKILL and a resumption, then drawn from and evaluated. Written to
DIR/digests.json: a hash of all weights, averages and optimizer state, of every picture drawn, and of every scalar logged but the speed. --code runs another
checkout's main_jit.py (the one before a change); data and models are made once in --inputs and shared, so that nothing but the code differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CAPTIONS = ["赤い三", "夕焼けの海辺を走る柴犬", "a black cat on a chair", "富士山と桜の写真、2024年春", "𠮷野家の牛丼🍚", "ﾊﾝｶｸとＦＵＬＬ"]
TRAINING = [
    "--epochs",
    "3",
    "--warmup_epochs",
    "1",
    "--lr",
    "1e-3",
    "--proj_dropout",
    "0.2",
    "--log_freq",
    "1",
    "--save_freq_steps",
    "2",
    "--eval_freq",
    "2",
    "--online_eval",
]
DRAWING = ["--cfg", "2", "--interval_min", "0.1", "--num_sampling_steps", "4", "--num_images", "12", "--seed", "3"]


def make_inputs(inputs: Path) -> None:
    """Random pictures in both layouts, a language model, a CLIP, Inception with random weights."""
    from benchmarks.evaluation import random_inception
    from demo.tiny_clip import build_processor, build_siglip
    from demo.tiny_llm import build_llama, train_tokenizer

    rng = np.random.default_rng(0)
    for i in range(24):
        picture = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        for place in (inputs / "text" / "images" / f"{i:02d}.png", inputs / "classes" / "train" / f"n{i % 3}" / f"{i:02d}.png"):
            place.parent.mkdir(parents=True, exist_ok=True)
            picture.save(place)
        caption = inputs / "text" / "captions" / f"{i:02d}.txt"
        caption.parent.mkdir(exist_ok=True)
        caption.write_text(f"{CAPTIONS[i % 6]}\n{CAPTIONS[i % 6]} {i}\n", encoding="utf-8")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=120)
    for part in (build_llama(tokenizer, width=32, depth=2), tokenizer):
        part.save_pretrained(inputs / "llm")
    for part in (build_siglip(len(tokenizer), 16, width=32, depth=1), build_processor(tokenizer, 16)):
        part.save_pretrained(inputs / "clip")
    random_inception(inputs / "inception.pth")


def flags(inputs: Path, kind: str, out: Path) -> list[str]:
    common = ["--img_size", "16", "--device", "cpu", "--num_workers", "1", "--output_dir", str(out), *DRAWING]
    if kind == "class":
        return ["--model", "JiT-Nano/8", "--class_num", "3", "--data_path", str(inputs / "classes"), *common]
    text = ["--model", "JiT-Nano/8-Text", "--llm_model_name", str(inputs / "llm"), "--held_out", "4"]
    return [*text, "--data_path", str(inputs / "text"), *common]


def measured(inputs: Path, kind: str) -> list[str]:
    return ["--inception_weights", str(inputs / "inception.pth"), *(["--clip_model", str(inputs / "clip")] if kind == "text" else [])]


def start(code: Path, processes: int, argv: list[str]) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(code)}
    return subprocess.Popen([sys.executable, *torchrun, "main_jit.py", *argv], cwd=code, env=environment, start_new_session=True)


def finish(process: subprocess.Popen) -> None:
    if process.wait():
        raise SystemExit(f"a toy run ended with {process.returncode}")


def killed(process: subprocess.Popen, checkpoint: Path) -> None:
    """SIGKILL to all of its processes as soon as it has written a checkpoint."""
    from benchmarks.kill_test import family

    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    for pid in family(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    print(f"killed after {checkpoint} was written", flush=True)


def digest(parts) -> str:
    value = hashlib.sha256()
    for part in parts:
        value.update(part)
    return value.hexdigest()[:16]


def digest_of_checkpoint(path: Path) -> str:
    """Weights, averages, optimizer and position, without the settings."""
    state = torch.load(path, weights_only=True)

    def walk(value, name):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                yield from walk(value[key], f"{name}/{key}")
        else:
            yield f"{name}={value.float().numpy().tobytes().hex() if isinstance(value, torch.Tensor) else value}".encode()

    names = ("model", "model_ema1", "model_ema2", "optimizer", "epoch", "epoch_step", "step", "skips", "evaluation_due")
    parts = [part for name in names for part in walk(state[name], name)]
    text = {name: state["text"][name] for name in ("mean", "std", "width")} if "text" in state else {}
    return digest([*parts, *walk(text, "text")])


def scalars_of(out: Path) -> dict[str, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out), size_guidance={"scalars": 0})
    events.Reload()
    tags = sorted(set(events.Tags()["scalars"]) - {"images_per_second"})
    return {tag: digest(f"{event.step} {event.value!r}\n".encode() for event in events.Scalars(tag)) for tag in tags}


def toy_run(code: Path, inputs: Path, out: Path, kind: str, processes: int) -> dict[str, object]:
    """Straight, and killed and resumed; the digests of both, of what is drawn and of what is measured."""
    found: dict[str, object] = {}
    batch = ["--batch_size", str(4 // processes)]
    for road in ("straight", "resumed"):
        place = out / f"{kind}{processes}_{road}"
        argv = [*flags(inputs, kind, place), *measured(inputs, kind), *TRAINING, *batch, "--resume", str(place)]
        if road == "resumed":
            killed(start(code, processes, argv), place / "checkpoint-last.pth")
        finish(start(code, processes, argv))
        found[road] = digest_of_checkpoint(place / "checkpoint-last.pth")
    straight = out / f"{kind}{processes}_straight"
    found["scalars"] = scalars_of(straight)
    prompts = ["--prompt", "0", "--prompt", "2"] if kind == "class" else ["--prompt", CAPTIONS[1], "--prompt", "新しい猫"]
    finish(start(code, processes, [*flags(inputs, kind, straight), "--resume", str(straight), "--generate", *prompts]))
    found["samples"] = [digest([path.read_bytes()]) for path in sorted((straight / "samples").glob("0*.png"))]
    evaluation = [*flags(inputs, kind, straight), *measured(inputs, kind), "--resume", str(straight)]
    finish(start(code, processes, [*evaluation, "--evaluate_gen", "--save_images", "--eval_ema", "raw"]))
    finish(start(code, processes, [*evaluation, "--sweep", "--cfg", "1,3", "--sweep_images", "8"]))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((straight / "eval").glob("*.json"))]
    found["figures"] = sorted(digest([json.dumps([record["setting"], record["figures"]], sort_keys=True).encode()]) for record in records)
    found["evaluated pictures"] = digest(path.read_bytes() for path in sorted((straight / "eval").glob("*/*.png")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; emptied first")
    parser.add_argument("--inputs", type=Path, required=True, help="folder of data and models; made where it is not there")
    parser.add_argument("--code", type=Path, default=Path("."), help="the checkout whose main_jit.py runs")
    parser.add_argument("--against", type=Path, default=None, help="--out of another checkout's runs, to compare with")
    args = parser.parse_args()
    out, inputs, code = args.out.resolve(), args.inputs.resolve(), args.code.resolve()
    if not inputs.exists():
        make_inputs(inputs)
    shutil.rmtree(out, ignore_errors=True)
    for store in inputs.glob("text/text_cache"):
        shutil.rmtree(store)
    for statistics in inputs.glob("*/fid_stats_*.npz"):
        statistics.unlink()
    found = {f"{kind}, {processes}": toy_run(code, inputs, out, kind, processes) for kind in ("text", "class") for processes in (1, 2)}
    (out / "digests.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, digests in found.items():
        print(
            f"{name}: straight {digests['straight']}, killed and resumed {digests['resumed']}, {len(digests['scalars'])} scalars, {len(digests['figures'])} evaluations"
        )
    if args.against:
        before = json.loads((args.against / "digests.json").read_text(encoding="utf-8"))
        for name in found:
            for part, value in found[name].items():
                print(f"{name}, {part}: {'the same' if value == before[name][part] else f'DIFFERENT: {before[name][part]} before, {value} now'}")
        sys.exit(found != before)


if __name__ == "__main__":
    main()
