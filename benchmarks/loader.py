"""How many pictures a core can hand over, and what opening a hundred million takes: `python -m benchmarks.loader --out DIR`.

Speed: pictures of smooth noise at three sizes, as a folder of JPEGs and as shards (JPEG, PNG, WebP) made by prepare_data.py; one loader process on one core: reading, decoding, cutting,
collating and handing over to the main process, which only counts. Medians of --rounds, in turn.
Opening: the index of --pictures pictures with captions of a length that does not exist but takes the room that it would (sparse files): seconds and memory of a process that opens it and
draws its first batch's numbers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import Data, DiffusionConfig
from datasets.captioned import CaptionedPictures
from datasets.prepared import FACTS, INDEX, PLACE
from datasets.shards import VERSION, Making
from datasets.source import make_loader, open_captioned
from datasets.stream import Collate, Shuffle, StreamSampler, View

SIZES = {"500x375": (500, 375), "1024x768": (1024, 768)}
BATCH = 64


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise at several scales, which a JPEG of quality 90 holds in about as many bytes as a photograph."""
    value = np.zeros((height, width, 3))
    for scale, weight in ((64, 60), (16, 30), (4, 12), (1, 4)):
        small = rng.normal(size=(-(-height // scale) + 1, -(-width // scale) + 1, 3)).astype(np.float32)
        large = torch.nn.functional.interpolate(torch.from_numpy(small).permute(2, 0, 1)[None], size=(height, width), mode="bilinear")[0]
        value += weight * large.permute(1, 2, 0).numpy()
    return Image.fromarray((128 + value).clip(0, 255).astype(np.uint8))


def make_folder(folder: Path, size: tuple[int, int], count: int) -> Path:
    for name in ("images", "captions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        picture(rng, *size).save(folder / "images" / f"{i:05d}.jpg", quality=90)
        (folder / "captions" / f"{i:05d}.txt").write_text(f"写真 {i}\n", encoding="utf-8")
    return folder


def speed(dataset: CaptionedPictures, batches: int) -> float:
    """Pictures a second, after the first batch."""
    sampler = StreamSampler(Shuffle(torch.arange(len(dataset)), 0), BATCH, range(batches), 0, 1)
    loader = iter(make_loader(dataset, sampler, Collate(None, DiffusionConfig(), 0.1, 0), Data(workers=1), torch.device("cpu")))
    next(loader)
    began, count = time.perf_counter(), 0
    for batch in loader:
        count += len(batch.numbers)
    return count / (time.perf_counter() - began)


def measure_speed(out: Path, rounds: int, batches: int) -> None:
    sources = {name: (make_folder(out / name, size, 256), 256) for name, size in SIZES.items()}
    large = make_folder(out / "2048x1536", (2048, 1536), 64)
    for size in (256, 512):
        for image_format in ("jpeg", "png", "webp"):
            folder = out / f"shards-{size}-{image_format}"
            origin = sources["1024x768"][0] if size == 256 else large
            line = ["--data_path", str(origin), "--out", str(folder), "--img_size", str(size), "--image_format", image_format]
            subprocess.run([sys.executable, "prepare_data.py", *line], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            sources[f"shards, {size} pixels, {image_format}"] = (folder, size)
    opened = {name: open_captioned(Data(path=str(folder)), View(size)) for name, (folder, size) in sources.items()}
    found: dict[str, list[float]] = {name: [] for name in opened}
    for _ in range(rounds):
        for name, dataset in opened.items():
            found[name].append(speed(dataset, batches))
    print("| source | KB a picture | pictures/s of a core | from, to | cores a GPU that takes 1,600 pictures/s |\n|---|---|---|---|---|")
    for name, values in found.items():
        folder = sources[name][0]
        files = [*folder.glob("images/*")] or [*folder.glob("*.tar")]
        kilobytes = sum(file.stat().st_size for file in files) / len(opened[name]) / 1e3
        middle = statistics.median(values)
        print(f"| {name} | {kilobytes:.0f} | {middle:,.0f} | {min(values):,.0f}, {max(values):,.0f} | {1600 / middle:.1f} |", flush=True)


def sparse(path: Path, count: int) -> None:
    with open(path, "wb") as file:
        file.truncate(count)


def make_index(out: Path, pictures: int, length: int) -> Path:
    """Of as many pictures in shards of 10,000, with one caption of so many bytes each; only what gives captions their places is written."""
    folder = out / INDEX
    folder.mkdir(parents=True, exist_ok=True)
    each = [min(10_000, pictures - start) for start in range(0, pictures, 10_000)]
    shards = [f"shard-{number:06d}.tar" for number in range(len(each))]
    facts = {"version": VERSION, "making": Making(256)._asdict(), "pictures": pictures, "captions": pictures, "duplicates": 0, "left_out": 0, "shards": shards}
    facts |= {"captions_made": each, "captions_indexed": each, "fingerprint": "0" * 32}
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    sparse(folder / "rows", 4 * pictures)
    sparse(folder / "places", pictures * PLACE.itemsize)
    sparse(folder / "captions", pictures * length)
    for name, each in (("first", 1), ("ends", length)):
        with open(folder / name, "wb") as file:
            for start in range(0, pictures + 1, 1 << 22):
                file.write((np.arange(start, min(start + (1 << 22), pictures + 1), dtype="<u8") * each).tobytes())
    return out


OPEN = """
import re, sys, time
from config import Data
from datasets.source import hold_out, open_captioned
from datasets.stream import StreamSampler, View
def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

before, began = own(), time.perf_counter()
dataset = open_captioned(Data(path=sys.argv[1]), View(256))
order, held_out = hold_out(dataset, 64, 0)
sampler = iter(StreamSampler(order, 1024, range(10**6), 3, 8))
numbers = [next(sampler)[0] for _ in range(1024)]
captions = [dataset.captions[dataset.condition(index, 0)] for index in numbers]
print(f"{time.perf_counter() - began:.2f} s, {(own() - before) / 1e3:.1f} MB of its own")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12, help="of 64 pictures, a round")
    parser.add_argument("--pictures", type=int, default=100_000_000, help="of the index that is opened; 0: none")
    args = parser.parse_args()
    measure_speed(args.out, args.rounds, args.batches)
    if args.pictures:
        for count in (args.pictures // 100, args.pictures):
            folder = make_index(args.out / f"index-{count}", count, 80)
            for _ in range(2):
                subprocess.run([sys.executable, "-c", OPEN, str(folder)], check=True, env={**os.environ, "PYTHONPATH": "."})
    print(time.strftime("%Y-%m-%d"))


if __name__ == "__main__":
    main()
