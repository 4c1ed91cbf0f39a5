"""What text costs: `python -m benchmarks.text_path --out DIR [--device cuda] [--llm 3.7b] [--model JiT-B/16] [--only step memory ...]`.

step       a training step with stored features, features in memory, the LLM in the loop, and class labels; interleaved, same network
tokens     a training step of a network that reads tokens, from the store and from the encoder in the step, against class labels where there are any
sampling   pictures with their text encoded once, and with it encoded at every call of the network
encoding   captions and tokens a second, bytes a caption in the store
memory     peak memory of whole training runs: classes, text with a complete store, the LLM in the loop; fails if the store costs more than its index
million    a store of a million captions through a tiny LLM: building, opening, random look-ups, memory of the reading process
The LLM has the shape of an llm-jp-3, or of a bidirectional encoder of 310M parameters, and random weights; the captions are made up, about as long as real ones.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, ModernBertConfig, ModernBertModel

import engine_jit as engine
import models_mmjit
import text_features
from benchmarks.speed import synchronize
from conditioning import Conditioning, LabelConditions
from config import Data, DiffusionConfig, SamplerConfig, TextConfig, TextSource, Train
from datasets.imagenet import ClassFolder
from datasets.source import make_loader, open_captioned
from datasets.stream import Collate, PackedStrings, Shuffle, StreamSampler, View
from demo.tiny_llm import train_tokenizer
from denoiser import Objective, sample
from evaluation.text_gap import TextGap, choose
from models_jit import build_model
from text_encoder import LanguageModel
from util import feature_store as disk
from util.ema import Ema
from util.parallel import for_drawing, in_precision

SHAPES = {  # the llm-jp-3 family: width, layers, heads, width of the MLP
    "tiny": (64, 2, 2, 128),
    "150m": (512, 12, 8, 2048),
    "1.8b": (2048, 24, 16, 7168),
    "3.7b": (3072, 28, 24, 8192),
    "310m": (768, 25, 12, 3072),  # ModernBERT's, as of sbintuitions/modernbert-ja-310m
}
VOCABULARY = 99584
WORDS = (
    ["早朝", "夕暮れ", "真夜中", "雨上がり", "雪の日", "春", "真夏", "晩秋", "昼下がり", "祭りの夜"],
    ["海辺", "古い駅", "竹林", "商店街", "山頂", "台所", "図書館", "神社の境内", "高速道路", "川沿いの公園", "温泉街", "棚田"],
    ["年老いた", "小さな", "白い", "眠そうな", "背の高い", "赤い帽子の", "濡れた", "笑っている", "三匹の", "派手な"],
    ["柴犬", "漁師", "三毛猫", "少女", "自転車", "機関車", "鶴", "相撲取り", "提灯", "職人", "郵便配達員", "狸"],
    ["走っている", "空を見上げている", "横たわっている", "手を振っている", "光を浴びている", "影を落としている", "雨宿りをしている"],
    ["水彩画風", "広角レンズの写真", "浮世絵風", "鉛筆画", "逆光の写真", "油絵風", "フィルム写真", "版画風"],
)


def caption(i: int) -> str:
    """The i-th of some 800,000 scenes in several numbers, 30 to 45 characters."""
    chosen = []
    rest = i
    for words in WORDS:
        rest, at = divmod(rest, len(words))
        chosen.append(words[at])
    when, where, how, who, does, style = chosen
    return f"{when}の{where}で、{how}{who}が{does}様子を描いた{style}の一枚、その{i % 997 + 1}。"


def make_llm(folder: Path, shape: str, device: torch.device) -> Path:
    """A folder with a Llama of that shape, random weights, and a tokenizer of about 1.5 characters a token."""
    if (folder / "config.json").exists():
        return folder
    width, layers, heads, mlp = SHAPES[shape]
    tokenizer = train_tokenizer((caption(i * 7919) for i in range(20000)), vocab_size=280, longest=2)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    torch.manual_seed(0)
    with torch.device(device):
        llm = ModernBertModel(ModernBertConfig(**sizes, pad_token_id=4)) if shape == "310m" else LlamaModel(LlamaConfig(**sizes))
    llm.to(torch.bfloat16 if device.type == "cuda" else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(root: Path, count: int, size: int) -> None:
    """The same noise pictures as a captioned folder and as a class folder."""
    if (root / "train").exists():
        return
    rng = np.random.default_rng(0)
    for name in ("images", "captions", "train/a", "train/b"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)).resize((size, size))
        picture.save(root / "images" / f"{i:05d}.jpg", quality=90)
        shutil.copyfile(root / "images" / f"{i:05d}.jpg", root / "train" / "ab"[i % 2] / f"{i:05d}.jpg")
        (root / "captions" / f"{i:05d}.txt").write_text(caption(i), encoding="utf-8")


def medians(actions: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, np.ndarray]:
    """Seconds of each action in each round, the actions in turn; a round before the first warms up."""
    seconds = {name: [] for name in actions}
    for i in range(rounds + 1):
        names = list(actions) if i % 2 else list(actions)[::-1]
        for name in names:
            synchronize(device)
            start = time.perf_counter()
            actions[name]()
            synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def build(model: str, width: int | None, args: argparse.Namespace) -> torch.nn.Module:
    """width: of a text model's features."""
    if model.startswith("MMJiT"):
        return models_mmjit.build_model(model, input_size=args.img_size, text_dim=width)
    length = args.max_text_len if model.endswith("-Tokens") else None
    return build_model(model, input_size=args.img_size, num_classes=2, text_dim=width, text_len=length)


class Variant:
    """One variant of the training step: its data, conditions and network, with all that engine_jit.batch_loss asks of a Training."""

    seed, config, objective = 0, Train(lr=1e-4), Objective(DiffusionConfig())

    def __init__(self, dataset, conditions, model: str, width: int | None, args: argparse.Namespace, device: torch.device):
        torch.manual_seed(0)
        self.net = build(model, width, args).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.emas = [Ema(self.net, 0.9999), Ema(self.net, 0.9996)]
        sampler = StreamSampler(Shuffle(torch.arange(len(dataset)), 0), args.batch_size, range(10**6), 0, 1)
        collate = Collate(conditions if conditions.in_loader else None, self.diffusion, self.config.label_drop_prob, self.seed)
        self.batches = iter(make_loader(dataset, sampler, collate, Data(workers=args.num_workers), device))
        self.conditions, self.null, self.device, self.n = conditions, conditions.null.to(device), device, 0

    def step(self) -> None:
        net = in_precision(self.net, self.device, self.device.type == "cuda")
        engine.batch_loss(net, next(self.batches), self).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for ema in self.emas:
            ema.update(list(self.net.parameters()), self.n)
        self.n += 1


def prepare(captions: Sequence[str], config: TextConfig, cache: str, store: Path, device: torch.device) -> Conditioning:
    """Standardized features of all captions."""
    source = TextSource(config, cache, str(store) if cache == "disk" else None)
    return text_features.prepare(source, text_features.Texts(captions, np.arange(len(captions))), {}, device)


def bench_step(args: argparse.Namespace, llm: Path, device: torch.device) -> None:
    text, classes = open_captioned(Data(path=str(args.out / "data")), View(args.img_size)), ClassFolder(args.out / "data", 2, View(args.img_size))
    variants = {"class labels": Variant(classes, LabelConditions(2), args.model, None, args, device)}
    for name, cache in (("store on disk", "disk"), ("features in memory", "memory"), ("LLM in the loop", "off")):
        found = prepare(text.captions, TextConfig(str(llm), layer="last"), cache, args.out / "store", device)
        variants[name] = Variant(text, found.y_of, f"{args.model}-Text", found.width, args, device)
    actions = {name: variant.step for name, variant in variants.items()}
    stored = variants["store on disk"]
    chosen = choose(text, range(len(text)), max(16, min(64, args.batch_size)))
    gap = TextGap(chosen, stored.conditions, DiffusionConfig(), 0, args.batch_size, device)
    actions["(the text gap, once every --log_freq steps)"] = partial(gap, for_drawing(stored.net, device, device.type == "cuda")[0])
    seconds = medians(actions, args.rounds, device)
    print(f"\ntraining step, {args.model} at {args.img_size} pixels, batch {args.batch_size}, llm-jp-3-{args.llm} shape, {args.rounds} rounds in turn\n")
    print("| conditions | median ms | against class labels, round by round |\n|---|---|---|")
    for name, values in seconds.items():
        ratio = np.median(values / seconds["class labels"])
        print(f"| {name} | {1e3 * np.median(values):.1f} | {ratio:.3f} |")


def bench_tokens(args: argparse.Namespace, llm: Path, device: torch.device) -> None:
    text, variants = open_captioned(Data(path=str(args.out / "data")), View(args.img_size)), {}
    model = args.model if args.model.startswith("MMJiT") else f"{args.model}-Tokens"
    if model != args.model:
        variants["class labels"] = Variant(ClassFolder(args.out / "data", 2, View(args.img_size)), LabelConditions(2), args.model, None, args, device)
    config = TextConfig(str(llm), args.max_text_len, "last", "tokens")
    for name, cache in (("tokens from the store", "disk"), ("tokens from the encoder in the step", "off")):
        found = prepare(text.captions, config, cache, args.out / f"tokens-{args.llm}", device)
        variants[name] = Variant(text, found.y_of, model, found.width, args, device)
    seconds = medians({name: variant.step for name, variant in variants.items()}, args.rounds, device)
    first = next(iter(seconds))
    print(f"\ntraining step, {model} at {args.img_size} pixels, batch {args.batch_size}, encoder of {args.llm}, {found.bytes_each:,} bytes a caption\n")
    print(f"| conditions | median ms | against {first}, round by round |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {1e3 * np.median(values):.1f} | {np.median(values / seconds[first]):.3f} |")


def bench_sampling(args: argparse.Namespace, llm: Path, device: torch.device) -> None:
    encoder = LanguageModel(TextConfig(str(llm), layer="last", dtype="bf16" if device.type == "cuda" else "fp32")).load(device)
    net = in_precision(build_model(f"{args.model}-Text", input_size=args.img_size, text_dim=encoder.width).to(device).eval(), device, device.type == "cuda")
    prompts = [caption(i) for i in range(args.batch_size)]
    noise = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    sampler = SamplerConfig(steps=args.sampling_steps, cfg_scale=2.9)
    calls = itertools.count()

    def draw(encoded_every_time: bool) -> None:
        def call(z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            next(calls)
            return net(z_t, t, encoder.encode(prompts) if encoded_every_time else y)

        y = encoder.encode(prompts)
        sample(call, noise, y, encoder.null.to(device).expand_as(y), DiffusionConfig(), sampler)

    with torch.inference_mode():
        draw(False)
        number = next(calls)
        seconds = medians({"once": lambda: draw(False), "every call": lambda: draw(True)}, 3, device)
    print(
        f"\nsampling, {args.model} at {args.img_size} pixels, {args.batch_size} pictures, Heun {args.sampling_steps} with guidance: {number} calls of the network\n"
    )
    print("| text encoded | median seconds |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {np.median(values):.2f} |")


def bench_encoding(args: argparse.Namespace, llm: Path, device: torch.device) -> None:
    captions = [caption(i * 6007) for i in range(args.captions)]
    print(
        f"\nencoding, llm-jp-3-{args.llm} shape, {args.captions} captions\n\n| type | captions/s | tokens/s | tokens a caption | bytes a caption |\n|---|---|---|---|---|"
    )
    for dtype in ("fp32", "bf16") if device.type == "cpu" else ("bf16",):
        encoder = LanguageModel(TextConfig(str(llm), layer="last", dtype=dtype)).load(device)
        encoder.encode_all(captions[:64])
        synchronize(device)
        start = time.perf_counter()
        arrays = encoder.encode_all(captions)
        seconds = time.perf_counter() - start
        tokens = int(arrays["lengths"].sum())
        size = sum(array.nbytes for array in arrays.values()) / len(captions) + 16
        print(f"| {dtype} | {len(captions) / seconds:.0f} | {tokens / seconds:.0f} | {tokens / len(captions):.1f} | {size:.0f} |")


def status(pid: int | str, field: str) -> float:
    """A line of /proc/PID/status, MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


def peak(*command: str) -> float:
    """Peak memory of a command, MB.  (The rusage of a child counts its parent's size at the fork.)"""
    process, highest = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0.0
    while process.poll() is None:
        highest = max(highest, status(process.pid, "VmHWM"))
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return highest


def bench_memory(args: argparse.Namespace, llm: Path, device: torch.device) -> None:
    common = ["main_jit.py", "--img_size", str(args.img_size), "--batch_size", str(args.batch_size), "--epochs", "1", "--num_workers", "0", "--lr", "1e-4"]
    common += ["--device", device.type, "--data_path", str(args.out / "data"), "--output_dir", str(args.out / "run")]
    text = [*common, "--model", f"{args.model}-Text", "--llm_model_name", str(llm), "--text_cache_dir", str(args.out / "store_of_runs")]
    labels = [*common, "--model", args.model, "--class_num", "2"]
    subprocess.run([sys.executable, "cache_text.py", *text[1:]], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = {}
    for name, command in (("class labels", labels), ("store on disk, complete", text), ("LLM in the loop", [*text[:-2], "--text_cache", "off"])):
        shutil.rmtree(args.out / "run", ignore_errors=True)
        found[name] = peak(*command)
    print(
        f"\npeak memory of a whole training run, {args.model}, batch {args.batch_size} on {device.type}, the largest process\n\n| conditions | MB | more than class labels |\n|---|---|---|"
    )
    for name, size in found.items():
        print(f"| {name} | {size:.0f} | {size - found['class labels']:+.0f} |")
    more = found["store on disk, complete"] - found["class labels"]
    if more > 0.05 * found["class labels"]:
        sys.exit(f"error: a run with a complete store takes {more:.0f} MB more than one with class labels")


def memory() -> str:
    return f"{status('self', 'RssAnon'):.0f} MB of its own, {status('self', 'RssFile'):.0f} MB of mapped files"


def time_look_ups(look_up: Callable[[Tensor], Tensor], count: int) -> float:
    """Seconds for a million random rows of `count`, in batches of 128."""
    rows = torch.randint(0, count, (1_000_000,), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for batch in rows.split(128):
        look_up(batch)
    return time.perf_counter() - start


def wide_store(folder: Path, shards: int = 128, width: int = 3072) -> disk.FeatureStore:
    """Random features as wide as llm-jp-3-3.7b's, 0.8 GB."""
    folder.mkdir(exist_ok=True)
    disk.write_manifest(folder, {})
    rows = {"lengths": torch.zeros(disk.SHARD_ROWS), "unknown": torch.zeros(disk.SHARD_ROWS)}
    for i in range(shards):
        keys = disk.keys_of(f"{i} {row}" for row in range(disk.SHARD_ROWS))
        features = torch.randn(disk.SHARD_ROWS, width).half()
        disk.write_shard(folder / disk.shard_name(keys), {}, {"keys": disk.key_array(keys), "features": features, **rows})
    return disk.FeatureStore(folder, disk.shard_names(folder))


def bench_million(args: argparse.Namespace, device: torch.device) -> None:
    llm = make_llm(args.out / "llm-tiny", "tiny", torch.device("cpu"))
    count, store = 1_000_000, args.out / "million"
    captions = PackedStrings(caption(i) for i in range(count))
    print(f"\na store of {count} captions, {len(set(captions))} of them different, tiny LLM")
    start = time.perf_counter()
    text_features.build_store(TextConfig(str(llm), layer="last", dtype="fp32"), store, captions, [], torch.device("cpu"))
    print(f"built in {time.perf_counter() - start:.0f} s ({status('self', 'VmHWM'):.0f} MB peak)")
    start = time.perf_counter()
    found = prepare(captions, TextConfig(str(llm), layer="last", dtype="fp32"), "disk", store, torch.device("cpu"))
    print(f"complete store opened, its captions found, their mean and variance taken: {time.perf_counter() - start:.1f} s")
    del captions
    store = wide_store(args.out / "wide")
    sys.stdout.flush()
    if os.fork():
        os.wait()
        return
    torch.set_num_threads(1)  # as in a loader's process
    print(f"a loader process before it reads: {memory()}")
    print(f"a million random look-ups in batches of 128: {time_look_ups(found.y_of, count):.2f} s")
    print(f"a loader process after it has read all: {memory()}")
    seconds = time_look_ups(lambda batch: store(batch.numpy()), len(store))
    print(f"the same of {len(store)} captions with features {store.width} wide: {seconds:.2f} s")
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for models, data and stores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--llm", choices=[shape for shape in SHAPES if shape != "tiny"], default="150m")
    parser.add_argument("--model", default="JiT-S/16")
    parser.add_argument("--img_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sampling_steps", type=int, default=50)
    parser.add_argument("--captions", type=int, default=1024)
    parser.add_argument("--num_workers", type=int, default=0, help="of the step; 0 counts the reading of pictures and features into it")
    parser.add_argument("--max_text_len", type=int, default=77, help="of tokens")
    parser.add_argument(
        "--only", nargs="+", choices=("step", "tokens", "sampling", "encoding", "memory", "million"), default=("step", "sampling", "encoding", "memory")
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    llm = make_llm(args.out / f"llm-{args.llm}", args.llm, device)
    make_data(args.out / "data", 64, args.img_size)
    for name in args.only:
        if name == "million":
            bench_million(args, device)
        else:
            globals()[f"bench_{name}"](args, llm, device)


if __name__ == "__main__":
    main()
