"""The page of a model on the hub: README.md from the checkpoint, with what only its author knows left to fill in, and the figures of its evaluations."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

import lora
from config import ExportJob
from evaluation.records import TITLES
from resume import Saved, look_up
from util.checkpoint import PAINTER
from util.hub import reader_of

RESULTS = ".eval_results"
OPEN = "(fill in)"
ENGLISH = "flan-t5"  # in the names of MiniT2I's language model and its kind, which read no Japanese


def write(folder: Path, job: ExportJob, saved: Saved, checkpoint: Path) -> None:
    """README.md and .eval_results/ into the folder that is exported."""
    records = records_of(job, saved, checkpoint)
    (folder / "README.md").write_text(page(job, saved, records), encoding="utf-8")
    for name, record in records.items():
        (folder / RESULTS).mkdir(exist_ok=True)
        (folder / RESULTS / f"{name}.yaml").write_text(yaml.safe_dump(entries(record, data_of(saved)), allow_unicode=True, sort_keys=False), encoding="utf-8")


def records_of(job: ExportJob, saved: Saved, checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Those of eval/*.json, beside the checkpoint or the adapters, that are of these weights."""
    adapters = lora.describe(job.lora, job.lora_scale) if job.lora else None
    found, these = {}, (job.weights, saved.progress.step or None, adapters)  # a published file says no step
    for path in sorted((Path(job.lora or checkpoint.parent) / "eval").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        setting = record.get("setting", {})
        of = setting.get("weights", {})
        if record.get("figures") and (of.get("which"), of.get("step"), setting.get("lora")) == these:
            found[path.stem] = record
    return found


def entries(record: dict[str, Any], data: str) -> list[dict[str, Any]]:
    """As the hub's .eval_results files have them."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    setting = record["setting"]
    notes = f"{setting['pictures']} pictures of {setting['img_size']} pixels, cfg {setting['sampling']['cfg_scale']:g}, {setting['sampling']['method']} {setting['sampling']['steps']}"
    date = datetime.now(timezone.utc).date().isoformat()
    return eval_result_entries_to_yaml(
        [EvalResultEntry(dataset_id=data, task_id=TITLES.get(name, name), value=value, date=date, notes=notes) for name, value in record["figures"].items()]
    )


def data_of(saved: Saved) -> str:
    """The name of what it was trained on, without the folders of the machine."""
    return Path(look_up(saved.job, "data.path") or OPEN).name


def facts_of(job: ExportJob, saved: Saved) -> dict[str, str]:
    """The card's table."""
    model, text, world, step = saved.job["model"], saved.text, saved.world, saved.progress.step or 0
    lr = look_up(saved.job, "train.lr")
    tokens = f"frozen; layer {text['layer']}, {text['max_text_len']} tokens at most" if text else ""
    return {
        "model": model["name"],
        "pictures": f"{model['img_size']} x {model['img_size']}",
        "reads": f"captions{'' if is_japanese(text) else f' in {OPEN}'}, read by {reader_of(text)} ({tokens})" if text else "class labels",
        "data": f"{data_of(saved)} {OPEN}",
        "steps": f"{step:,}" if step else OPEN,
        "training": f"{step * world.effective_batch:,} pictures seen, batches of {world.effective_batch}" if world else OPEN,
        "learning rate": f"{lr:g}" if lr else OPEN,
        "weights": f"{'raw' if job.weights == 'raw' else f'EMA {job.weights}'}, {job.dtype}"
        + (f", with the adapters {Path(job.lora).resolve().name} x {job.lora_scale:g}" if job.lora else ""),
        "licence": f"{job.licence} {OPEN}",
    }


def is_japanese(text: dict[str, Any]) -> bool:
    """Whether it reads Japanese captions."""
    return bool(text) and ENGLISH not in reader_of(text)


def head_of(job: ExportJob, text: dict[str, Any]) -> dict[str, Any]:
    """What the hub reads, and refuses where a language is none."""
    task = "text-to-image" if text else "unconditional-image-generation"
    head = {"license": job.licence, "library_name": "diffusers" if job.diffusers else "jit-t2i", "pipeline_tag": task, "tags": ["jit", "pixel-space"]}
    return head | ({"language": ["ja"]} if is_japanese(text) else {}) | base_of(text)


def base_of(text: dict[str, Any]) -> dict[str, list[str]]:
    """The language model, if it is one of the hub."""
    return {"base_model": [reader_of(text)]} if text and "/" in reader_of(text) else {}


def page(job: ExportJob, saved: Saved, records: dict[str, dict[str, Any]]) -> str:
    lines = ["---", yaml.safe_dump(head_of(job, saved.text), allow_unicode=True, sort_keys=False).strip(), "---", "", f"# {saved.job['model']['name']}", ""]
    lines += ["Trained with JiT-T2I: a plain Transformer that predicts the clean picture from its noise, in pixels, after JiT (arXiv:2511.13720).", ""]
    lines += [
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts_of(job, saved).items()),
        "",
        "## Draw",
        "",
        "```python",
        *example(job, saved.text),
        "```",
        "",
    ]
    if records:
        lines += ["## Figures", "", "| figure | value | of |", "|---|---|---|"]
        lines += [f"| {TITLES.get(figure, figure)} | {value:.4g} | {name} |" for name, record in records.items() for figure, value in record["figures"].items()]
        lines += [""]
    lines += ["## What it was trained on, and what it should not be used for", "", OPEN, ""]
    return "\n".join(lines)


def example(job: ExportJob, text: dict[str, Any]) -> list[str]:
    prompt = '"夕焼けの海辺を走る柴犬"' if is_japanese(text) else '"a red cube on a blue sphere"' if text else "0"
    if job.diffusers:
        return [
            "from diffusers import DiffusionPipeline", "",
            f'pipe = DiffusionPipeline.from_pretrained("{job.push or Path(job.out).name}", trust_remote_code=True)  # runs the code in {PAINTER}/',
            f'pipe({prompt}).images[0].save("picture.png")',
        ]  # fmt: skip
    return [
        "from datasets.transforms import to_image  # in a checkout of JiT-T2I",
        "from sampling import load_painter", "",
        f'painter = load_painter("{Path(job.out).name}")',
        f'to_image(painter([{prompt}])[0]).save("picture.png")',
    ]  # fmt: skip
