"""Small real models, tokenizers and data sets, built on the spot: nothing here is a stand-in for the loading code."""

import atexit
import io
import os
import shutil
import socket
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a mistyped name fails at once instead of after retries
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")  # a hub cache of the tests' own
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests fork
os.environ["TORCH_HOME"] = os.environ["HF_HOME"]  # and no Inception weights but the tests' own
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from PIL import Image

import config
import models_jit
import models_mmjit
import prepare
from util import distributed as dist
from util.errors import UserError

# What a run costs at toy size is its calls: a size of the tests' own has few blocks (dropout acts in the middle two of four), and the text gap is measured on few pictures.
prepare.GAP_PICTURES = (2, 64)
for family, sizes, numbers in (("JiT", models_jit.SIZES, (64, 4, 2, 16, 2, 4)), ("MMJiT", models_mmjit.SIZES, (64, 2, 2, 2.6667, 16))):
    config.SIZES[family] += ("Pico",)
    sizes["Pico"] = numbers

CAPTIONS = ["赤い三", "夕焼けの海辺を走る柴犬", "a black cat on a chair", "富士山と桜の写真、2024年春", "𠮷野家の牛丼🍚", "ﾊﾝｶｸとＦＵＬＬ"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def save_llm(kind: str, folder: Path) -> Path:
    """A randomly initialised model of two layers and a tokenizer trained on the captions, as a Hugging Face folder."""
    from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, GPT2Config, GPT2LMHeadModel

    from demo.tiny_llm import build_llama, train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=120)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "llama":
        llm = build_llama(tokenizer, width=32, depth=2)
    elif kind == "gpt2":  # like llm-jp-1.3b-v1.0: bos is eos, and nothing is put in front of the text
        tokenizer = byte_tokenizer()
        llm = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128))
    elif kind == "bert":
        llm = BertModel(BertConfig(**size))
    elif kind == "clip":
        llm = CLIPTextModel(CLIPTextConfig(**size, max_position_embeddings=128, eos_token_id=2))
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights of the right shape for torch-fidelity's Inception."""
    from benchmarks.evaluation import random_inception

    return random_inception(tmp_path_factory.mktemp("inception") / "inception.pth")


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<EOD>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<EOD>", eos_token="<EOD>", pad_token="<pad>")


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory):
    """llm_folder(kind) -> path; each kind is made once."""
    made: dict[str, Path] = {}

    def get(kind: str = "llama") -> Path:
        if kind not in made:
            made[kind] = save_llm(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def load_encoder(folder, **config):
    """The encoder of a model folder, on the CPU."""
    from config import TextConfig
    from text_encoder import LanguageModel

    return LanguageModel(TextConfig(str(folder), **{"max_text_len": 40, "layer": "last", **config})).load(torch.device("cpu"))


def write_text_data(root: Path, count: int = 8, size: int = 16) -> Path:
    """Random pictures with the captions above."""
    for name in ("images", "captions"):
        (root / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        (root / "captions" / f"{i}.txt").write_text(CAPTIONS[i % len(CAPTIONS)] + "\n", encoding="utf-8")
    return root


def open_text(path, size: int = 16, hflip: bool = False, seed: int = 0, **data):
    """The captioned pictures at `path`."""
    from config import Data
    from datasets.source import open_captioned
    from datasets.stream import View

    view = View(size, hflip, data.get("crop", "center"))
    return open_captioned(Data(path=str(path), **data), view, seed)


@pytest.fixture
def text_data(tmp_path):
    return write_text_data(tmp_path / "data")


def write_class_data(root: Path) -> Path:
    """Random pictures of three classes."""
    rng = np.random.default_rng(0)
    for name in ("n01", "n02", "n03"):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.JPEG")
    return root


@pytest.fixture
def class_data(tmp_path):
    return write_class_data(tmp_path / "classes")


def child(action) -> int:
    """Run `action` in a forked process.  Returns: its number."""
    if (pid := os.fork()) == 0:
        code = 70
        try:
            sys.stderr = io.StringIO()  # a progress bar
            action()
            code = 0
        except UserError as error:
            print(error, flush=True)
            code = 1
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """Exit code of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start_ranks(world: int, action) -> list[int]:
    """Run `action` in forked processes that are a gloo group.  Returns: their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int):
        def run() -> None:
            os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            dist.init("cpu")
            action()
            dist.shutdown()

        return run

    return [child(rank(number)) for number in range(world)]


def in_ranks(world: int, action) -> None:
    """Run `action` in forked processes that are a gloo group, and wait for them."""
    assert [ended(pid) for pid in start_ranks(world, action)] == [0] * world


def tiny_features(pictures: torch.Tensor) -> list[torch.Tensor]:
    """Fixed features and logits of uint8 pictures, in place of Inception's 2048 and 1008."""
    generator = torch.Generator().manual_seed(0)
    weight, head = torch.randn(3 * 64, 16, generator=generator), torch.randn(16, 10, generator=generator)
    features = torch.tanh(torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 8).flatten(1) @ weight)
    return [features, features @ head]


class Tiny(torch.nn.Module):
    """They, as a network that remembers where it was brought to."""

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def to(self, device):
        self.places.append(str(device))
        return self

    def forward(self, pictures):
        return tiny_features(pictures)


@pytest.fixture
def tiny_extractor():
    from util.extractors import Extractor

    return Extractor("tiny sha256:0", Tiny(), torch.device("cpu", 0))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """clip_folder(kind) -> path of a randomly initialised "siglip" or "clip" and its processor; each is made once."""
    made: dict[str, Path] = {}

    def get(kind: str = "siglip") -> Path:
        if kind not in made:
            made[kind] = save_clip(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def save_clip(kind: str, folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from demo.tiny_clip import build_processor, build_siglip
    from demo.tiny_llm import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=120)
    if kind == "siglip":
        model, processor = build_siglip(len(tokenizer), 16, width=32, depth=1), build_processor(tokenizer, 16)
    else:
        size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 4}
        vision = {**size, "image_size": 16, "patch_size": 8}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        square = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}
        processor = CLIPProcessor(CLIPImageProcessor(**square), tokenizer)
    wake(model, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def wake(net: torch.nn.Module, seed: int = 0, std: float = 0.05) -> torch.nn.Module:
    """Small random values in place of the zeros, so that every layer of a fresh network has a say."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for param in net.parameters():
            param.add_(std * torch.randn_like(param))
    return net
