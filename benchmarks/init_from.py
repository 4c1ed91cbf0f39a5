"""What class weights are worth to a text model: `python -m benchmarks.init_from --out DIR`, on the digits of the demo.

A class model learns the ten digits, in all colours. A -Text and a -Tokens model begin with its weights by --init_from, and beside them others from scratch;
the judge says what share of the pictures of pairs never seen is right after so many steps. Resumable.
"""

import argparse
import json
import os
from pathlib import Path

from benchmarks.text_choices import PAIRS, SIZE, draw, main_jit, make_data
from datasets.demo import HELD_OUT
from demo.judge import DigitJudge, shares_right

TRIALS = {  # whether they begin with the class model, and their epochs
    "JiT-Nano/8-Text": [(begun, epochs) for epochs in (1, 2, 3) for begun in (True, False)],
    "JiT-Nano/8-Tokens": [*((True, epochs) for epochs in (2, 3, 4)), *((False, epochs) for epochs in (3, 4, 5, 6))],
}
COMMON = ["--img_size", str(SIZE), "--device", "cpu", "--num_workers", "0", "--batch_size", "64", "--lr", "1e-3", "--warmup_epochs", "0.25"]
COMMON += ["--lr_schedule", "cosine", "--cfg", "2.5", "--num_sampling_steps", "20"]


def make_all(root: Path) -> None:
    """Captioned digits, a language model, and the digits in folders of their classes."""
    if (root / "classes").is_dir() and (root / "llm" / "config.json").exists():
        return
    data, classes = root / "data", root / "classes" / "train"
    make_data(root)
    from sklearn.datasets import load_digits

    digits = load_digits().target
    for picture in (data / "images").iterdir():
        folder = classes / str(digits[int(picture.stem.split("-")[0])])
        folder.mkdir(parents=True, exist_ok=True)
        os.link(picture, folder / picture.name)


def trial(root: Path, model: str, begun: bool, epochs: int, judge: DigitJudge) -> dict:
    run = root / f"{model.rsplit('-', 1)[1]}-{'begun' if begun else 'scratch'}-{epochs}"
    if not (run / "result.json").exists():
        text = ["--data_path", str(root / "data"), "--llm_model_name", str(root / "llm"), "--max_text_len", "16"]
        start = ["--init_from", str(root / "class-run")] if begun else ["--resume", str(run)]
        main_jit("--model", model, *COMMON, *text, *start, "--output_dir", str(run), "--epochs", str(epochs), "--save_last_freq", str(epochs))
        found = judge(draw(run, "--resume", str(run), "--device", "cpu"))
        half = sum(pair in HELD_OUT for pair in PAIRS)
        result = {"unseen": shares_right(found[:half], PAIRS[:half])[2], "seen": shares_right(found[half:], PAIRS[half:])[2]}
        (run / "result.json").write_text(json.dumps(result))
    return json.loads((run / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, language model and runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    make_all(args.out)
    classes, judge = args.out / "class-run", DigitJudge(SIZE)
    main_jit("--model", "JiT-Nano/8", "--class_num", "10", *COMMON, "--data_path", str(args.out / "classes"), "--output_dir", str(classes),
             "--resume", str(classes), "--epochs", "7", "--no-hflip")  # fmt: skip
    print("| model | steps | begins with | unseen pairs right | seen pairs right |\n|---|---|---|---|---|")
    for model in TRIALS:
        for begun, epochs in TRIALS[model]:
            found = trial(args.out, model, begun, epochs, judge)
            begins = "the class model" if begun else "nothing"
            print(f"| `{model}` | {201 * epochs} | {begins} | {found['unseen']:.1%} | {found['seen']:.1%} |", flush=True)


if __name__ == "__main__":
    main()
