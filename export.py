"""A trained model as others take it: `python export.py --resume output/b16 --out export/b16`, and `--diffusers` for a folder that diffusers opens."""

from collections.abc import Sequence

import flags
from util.errors import UserError, one_line, told_in_one_line

if __name__ == "__main__":
    with told_in_one_line():
        flags.parse_export()  # before torch is imported

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import resume
from config import ExportJob
from exported import TEXT_ENCODER, write
from exporting import card, package
from sampling import load_painter
from util import checkpoint, hub
from util.logging import say
from util.sharding import whole

OF_TEXT_ENCODER = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.py", "*.md", "LICENSE*", "NOTICE*"]  # of its repository on the hub


def export(job: ExportJob) -> Path:
    """Returns: the folder.  Raises: UserError where it cannot be made."""
    out, path = Path(job.out).resolve(), checkpoint.find(job.resume)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there already; name a new folder, or empty it")
    saved = resume.read_whole(path)
    saved.check_which((job.weights,) if job.weights else ())
    job = replace(job, weights=job.weights or saved.alone or (saved.best_which if job.lora else resume.look_up(saved.job, "drawing.weights")) or "1")
    if "model" not in saved.job:
        raise UserError(f"--resume {path} does not say which model it is; wanted a checkpoint of this code")
    text, llm = dict(saved.text), job.llm or saved.text.get("llm", "")
    if text and hub.is_local(text["revision"]) and not job.with_text_encoder:
        raise UserError(f"the language model is the local folder {llm}, which others do not have; copy it along by --with_text_encoder")
    weights = saved.weights if job.weights == "raw" else saved.averages[int(job.weights) - 1]
    if weights is None:
        raise UserError(f"--resume {path} has no EMA {job.weights}; try --eval_ema raw")
    if job.lora:
        weights = merged(job)
    building = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(building, ignore_errors=True)
        model = building / checkpoint.PAINTER / checkpoint.IN_PAINTER if job.diffusers else building
        model.mkdir(parents=True)
        if text and job.with_text_encoder:
            text = text | bring_along(llm, text, model / TEXT_ENCODER)
        facts = {"job": drawn_with(saved.job, text), "step": saved.progress.step, "weights": job.weights}
        write(model, {name: whole(value) for name, value in weights.items()}, text, facts, job.dtype)
        if job.diffusers:
            package.add_code(building)
        card.write(building, job, saved, path)
        if out.is_dir():
            out.rmdir()
        building.rename(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({one_line(error)})") from error
    finally:
        saved.close()
        shutil.rmtree(building, ignore_errors=True)
    return out


def merged(job: ExportJob) -> dict[str, Tensor]:
    """The weights that go out, with adapters in them.  Raises: UserError where they do not fit."""
    painter = load_painter(job.resume, job.weights, "cpu")
    painter.add_lora(job.lora, job.lora_scale)
    with painter.weights.drawing(job.weights):
        return checkpoint.with_prefix({name: value.clone() for name, value in painter.weights.net.state_dict().items()})


def drawn_with(job: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """What drawing takes of a run's configs; no folders of this machine."""
    found = {section: job[section] for section in ("model", "diffusion", "averages", "drawing") if section in job}
    run = {"seed": 0} | job.get("run", {})
    found["run"] = {name: run[name] for name in ("seed", "precision") if name in run}
    if text:
        source = job["text"]
        found["text"] = {"encoder": source["encoder"] | {"llm": text["llm"]}, "norm": source["norm"]}
    return found


def bring_along(llm: str, text: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Copy the language model.  Returns: what identifies the copy, and what it is one of.  Raises: UserError where it is another than the checkpoint's."""
    if hub.is_local(text["revision"]) or Path(llm).is_dir():
        if not Path(llm).is_dir():
            raise UserError(f"the language model's folder {llm} is not there any more; say where it is by --llm_model_name")
        if hub.is_local(text["revision"]) and hub.revision_of(llm) != text["revision"]:
            raise UserError(f"--llm_model_name {llm} holds other weights than those that the model was trained with")
        source = llm
    else:
        from huggingface_hub import snapshot_download

        with hub.in_one_line("--llm_model_name", llm):
            source = snapshot_download(llm, revision=text["revision"] or None, allow_patterns=OF_TEXT_ENCODER)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".*"))
    named = {"llm": hub.reader_of(text), "revision": hub.named_of(text)["revision"]}
    return {"llm": TEXT_ENCODER, "revision": hub.revision_of(str(folder)), "named": named}


def push(folder: Path, repository: str) -> str:
    """Upload to the hub, with the token of `hf auth login`.  Returns: its address.  Raises: UserError where that fails."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with export.py")
    except Exception as error:  # no network, no token, no right: each its own exception
        raise UserError(f"--push {repository}: {one_line(error, 300)}; the export in {folder} is complete, only the upload failed") from error
    return f"https://huggingface.co/{repository}"


def main(argv: Sequence[str] | None = None) -> None:
    with told_in_one_line():
        job = flags.parse_export(argv)
        folder = export(job)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        say(f"{folder}: {size:.1f} MB; complete the places marked (fill in) in README.md")
        if job.push:
            say(f"uploaded to {push(folder, job.push)}")


if __name__ == "__main__":
    main()
