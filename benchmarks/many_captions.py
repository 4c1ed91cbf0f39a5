"""What opening the features of a hundred million captions takes: `python -m benchmarks.many_captions --out DIR [--captions 100000000]`.

Beside their pictures, as prepare_data.py puts them (10,000 a shard), read by number; and in a store that training made by itself (1,024 a shard), of which a process keeps some shards
open. The files hold nothing, but take the room that they would (sparse files). Printed for a process that opens them and reads the features of 64 batches of 256: seconds, memory of its
own, maps (the kernel allows 65,530), and milliseconds a batch, first in places that lie together (the order of blocks), then anywhere.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.loader import make_index, sparse
from datasets.prepared import INDEX, TEXT_STATISTICS
from util import feature_store as disk

SIZES = {"U8": 1, "F16": 2, "I64": 8, "BOOL": 1}


def sparse_shard(path: Path, settings: str, count: int, width: int) -> None:
    header, place = {"__metadata__": {"settings": settings}}, 0
    arrays = {"lengths": ("I64", [count]), "keys": ("U8", [count, 16]), "features": ("F16", [count, width]), "unknown": ("BOOL", [count])}
    for name, (kind, shape) in arrays.items():
        size = SIZES[kind] * torch.Size(shape).numel()
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sparse(path, 8 + len(text) + place)
    with open(path, "r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)


def make_store(folder: Path, count: int, each: int, width: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"width": width}
    disk.write_manifest(folder, manifest)
    for number in range(-(-count // each)):
        sparse_shard(folder / f"shard-{number:06d}.safetensors", disk.settings_digest(manifest), each, width)


def make_beside(out: Path, count: int, width: int) -> None:
    make_index(out, count, 80)
    save_file({"mean": torch.zeros(1, width), "std": torch.ones(1, width)}, out / INDEX / TEXT_STATISTICS)
    make_store(out / disk.FOLDERS["mean"], count, 10_000, width)


OPEN = """
import re, sys, time
from pathlib import Path
import numpy as np
import torch
from config import Data
from datasets.source import open_captioned
from datasets.stream import BlockShuffle, View
from util.feature_store import FeatureStore, shard_names

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3

path, before, began = Path(sys.argv[1]), own(), time.perf_counter()
if (path / "index").is_dir():
    beside = open_captioned(Data(path=str(path)), View(256)).beside
    store, row_of = FeatureStore(beside.folder, beside.names, beside.counts), beside.__getitem__
else:
    store, row_of = FeatureStore(path, shard_names(path)), lambda lines: lines
opened, memory = time.perf_counter() - began, own() - before
order = BlockShuffle(len(store), torch.arange(0), 0)
blocks = [np.array(order.some(0, 256 * i, 256)) for i in range(64)]
anywhere = np.random.default_rng(0).integers(0, len(store), (64, 256))
times = []
for batches in (blocks, anywhere):
    began = time.perf_counter()
    for lines in batches:
        store(row_of(lines))
    times.append((time.perf_counter() - began) / 64 * 1e3)
maps = len(open("/proc/self/maps").readlines())
print(f"| {len(store.names):,} | {opened:.2f} | {memory:.0f} | {own() - before:.0f} | {maps:,} | {times[0]:.1f} | {times[1]:.1f} |")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=100_000_000)
    parser.add_argument("--width", type=int, default=1024)
    args = parser.parse_args()
    make_beside(args.out / "beside", args.captions, args.width)
    make_store(args.out / "store", args.captions, disk.SHARD_ROWS, args.width)
    print("| features | shards | s to open | MB then | MB at the end | maps | ms a batch, blocks | ms a batch, anywhere |\n|---|---|---|---|---|---|---|---|")
    for name in ("beside", "store", "beside", "store"):  # from the disk, and then out of the cache of files
        line = subprocess.run(
            [sys.executable, "-c", OPEN, str(args.out / name)], check=True, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True
        )
        print(f"| {name} {line.stdout.splitlines()[-1]}", flush=True)
    print(time.strftime("%Y-%m-%d"))


if __name__ == "__main__":
    main()
