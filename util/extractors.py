"""Networks that evaluation sees pictures through: torch-fidelity's Inception and VGG16 from a file of weights, DINOv2 and CLIP by transformers."""

import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util import distributed as dist
from util import hub
from util.errors import UserError, one_line
from util.files import sha256_of
from util.logging import say

INCEPTION_WIDTH = 2048
AT_A_TIME = 64  # pictures: Inception's first layers take 11 MB each


def in_float32() -> AbstractContextManager:
    """Inside, cuDNN's convolutions are in float32 as on a CPU, where references may have been made; its default is TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@dataclass(frozen=True)
class Extractor:
    """uint8 pictures (B, 3, H, W) -> float32 features on the CPU, one (B, width) for each layer asked for."""

    identity: str  # the network, and what its weights are
    network: nn.Module  # pictures -> layers
    device: torch.device  # where it computes

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> list[Tensor]:
        with in_float32():
            parts = [[layer.float().cpu() for layer in self.network(part.to(self.device))] for part in pictures.split(AT_A_TIME)]
        return [torch.cat(layer) for layer in zip(*parts)]


@dataclass(frozen=True)
class FidelityNetwork:
    """One of torch-fidelity's networks, and where its weights come from."""

    name: str
    layers: tuple[str, ...]
    flag: str
    used_for: str

    @property
    def url(self) -> str:
        if self.name == "vgg16":
            from torchvision.models import VGG16_Weights

            return VGG16_Weights.IMAGENET1K_V1.url
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        return URL_INCEPTION_V3

    @property
    def place(self) -> Path:
        """Where torch keeps the download."""
        return Path(torch.hub.get_dir(), "checkpoints", os.path.basename(self.url))

    @property
    def hash_prefix(self) -> str:
        """Of the published file's SHA-256; its name carries it."""
        return re.search(r"-([0-9a-f]{8})\.pth$", self.url).group(1)


INCEPTION = FidelityNetwork("inception-v3-compat", ("2048", "logits_unbiased"), "--inception_weights", "FID and IS")
VGG16 = FidelityNetwork("vgg16", ("fc2_relu",), "--vgg16_weights", "precision and recall")


def download(network: FidelityNetwork) -> None:
    """Into torch's cache, whole or not at all; in silence where it cannot be had, and not tried under HF_HUB_OFFLINE."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        network.place.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(network.url, str(network.place), network.hash_prefix, progress=False)
    except (OSError, RuntimeError):  # no network (URLError is an OSError), a wrong hash, no room
        pass
    finally:
        socket.setdefaulttimeout(patience)


def weights_file(network: FidelityNetwork, given: str | None) -> Path | None:
    """The file named by the flag, that in torch's cache, or a download; None where there is none.  Collective.

    Raises: UserError where the flag names no file.
    """
    if given and not os.path.isfile(given):
        raise UserError(f"{network.flag} {given}: no such file")
    if not given and dist.local_rank() == 0 and not network.place.is_file():
        download(network)
    dist.barrier()
    path = Path(given) if given else network.place
    return path if all(dist.gather_objects(path.is_file())) else None


def missing(network: FidelityNetwork) -> str:
    """What to do about weights that are not there."""
    return f"download {network.url} to {network.place}, or name the file by {network.flag}"


def load_fidelity(network: FidelityNetwork, given: str | None, device: torch.device) -> Extractor | None:
    """Collective.  Returns: None where the weights cannot be had.  Raises: UserError where the file holds others, or would run code."""
    from torch_fidelity.utils import create_feature_extractor

    path = weights_file(network, given)
    if path is None:
        return None
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity unpickles freely, so what is in there is seen to first
        module = create_feature_extractor(network.name, list(network.layers), cuda=False, feature_extractor_weights_path=str(path), verbose=False)
    except Exception as error:  # a pickle with code in it, a file cut short, other weights: each its own exception
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{network.flag} {path}: not the weights of {network.name} ({problem}); {missing(network)}") from error
    digest = sha256_of(path)
    if len(set(dist.gather_objects(digest))) > 1:
        raise UserError(f"{network.flag} {path} is not the same file on all nodes")
    if not digest.startswith(network.hash_prefix):
        say(f"warning: {path} is not the published file of {network.name} (SHA-256 {digest[:8]}..., wanted {network.hash_prefix}...); "
            f"{network.used_for} cannot be compared with values measured elsewhere")  # fmt: skip
    return Extractor(f"{network.name} sha256:{digest}", module, device)


def load_model(flag: str, name: str, example: str) -> tuple[nn.Module, str]:
    """A frozen float32 model of transformers, and what identifies it.

    Raises: OSError where it cannot be had, UserError where the name is none or the files are not whole.
    """
    from transformers import AutoModel

    hub.quiet()
    hub.check_name(flag, name, example)
    with hub.in_one_line(flag, name, but=OSError):
        model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    if report["missing_keys"]:
        raise UserError(f"{flag} {name}: {len(report['missing_keys'])} weights are missing from its files, first {min(report['missing_keys'])}")
    called = os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
    return model.eval().requires_grad_(False), f"{model.config.model_type} {called} {hub.revision_of(name)}"


class ClassToken(nn.Module):
    """That of a DINOv2, pictures brought to 224 pixels as in arXiv:2312.02696 (EDM2): bicubic with antialiasing."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, pictures: Tensor) -> tuple[Tensor]:
        resized = F.interpolate(pictures.float(), (224, 224), mode="bicubic", antialias=True)
        return (self.model((resized / 255 - self.mean) / self.std).last_hidden_state[:, 0],)


def load_dinov2(name: str, device: torch.device) -> Extractor:
    """Raises: UserError where it cannot be had."""
    with hub.in_one_line("--fd_dinov2", name):
        model, identity = load_model("--fd_dinov2", name, "facebook/dinov2-large")
    if not model.config.model_type.startswith("dinov2"):
        raise UserError(f"--fd_dinov2 {name} is a {model.config.model_type}; wanted a DINOv2 such as facebook/dinov2-large")
    return Extractor(identity, ClassToken(model), device)


class Clip:
    """A CLIP or SigLIP: features of pictures and of captions, each of length 1, so that their product is the cosine."""

    def __init__(self, model: nn.Module, processor, identity: str, device: torch.device):
        self.network, self.processor, self.identity, self.device = model, processor, identity, device
        self.longest = model.config.get_text_config().max_position_embeddings

    @staticmethod
    def _unit(output) -> Tensor:
        return F.normalize(getattr(output, "pooler_output", output).float(), dim=-1).cpu()

    @torch.inference_mode()
    def of_captions(self, captions: Sequence[str]) -> Tensor:
        """(n, width).  Captions are padded to the model's full length, as SigLIP was trained, and cut there."""
        parts = []
        for start in range(0, len(captions), AT_A_TIME):
            texts = list(captions[start : start + AT_A_TIME])
            tokens = self.processor(text=texts, padding="max_length", truncation=True, max_length=self.longest, return_tensors="pt")
            parts.append(self._unit(self.network.get_text_features(**tokens.to(self.device))))
        return torch.cat(parts)

    @torch.inference_mode()
    def of_pictures(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, width)."""
        parts = []
        for part in pictures.split(AT_A_TIME):
            pixels = self.processor(images=list(part), return_tensors="pt")["pixel_values"]
            with in_float32():
                parts.append(self._unit(self.network.get_image_features(pixel_values=pixels.to(self.device))))
        return torch.cat(parts)


def load_clip(name: str, device: torch.device) -> Clip | None:
    """Collective.  Returns: None where it cannot be had, said in one line.  Raises: UserError where the name is none, or is not a CLIP's."""
    from transformers import AutoProcessor

    clip, problem = None, ""
    try:
        model, identity = load_model("--clip_model", name, "llm-jp/waon-siglip2-base-patch16-256")
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise UserError(f"--clip_model {name} is a {model.config.model_type}; wanted a CLIP or SigLIP")
        with hub.in_one_line("--clip_model", name, but=OSError):
            clip = Clip(model, AutoProcessor.from_pretrained(name, trust_remote_code=False), identity, device)
            with on_device([clip]):  # does all that it will have to
                clip.of_captions([""]) @ clip.of_pictures(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).T
    except OSError as error:
        problem = one_line(error)
    if problems := [found for found in dist.gather_objects(problem) if found]:
        say(f"CLIP score and R-precision are left out: --clip_model {name} cannot be loaded ({problems[0]})")
        return None
    return clip


@contextmanager
def on_device(used: Sequence[Extractor | Clip]) -> Iterator[None]:
    """Inside, their networks are where they compute; outside they are in host memory, and take none from training."""
    for one in used:
        one.network.to(one.device)
    try:
        yield
    finally:
        for one in used:
            one.network.to("cpu")
