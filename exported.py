"""Models as others take them: a folder with model.safetensors (one set of weights) and config.json (all that drawing takes).  export.py writes it.

Such a folder draws like a checkpoint; training begins from it by --init_from.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from text_encoder import DTYPES
from util.checkpoint import EXPORTED, WEIGHTS
from util.errors import UserError, one_line

FORMAT = "jit-t2i"
VERSION = 1
TEXT_ENCODER = "text_encoder"  # folder of the language model, where it is brought along
STATISTICS = "text."  # before the names of the features' statistics, beside the network's "net."


def write(folder: Path, weights: Mapping[str, Tensor], text: Mapping[str, Any], facts: Mapping[str, Any], dtype: str) -> None:
    """Args: weights: under `net.`; text: how its features are made, nothing for a class model; facts: plain data besides."""
    tensors = {name: value.to(DTYPES[dtype]).contiguous() for name, value in weights.items()}
    tensors |= {STATISTICS + name: value.contiguous() for name, value in text.items() if isinstance(value, Tensor)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    plain = {name: value for name, value in text.items() if not isinstance(value, Tensor)}
    config = {"format": FORMAT, "version": VERSION, **facts, "dtype": dtype, "text": plain}
    (folder / EXPORTED).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


class Exported(NamedTuple):
    """What such a folder holds."""

    weights: dict[str, Tensor]  # under `net.`, in float32
    job: dict[str, Any]  # the configs, plain
    text: dict[str, Any]  # how its text features are made
    step: int
    which: str  # of a checkpoint's weights they are


def read(folder: Path, flag: str) -> Exported:
    """Raises: UserError where it is no such folder."""
    try:
        config = json.loads((folder / EXPORTED).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:  # cut short, no JSON, no safetensors: each its own exception
        raise UserError(f"{flag} {folder}: the exported model cannot be read ({one_line(error)})") from error
    known = isinstance(config, dict) and config.get("format") == FORMAT and config.get("version") == VERSION
    if not known or not isinstance(config.get("job"), dict) or not isinstance(config.get("text"), dict):
        raise UserError(f"{flag} {folder}: {EXPORTED} does not describe a model of this code; wanted a folder that export.py has written")
    weights = {name: value.float() for name, value in tensors.items() if not name.startswith(STATISTICS)}
    job, text = dict(config["job"]), dict(config["text"])
    text |= {name.removeprefix(STATISTICS): value for name, value in tensors.items() if name.startswith(STATISTICS)}
    if text and (folder / TEXT_ENCODER).is_dir():
        text["llm"] = str(folder / TEXT_ENCODER)
        job["text"] = job["text"] | {"encoder": job["text"]["encoder"] | {"llm": text["llm"]}}
    return Exported(weights, job, text, config.get("step") or 0, config.get("weights", "1"))
