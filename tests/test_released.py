"""MiniT2I's folders: a tiny one of the same layout and names, with the T5 that it was trained with, draws, is no run to go on with, and begins one."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import CAPTIONS, wake
from PIL import Image
from safetensors.torch import save_file
from test_training import flags, run

import export
import models_mmjit
from config import Model
from denoiser import SOLVERS, velocity
from flags import parse_export
from page.layout import headline
from sampling import load_painter
from text_encoder import LanguageModel
from text_features import pinned
from util.errors import UserError
from util.randomness import normal
from util.text import Text

UNUSED = ("t_embedder.mlp.0.weight", "pooled_embedder.weight", "double_blocks.5.txt_attn_proj.weight", "double_blocks.5.txt_mlp.w1.weight")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """An encoder and a decoder, as FLAN-T5 is stored."""
    from transformers import T5Config, T5ForConditionalGeneration

    from demo.tiny_llm import train_tokenizer

    torch.manual_seed(0)
    tokenizer, folder = train_tokenizer(CAPTIONS, vocab_size=120), tmp_path_factory.mktemp("t5") / "flan-t5-tiny"
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
    wake(T5ForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def network():
    torch.manual_seed(0)
    return wake(models_mmjit.build_model("MMJiT-Nano/8", input_size=16, text_dim=32))


@pytest.fixture
def release(tmp_path, t5_folder):
    """The numbers of MMJiT-Nano; a prompt of 12 tokens, three steps, and in the files what nothing uses."""
    folder = tmp_path / "minit2i"
    (folder / "transformer").mkdir(parents=True)
    weights = network().state_dict() | {name: torch.ones(2) for name in UNUSED}
    names = sorted(weights)
    for i, part in enumerate((names[::2], names[1::2])):  # in two files
        save_file({f"model.net.{name}": weights[name].contiguous() for name in part}, folder / "transformer" / f"diffusion_pytorch_model-{i}.safetensors")
    said = {"image_size": 16, "patch_size": 8, "in_channels": 3, "txt_input_size": 32, "hidden_size": 128, "txt_hidden_size": 128, "depth_double": 6}
    said |= {"txt_preamble_depth": 2, "num_heads": 4, "head_dim": 32, "mlp_ratio": 2.6666666666666665, "pca_channels": 32, "prompt_length": 12, "n_T": 3}
    said |= {"prediction": "x", "sampler": "euler", "llm": str(t5_folder), "_class_name": "MiniT2IMMJiTModel"}
    (folder / "transformer" / "config.json").write_text(json.dumps(said))
    return folder


@torch.no_grad()
def by_hand(net, t5_folder, captions, steps):
    """Levels (B, H, W, 3) after Euler steps from noise of scale 2 under guidance of 2.5, 1 - t at least 0.05, as F2 says."""
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer, t5 = AutoTokenizer.from_pretrained(t5_folder), T5EncoderModel.from_pretrained(t5_folder)
    tokens = tokenizer(captions, return_tensors="pt", padding="max_length", truncation=True, max_length=12)
    states, mask = t5(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state, tokens.attention_mask.bool()
    z, y, null = 2 * normal(0, "sample", range(len(captions)), (3, 16, 16)), Text(states, mask), Text(states, torch.zeros_like(mask))
    for i in range(steps):
        t = torch.full((len(z),), i / steps)
        cond, uncond = (velocity(net(z, t, text), z, t, 0.05) for text in (y, null))
        z = SOLVERS["euler"](lambda z, t, v=uncond + 2.5 * (cond - uncond): v, z, [i / steps, (i + 1) / steps])
    return ((z.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()


def test_a_release_draws_what_its_recipe_says(release, t5_folder, capsys):
    run(
        "--generate",
        "--resume",
        str(release),
        "--output_dir",
        str(release / "out"),
        "--device",
        "cpu",
        *(part for line in CAPTIONS for part in ("--prompt", line)),
    )
    said = capsys.readouterr().out
    assert "4 tensors that no picture depends on are left out" in said and "cfg 2.5 in 0-1, euler 3" in said
    drawn = np.stack([np.asarray(Image.open(release / "out" / "samples" / f"{i:04d}.png")) for i in range(len(CAPTIONS))])
    wanted = by_hand(network(), t5_folder, CAPTIONS, 3)
    assert np.abs(drawn - wanted).max() <= 1 and drawn.std() > 20
    painter = load_painter(release, device="cpu")
    assert t5_folder.name in headline(painter, release)  # of the page
    exported = export.export(parse_export(["--resume", str(release), "--out", str(release / "exported"), "--with_text_encoder"]))
    _, head, card = (exported / "README.md").read_text().split("---\n", 2)
    assert f"captions in (fill in), read by {t5_folder.name}" in card and 'painter(["a red cube on a blue sphere"])' in card
    assert "language" not in yaml.safe_load(head) and "base_model" not in yaml.safe_load(head)
    assert torch.equal(load_painter(exported, device="cpu")(CAPTIONS), painter(CAPTIONS))
    assert np.abs(painter(CAPTIONS).permute(0, 2, 3, 1).numpy().astype(int) - drawn).max() <= 1


def test_a_releases_steps_near_t_1_are_clamped_as_its_authors_clamp_them(release, t5_folder):
    path = release / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_T": 30}))
    drawn = load_painter(release, device="cpu")(CAPTIONS[:1]).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(drawn - by_hand(network(), t5_folder, CAPTIONS[:1], 30)).max() <= 1


def test_the_language_model_of_a_release_computes_in_float32_on_a_gpu_too(release):
    painter = load_painter(release, device="cpu")
    assert pinned(painter.job.text.encoder, painter.text, {}, torch.device("cuda")).dtype == "fp32"


def test_t5_comes_without_its_decoder(t5_folder):
    from config import TextConfig

    encoder = LanguageModel(TextConfig(str(t5_folder), 12, "last", pooling="tokens")).load(torch.device("cpu"))
    names = {name for name, _ in encoder.llm.named_parameters()}
    assert not any("decoder" in name or "lm_head" in name for name in names) and any("relative_attention_bias" in name for name in names)


def test_a_release_is_no_run_to_go_on_with_but_begins_one(release, text_data, llm_folder, tmp_path, capsys):
    common = [*flags(text_data, llm_folder(), tmp_path / "out", "--model", "MMJiT-Nano/8", "--batch_size", 4, "--epochs", 1)]
    with pytest.raises(UserError, match="is a model for drawing.* give --init_from"):
        run(*common, "--resume", str(release))
    run(*common, "--init_from", str(release))
    assert "made: txt_embedder.weight, mask_token" in capsys.readouterr().out


def test_a_run_with_the_releases_own_language_model_keeps_what_was_learned_of_its_states(release, t5_folder, text_data, tmp_path, capsys):
    own = ["--model", "MMJiT-Nano/8", "--batch_size", 4, "--epochs", 1, "--llm_layer", "last", "--text_norm", "none", "--max_text_len", 12]
    run(*flags(text_data, t5_folder, tmp_path / "out", *own), "--init_from", str(release))
    assert "made" not in capsys.readouterr().out
    copied = (tmp_path / "out" / "init_from.txt").read_text().splitlines()
    assert {"copied   txt_embedder.weight", "copied   mask_token"} <= set(copied)


def test_a_folder_that_is_no_release_is_one_line(release):
    path = release / "transformer" / "config.json"
    said, draw = json.loads(path.read_text()), ["--generate", "--resume", str(release), "--device", "cpu"]
    for content, words in (
        ("{", "the release cannot be read"),
        (json.dumps({}), "has no image_size; wanted a MiniT2I folder"),
        (json.dumps(said | {"hidden_size": 100}), "a width of 100 in 6 blocks is no size of MM-JiT"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            run(*draw)
    path.write_text(json.dumps(said))
    for file in path.parent.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="no .safetensors beside"):
        run(*draw)
    assert Model(f"MMJiT-Nano/{said['patch_size']}", 16).condition == "tokens"
