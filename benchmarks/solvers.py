"""Which solver needs the fewest calls of the network: `python -m benchmarks.solvers digits --run demo_output/digits/run`, or `scenes` after `make demo-scenes`.

Prompts of things never seen in training are drawn from the same noise by each solver at about 10, 20, 40 and 100 calls (a guided evaluation is one) and by Heun with
999 calls. Printed: how far the pictures are from those, and what share of them the judge finds right.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from datasets.demo import HELD_OUT, digit_prompts
from datasets.transforms import to_image
from demo.judge import DigitJudge, shares_right
from demo.run import asked_scenes
from demo.scene_judge import judge, rates
from denoiser import SOLVERS, calls_of
from sampling import load_painter

CALLS = (10, 20, 40, 100)
SHIFTS = (0.5, 2.0)  # besides 1, tried with the solvers of one call a step at 20 calls
Judged = Callable[[Tensor], float]


def digits(count: int, size: int) -> tuple[list[str], Judged]:
    """Prompts, and the share of their pictures that is right."""
    pairs = [HELD_OUT[i % len(HELD_OUT)] for i in range(count)]
    machine = DigitJudge(size)
    prompts = digit_prompts(pairs)
    return prompts, lambda pictures: shares_right(machine([to_image(picture) for picture in pictures]), pairs)[2]


def scenes(count: int, size: int) -> tuple[list[str], Judged]:
    asked, prompts = asked_scenes(False, count)
    return prompts, lambda pictures: rates([judge(to_image(picture), scene) for picture, scene in zip(pictures, asked)])["everything"][0]


def settings() -> Sequence[tuple[str, int, float]]:
    """Method, steps and shift."""
    plain = [(method, calls // 2 if method == "heun" else calls, 1.0) for calls in CALLS for method in SOLVERS]
    return plain + [(method, 20, shift) for method in SOLVERS if method != "heun" for shift in SHIFTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("digits", "scenes"))
    parser.add_argument("--run", type=Path, required=True, help="a demo's run")
    parser.add_argument("--count", type=int, default=200, help="pictures")
    args = parser.parse_args()
    painter = load_painter(args.run, device="cpu", llm=str(args.run.parent / "llm"))
    usual = painter.sampler
    prompts, right = {"digits": digits, "scenes": scenes}[args.what](args.count, painter.job.model.img_size)
    wanted = painter(prompts, replace(usual, method="heun", steps=500)).float()
    print(
        f"the solution: {right(wanted.to(torch.uint8)):.1%} right\n\n| calls | solver | steps | shift | distance, levels of 255 | right |\n|---|---|---|---|---|---|"
    )
    for method, steps, shift in settings():
        sampler = replace(usual, method=method, steps=steps, time_shift=shift)
        pictures = painter(prompts, sampler)
        distance = (pictures.float() - wanted).square().mean().sqrt().item()
        print(f"| {calls_of(sampler)} | {method} | {steps} | {shift:g} | {distance:.2f} | {right(pictures):.1%} |", flush=True)


if __name__ == "__main__":
    main()
