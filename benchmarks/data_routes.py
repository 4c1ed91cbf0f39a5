"""What each road costs by which data comes in: `python -m benchmarks.data_routes --out DIR [--only speed million]`.

speed     the same pictures through every route: seconds to open, pictures a second from the loader, in random order
million   a million rows: seconds to open them the first time and again, memory of the process then; folders with a tenth of that
"""

import argparse
import csv
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from benchmarks.text_path import caption, status
from config import Data, DiffusionConfig
from datasets.source import make_loader, open_captioned
from datasets.stream import Collate, Shuffle, StreamSampler, View

ROUTES = ("folder", "metadata.jsonl", "metadata.csv", "metadata.parquet", "table.jsonl", "list.json", "coco.json", "parquet", "tar")
Captions = Callable[[int], list[str]]


def write_files(folder: Path, pictures: Sequence[bytes], suffix: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:07d}{suffix}" for i in range(len(pictures))]
    for name, picture in zip(names, pictures):
        (folder / name).write_bytes(picture)
    return names


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(numbers: Iterable[int], pictures: Sequence[bytes], captions: Captions, suffix: str) -> Iterable[tuple[str, bytes]]:
    """As img2dataset writes them."""
    for i in numbers:
        yield f"{i:09d}{suffix}", pictures[i % len(pictures)]
        if len(captions(i)) == 1:
            yield f"{i:09d}.txt", captions(i)[0].encode()
        yield f"{i:09d}.json", json.dumps({"caption": captions(i), "url": "x"}).encode()


def inside_row(i: int, pictures: Sequence[bytes], captions: Captions) -> dict:
    return {"image": {"bytes": pictures[i % len(pictures)], "path": f"{i:07d}.jpg"}, "text": captions(i)}


def write_route(route: str, root: Path, pictures: Sequence[bytes], captions: Captions, suffix: str = ".png") -> tuple[Path, dict[str, str]]:
    """The pictures as that route has them.  Returns: --data_path, and other settings of the data."""
    root.mkdir(parents=True, exist_ok=True)
    count = len(pictures)
    if route == "tar":
        for part in range(3):
            write_tar(root / f"{part:05d}.tar", members(range(part * count // 3, (part + 1) * count // 3), pictures, captions, suffix))
        return root, {}
    if route == "parquet":
        for part in range(2):
            rows = [inside_row(i, pictures, captions) for i in range(part * count // 2, (part + 1) * count // 2)]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"train-{part}-of-2.parquet", row_group_size=100)
        return root, {}
    beside = route.startswith("metadata")
    names = write_files({"folder": root / "images"}.get(route, root if beside else root / "pictures"), pictures, suffix)
    rows = [{"file_name" if beside else "image": name, "texts" if beside else "text": captions(i)} for i, name in enumerate(names)]
    match route:
        case "folder":
            (root / "captions").mkdir()
            for i, name in enumerate(names):
                (root / "captions" / f"{name.removesuffix(suffix)}.txt").write_text("\n".join(captions(i)), encoding="utf-8")
        case "metadata.csv":  # which has no lists
            with open(root / route, "w", encoding="utf-8-sig", newline="") as file:
                writer = csv.DictWriter(file, ["file_name", "text"])
                writer.writeheader()
                writer.writerows({"file_name": name, "text": captions(i)[0]} for i, name in enumerate(names))
        case "metadata.parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / route)
        case "list.json":
            (root / route).write_text(json.dumps(rows), encoding="utf-8")
        case "coco.json":
            annotations = [{"id": i, "image_id": i, "caption": line} for i in reversed(range(count)) for line in captions(i)]
            content = {"images": [{"id": i, "file_name": name} for i, name in enumerate(names)], "annotations": annotations}
            (root / route).write_text(json.dumps(content), encoding="utf-8")
        case _:
            write_jsonl(root / route, rows)
    return (root, {}) if beside or route == "folder" else (root / route, {"image_root": str(root / "pictures")})


def photographs(count: int, size: tuple[int, int]) -> list[bytes]:
    """JPEG files of smooth noise, about as large as photographs of that size."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (size[1] // 6, size[0] // 6, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def bench_speed(args: argparse.Namespace) -> None:
    pictures = photographs(args.count, (640, 480))
    size = sum(map(len, pictures)) / len(pictures) / 1000
    print(f"\n{args.count} JPEG files of 640 x 480, {size:.0f} kB each, at 256 pixels, {args.num_workers} loader processes, the best of {args.rounds}\n")
    print("| route | seconds to open, then again | pictures/s |\n|---|---|---|")
    for route in ROUTES:
        path, more = write_route(route, args.out / "speed" / route, pictures, lambda i: [caption(i)], ".jpg")
        seconds, rates = [], []
        for _ in range(2):
            start = time.perf_counter()
            data = open_captioned(Data(path=str(path), **more), View(256))
            seconds.append(time.perf_counter() - start)
        for _ in range(args.rounds):
            sampler = StreamSampler(Shuffle(torch.arange(len(data)), 0), 64, range(len(data) // 64), 0, 1)
            loader = make_loader(data, sampler, Collate(None, DiffusionConfig(), 0.1, seed=0), Data(workers=args.num_workers), torch.device("cpu"))
            batches = iter(loader)
            next(batches)
            start, count = time.perf_counter(), 0
            for batch in batches:
                count += len(batch.pictures)
            rates.append(count / (time.perf_counter() - start))
        print(f"| {route} | {seconds[0]:.2f}, {seconds[1]:.2f} | {max(rates):.0f} |", flush=True)


def write_million(route: str, root: Path, count: int) -> tuple[Path, dict[str, str]]:
    """`count` rows of a hundred tiny pictures, each with a caption of its own."""
    pictures, captions = photographs(100, (18, 18)), lambda i: [caption(i)]
    root.mkdir(parents=True)
    if route == "table.jsonl":
        names = write_files(root / "pictures", pictures, ".jpg")
        return write_jsonl(root / route, ({"image": names[i % 100], "text": caption(i)} for i in range(count))), {"image_root": str(root / "pictures")}
    if route == "tar":
        for part in range(count // 10_000):
            write_tar(root / f"{part:05d}.tar", members(range(part * 10_000, (part + 1) * 10_000), pictures, captions, ".jpg"))
        return root, {}
    if route == "parquet":
        for part in range(count // 100_000):
            rows = [inside_row(i, pictures, captions) for i in range(part * 100_000, (part + 1) * 100_000)]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"{part:05d}.parquet", row_group_size=100)
        return root, {}
    return write_route("folder", root, pictures * (count // 100), captions, ".jpg")


def bench_million(args: argparse.Namespace) -> None:
    print("\n| route | rows | seconds to open, then again | memory of the process then, and at its highest, MB |\n|---|---|---|---|")
    for route, count in (("table.jsonl", 1_000_000), ("tar", 1_000_000), ("parquet", 1_000_000), ("folder", 100_000)):
        path, more = write_million(route, args.out / "million" / route, count)
        found = [open_alone(path, more) for _ in range(2)]
        print(f"| {route} | {count:,} | {found[0][0]:.1f}, {found[1][0]:.1f} | {found[1][1]:.0f}, {found[1][2]:.0f} |", flush=True)


def open_alone(path: Path, more: dict[str, str]) -> list[float]:
    """In a process of its own: seconds, memory after and at its highest, above what it had before."""
    code = f"from benchmarks.data_routes import opened; opened({str(path)!r}, {more!r})"
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def opened(path: str, more: dict[str, str]) -> None:
    before, start = status("self", "VmRSS"), time.perf_counter()
    data = open_captioned(Data(path=path, **more), View(256))
    seconds = time.perf_counter() - start
    data.picture(len(data) - 1)
    print(json.dumps([seconds, status("self", "VmRSS") - before, status("self", "VmHWM") - before]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the data")
    parser.add_argument("--only", nargs="+", choices=("speed", "million"), default=("speed", "million"))
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for name in args.only:
        globals()[f"bench_{name}"](args)


if __name__ == "__main__":
    main()
