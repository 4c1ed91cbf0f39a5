"""What evaluation costs and whether its figures are torch-fidelity's: `python -m benchmarks.evaluation --out DIR [--device cuda] [--only speed equality]`.

speed      pictures a second of whole --evaluate_gen runs on 1 and more processes, split into drawing (noise, network, solver), features and the rest
equality   FID and IS of folders of random and of real pictures, ours against torch_fidelity.calculate_metrics on the same PNGs
Inception's weights are torch's cached ones or those of --inception_weights; where there are none, random ones of the same shape, at the same cost.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.demo import COLOURS, colour_ink, load_ink
from datasets.transforms import open_rgb, to_uint8
from models_jit import build_model
from util import checkpoint, extractors, metrics

CASES = {  # model, size, steps, pictures, drawn at a time
    "cpu": (("JiT-Nano/8", 32, 20, 256, 64), ("JiT-S/16", 256, 10, 48, 16)),
    "cuda": (("JiT-B/16", 256, 50, 10000, 256),),
}


def random_inception(path: Path) -> Path:
    """Weights of the right shape for torch-fidelity's Inception, so scaled that neither features nor logits are all alike."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args):
            pass

    torch.save({}, path)
    torch.manual_seed(0)
    network = Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    pictures = torch.stack([torch.full((3, 32, 32), level, dtype=torch.uint8) for level in (0, 127, 255)])
    common = torch.nn.functional.normalize(network(pictures)[0].mean(0), dim=0)
    weight = network.fc.weight.data
    weight.copy_(300 * (weight - (weight @ common)[:, None] * common))  # or all pictures would be of one class
    torch.save(network.state_dict(), path)
    return path


def digits(count: int, size: int) -> Iterator[tuple[str, Image.Image]]:
    """Real handwritten digits, (colour, picture)."""
    inks, _ = load_ink(size)
    for i in range(count):
        colour = list(COLOURS)[i % len(COLOURS)]
        yield colour, colour_ink(inks[i % len(inks)], colour)


def bench_speed(args: argparse.Namespace, weights: Path) -> None:
    print("| model | size | pictures | processes | pictures/s | drawing | features | rest | FID |\n|---|---|---|---|---|---|---|---|---|")
    for model, size, steps, count, batch in CASES[args.device]:
        data, run = args.out / f"data{size}", args.out / f"run{size}"
        for i, (colour, picture) in enumerate(digits(64, size)):
            (data / "train" / colour).mkdir(parents=True, exist_ok=True)
            picture.save(data / "train" / colour / f"{i}.png")
        run.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        state = checkpoint.with_prefix(build_model(model, input_size=size, num_classes=len(COLOURS)).state_dict())
        state = {name: value + 0.02 * torch.randn_like(value) for name, value in state.items()}
        flags = {"model": model, "img_size": size, "class_num": len(COLOURS), "noise_scale": 1.0}
        checkpoint.save(run / checkpoint.LAST, {"model": state, "model_ema1": state, "model_ema2": state, "step": 1, "epoch": 0, "args": flags})
        for processes in args.processes:
            shutil.rmtree(run / "eval", ignore_errors=True)
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "main_jit.py", "--model", model, "--img_size", str(size)]
            command += [
                "--class_num",
                str(len(COLOURS)),
                "--num_sampling_steps",
                str(steps),
                "--cfg",
                "2.5",
                "--num_images",
                str(count),
                "--gen_bsz",
                str(batch),
            ]
            command += ["--data_path", str(data), "--output_dir", str(run), "--resume", str(run), "--evaluate_gen", "--inception_weights", str(weights)]
            threads = str(max(1, (os.cpu_count() or 1) // processes))
            subprocess.run([sys.executable, *command, "--device", args.device], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": threads})
            (record,) = (run / "eval").glob("*.json")
            found = json.loads(record.read_text())
            made = found["made"]
            shares = " | ".join(f"{made['seconds'][part]:.1f} s" for part in ("drawing", "features", "rest"))
            print(
                f"| {model}, Heun {steps} | {size} | {count} | {processes} | {made['pictures_per_second']:.2f} | {shares} | {found['figures']['fid']:.4f} |",
                flush=True,
            )


def bench_equality(args: argparse.Namespace, weights: Path) -> None:
    import torch_fidelity

    folders = {name: args.out / name for name in ("random", "digits", "more_digits")}
    rng, real = np.random.default_rng(0), list(digits(400, 32))
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(200):
            noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            {"random": noise, "digits": real[i][1], "more_digits": real[200 + i][1]}[name].save(folder / f"{i:03d}.png")
    extractor = extractors.load_fidelity(extractors.INCEPTION, str(weights), torch.device(args.device))
    found = {}
    extractor.network.to(args.device)
    for name, folder in folders.items():
        moments, logits = metrics.Moments(), metrics.NumberedRows()
        for start in range(0, 200, 48):
            numbers = list(range(start, min(start + 48, 200)))
            features, scores = extractor(torch.stack([to_uint8(open_rgb(str(folder / f"{i:03d}.png"))) for i in numbers]))
            moments.add(features)
            logits.add(numbers, scores)
        found[name] = moments.statistics()[0], metrics.inception_score(logits.in_order())
    print(
        "| pictures | against | FID, ours | FID, torch-fidelity | difference | IS, ours | IS, torch-fidelity | difference |\n|---|---|---|---|---|---|---|---|"
    )
    for drawn, against in (("random", "digits"), ("more_digits", "digits"), ("digits", "random")):
        wanted = torch_fidelity.calculate_metrics(
            input1=str(folders[drawn]), input2=str(folders[against]), cuda=args.device == "cuda", isc=True, fid=True,
            feature_extractor_weights_path=str(weights), cache=False, verbose=False,
        )  # fmt: skip
        ours = metrics.frechet_distance(found[drawn][0], found[against][0]), found[drawn][1]
        theirs = wanted["frechet_inception_distance"], wanted["inception_score_mean"]
        cells = [f"{a:.6f} | {b:.6f} | {abs(a / b - 1):.1e}" for a, b in zip(ours, theirs)]
        print(f"| {drawn} | {against} | {' | '.join(cells)} |", flush=True)
    for name in folders:
        print(f"FID of {name} against itself: {metrics.frechet_distance(found[name][0], found[name][0]):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, checkpoints and weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--inception_weights", type=Path, default=None)
    parser.add_argument("--only", nargs="+", choices=("speed", "equality"), default=("speed", "equality"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = extractors.weights_file(extractors.INCEPTION, args.inception_weights and str(args.inception_weights))
    weights = found or random_inception(args.out / "random_inception.pth")
    for name in args.only:
        globals()[f"bench_{name}"](args, weights)


if __name__ == "__main__":
    main()
