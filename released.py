"""The folders in which JiT's authors release MM-JiT (MiniT2I): transformer/config.json beside safetensors.  They draw as they are; training begins from them by --init_from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from models_mmjit import SIZES
from util.checkpoint import RELEASED
from util.errors import UserError, one_line
from util.logging import say

CONFIG = Path(RELEASED)
PREFIX = "model."  # before our own "net."
GUIDANCE = {"L": 6.0}  # what the authors draw with; 2.5 for the others
NEEDED = ("image_size", "patch_size", "txt_input_size", "hidden_size", "depth_double", "txt_preamble_depth", "num_heads", "mlp_ratio", "pca_channels")


def read(folder: Path, flag: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Weights under `net.`, the configs that the release implies, plain, and how its text features are made.

    Raises: UserError where it is no MM-JiT of a size that is known here.
    """
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = {name: value for path in sorted((folder / CONFIG).parent.glob("*.safetensors")) for name, value in load_file(path).items()}
    except Exception as error:  # cut short, no JSON, no safetensors: each its own exception
        raise UserError(f"{flag} {folder}: the release cannot be read ({one_line(error)})") from error
    if lacking := [name for name in NEEDED if name not in said]:
        raise UserError(f"{flag} {folder}: {CONFIG} has no {lacking[0]}; wanted a MiniT2I folder")
    if not weights:
        raise UserError(f"{flag} {folder}: no .safetensors beside {CONFIG}; is the download complete?")
    size, length = size_of(said, folder, flag), said.get("prompt_length", 256)
    encoder = {"llm": said.get("llm", "google/flan-t5-large"), "layer": "last", "max_text_len": length, "pooling": "tokens"}
    sampler = {"method": "euler", "steps": said.get("n_T", 100), "cfg_scale": GUIDANCE.get(size, 2.5)}
    job = {
        "model": {"name": f"MMJiT-{size}/{said['patch_size']}", "img_size": said["image_size"]},
        "diffusion": {"noise_scale": 2.0, "t_eps": 0.05},  # in sampling, at every size
        "text": {"encoder": encoder, "norm": "none"},
        "averages": {"warmup": False},
        "drawing": {"sampler": sampler},
    }
    text = {**encoder, "revision": "", "dtype": "fp32", "text_norm": "none", "width": said["txt_input_size"]}  # read in float32; which revision is not said
    return used(weights, said["depth_double"], folder), job, text


def size_of(said: Mapping[str, Any], folder: Path, flag: str) -> str:
    """The name of the size that a configuration is of."""
    numbers = tuple(said[name] for name in ("hidden_size", "depth_double", "num_heads", "mlp_ratio", "pca_channels"))
    for size, known in SIZES.items():
        if said["txt_preamble_depth"] == 2 and all(abs(a - b) < 1e-3 for a, b in zip(numbers, known)):
            return size
    raise UserError(f"{flag} {folder}: a width of {numbers[0]} in {numbers[1]} blocks is no size of MM-JiT; known are {', '.join(SIZES)}")


def used(weights: Mapping[str, Tensor], depth: int, folder: Path) -> dict[str, Tensor]:
    """Without what the files hold and no picture depends on, which is said."""
    last = f"net.double_blocks.{depth - 1}."
    unused = ("net.t_embedder.", "net.pooled_embedder.", f"{last}txt_attn_proj.", f"{last}txt_norm2.", f"{last}txt_mlp.")
    found = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    dropped = [name for name in found if name.startswith(unused)]
    if dropped:
        say(f"{folder}: {len(dropped)} tensors that no picture depends on are left out (the embedders of time and pooled text, the last block's text outputs)")
    return {name: value for name, value in found.items() if name not in dropped}
