"""Adapters (LoRA, arXiv:2106.09685) by peft on the attention and MLP matrices of a network whose own weights stay as they are: put on, written, merged.

An adapter's folder is an ordinary one of peft. Its file also holds the hash of the weights that it was trained on.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from util import checkpoint
from util.checkpoint import PREFIX
from util.errors import UserError, need_package, one_line
from util.files import sha256_of, write_whole
from util.logging import say
from util.randomness import derive

TARGETS = r"\w*blocks\.\d+\.(attn\.(qkv|proj)|(img_|txt_)?(qkv|attn_proj|mlp\.w\d+))"  # of JiT and of MM-JiT
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"  # peft's names
OF_PEFT = "base_model.model."  # before a network's own names in its files
NAME = "default"  # peft's name of an adapter


def digest(weights: Mapping[str, Tensor]) -> str:
    """The hash of a network's weights; the fixed table of positions is left out."""
    found = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    return checkpoint.digest({name: value for name, value in found.items() if name != "pos_embed"})


def config_of(rank: int):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)


def add(net: nn.Module, rank: int, seed: int) -> None:
    """Adapters that change nothing yet, and are all that is trained from now on."""
    from peft import inject_adapter_in_model

    torch.manual_seed(derive(seed, "initial adapters", 0))
    inject_adapter_in_model(config_of(rank), net, NAME)


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """peft's folder of a checkpoint that holds adapters: their EMA 1.  Raises: OSError."""
    config_of(state["job"]["train"]["lora_rank"]).save_pretrained(folder)
    tensors = {OF_PEFT + name.removeprefix(PREFIX).replace(f".{NAME}.", "."): value for name, value in state["model_ema1"].items()}
    write_whole(folder / FILE, lambda file: file.write(save(tensors, {"format": "pt", "base": state["base"]})))


def describe(folder: str, scale: float) -> str:
    """What identifies adapters in a record."""
    return f"{sha256_of(Path(folder) / FILE)[:16]} x {scale:g}"


def check_folder(folder: str) -> None:
    """Raises: UserError for what is no folder of peft's LoRA, or holds more than its matrices A and B (DoRA, biases, whole layers)."""
    need_package("peft", "--lora")
    if not (Path(folder) / CONFIG).is_file() or not (Path(folder) / FILE).is_file():
        raise UserError(f"--lora {folder}: wanted a folder with {CONFIG} and {FILE}, as --lora_rank and peft write it")
    if others := [name for name in header(folder)[0] if not {"lora_A", "lora_B"} & set(name.split("."))]:
        raise UserError(f"--lora {folder} holds {others[0]}; wanted only LoRA's matrices (lora_A, lora_B), without DoRA, biases or whole layers")


def compare_base(net: nn.Module, folder: str) -> None:
    """Adapters go with the weights that they were trained on.  Raises: UserError for a file that cannot be read."""
    base = base_of(folder)
    if base and base != digest(checkpoint.state_of(net)):
        say(f"warning: --lora {folder} was trained on other weights than these; the pictures may be poor")


def base_of(folder: str) -> str:
    """The hash of the weights that adapters were trained on; nothing where their file does not say.  Raises: UserError for a file that cannot be read."""
    return header(folder)[1].get("base", "")


def header(folder: str) -> tuple[list[str], dict[str, str]]:
    """The names of the tensors in a file of adapters, and its metadata.  Raises: UserError for a file that cannot be read."""
    try:
        with safe_open(Path(folder) / FILE, "pt") as file:
            return list(file.keys()), file.metadata() or {}
    except Exception as error:  # cut short, no safetensors: safetensors' own exception
        raise UserError(f"--lora {folder}: {FILE} cannot be read ({one_line(error)})") from error


def merge(net: nn.Module, folder: str, scale: float) -> None:
    """W <- W + scale alpha / r B A; a scale of 0 leaves every bit as it is.  Raises: UserError where the adapters are of another network."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils import load_peft_weights

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is missing is an error below
            wrapped = PeftModel.from_pretrained(net, folder, NAME, torch_device="cpu")
        lacking = sorted(set(get_peft_model_state_dict(wrapped, save_embedding_layers=False)) ^ set(load_peft_weights(folder, "cpu")))
        if lacking:
            raise ValueError(f"{lacking[0]} is only in one of the two")
        for layer in wrapped.modules():
            if isinstance(layer, LoraLayer):
                layer.set_scale(NAME, scale)
        wrapped.merge_and_unload()
    except Exception as error:  # another network, a file cut short, adapters of another kind: each its own exception
        for name, layer in [(name, module) for name, module in net.named_modules() if isinstance(module, LoraLayer)]:
            net.set_submodule(name, layer.get_base_layer())
        raise UserError(f"--lora {folder} does not fit the model ({one_line(error)})") from error
