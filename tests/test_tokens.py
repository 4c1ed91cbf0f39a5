"""Runs on the tokens of captions, at toy size, JiT's and MM-JiT's: killed, resumed, over two ranks, drawn, with a store made ahead of time."""

import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, child, ended, in_ranks, load_encoder
from PIL import Image
from test_training import assert_same_training, flags, moved, run, weights

import cache_text
import engine_jit
import prepare
import text_features
from conditioning import Conditioning
from config import TextConfig, TextSource
from flags import parse, parse_cache
from sampling import load_painter
from text_encoder import LanguageModel
from util.errors import UserError

PROMPTS = ["赤い三", "夕焼けの海辺を走る柴犬", "富士山と桜"]
MODELS = ["JiT-Pico/8-Tokens", "MMJiT-Pico/8"]


@pytest.fixture(params=MODELS)
def argv(request, text_data, llm_folder):
    """argv(out, ...) -> flags of a run."""
    llm = llm_folder()  # here, or every forked process would make its own
    return lambda out, *more: flags(text_data, llm, out, "--model", request.param, "--max_text_len", 24, *more)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_and_resumed_equals_uninterrupted(argv, text_data, tmp_path, monkeypatch):
    def common(out):
        return argv(out, "--batch_size", 2, "--epochs", 2, "--save_freq_steps", 1, "--resume", out)

    def killed(after):
        steps, take = iter(range(1, 100)), engine_jit.take_step

        def deadly(*rest):
            if next(steps) > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return take(*rest)

        monkeypatch.setattr(engine_jit, "take_step", deadly)
        run(*common(tmp_path / "parts"))

    run(*common(tmp_path / "whole"))
    store = contents(text_data / "text_cache_tokens")
    for after in (2, 3):  # within the first epoch, and within another
        assert ended(child(lambda after=after: killed(after))) == -signal.SIGKILL
    assert 0 < weights(tmp_path / "parts")["step"] < 8
    run(*common(tmp_path / "parts"))
    whole = weights(tmp_path / "whole")
    assert whole["step"] == 8 and moved(whole) > 1e-4
    assert_same_training(whole, weights(tmp_path / "parts"))
    assert contents(text_data / "text_cache_tokens") == store


def test_two_ranks_equal_one_process_with_the_double_batch(argv, tmp_path):
    run(*argv(tmp_path / "one", "--batch_size", 4, "--epochs", 2))
    for cache in ("disk", "memory"):
        two = argv(tmp_path / cache, "--batch_size", 2, "--epochs", 2, "--text_cache", cache)
        in_ranks(2, lambda two=two: run(*two))
        assert_same_training(weights(tmp_path / "one"), weights(tmp_path / cache), exact=False)
    assert moved(weights(tmp_path / "one")) > 1e-4


def test_wherever_the_tokens_come_from_the_training_is_the_same(argv, tmp_path):
    common = ["--batch_size", 4, "--epochs", 2]
    for cache in ("disk", "memory", "off"):
        run(*argv(tmp_path / cache, *common, "--text_cache", cache))
    run(*argv(tmp_path / "workers", *common, "--num_workers", 1))
    disk, off = weights(tmp_path / "disk"), weights(tmp_path / "off")
    assert moved(disk) > 1e-4
    for name in ("memory", "workers"):
        assert_same_training(disk, weights(tmp_path / name))
    for name, value in disk["model"].items():
        assert (value - off["model"][name]).abs().mean() < 0.05 * 1e-3 * disk["step"], name  # Adam's steps are lr long, whatever the gradient


def test_what_is_trained_is_drawn_from_the_checkpoint_alone(argv, text_data, tmp_path):
    out = tmp_path / "out"
    training = ["--batch_size", 8, "--epochs", 30, "--lr", "3e-3", "--ema_decay1", "0.5", "--online_eval", "--eval_freq", 30]
    run(*argv(out, *training, "--cfg", "2", "--interval_min", "0.1"))
    run("--generate", "--resume", str(out), "--device", "cpu", *(part for prompt in PROMPTS for part in ("--prompt", prompt)))
    drawn = np.stack([np.asarray(Image.open(out / "samples" / f"{i:04d}.png")).transpose(2, 0, 1) for i in range(3)]).astype(int)
    painter = load_painter(out, device="cpu")
    pictures = painter(PROMPTS)
    assert np.abs(pictures.numpy() - drawn).max() <= 1 and drawn.std() > 10
    assert (painter(PROMPTS[1:], first=1).int() - pictures[1:].int()).abs().max() <= 1
    assert (painter(PROMPTS[:1] * 3).int() - pictures.int())[1:].abs().max() > 20  # a picture tells its prompt
    assert painter([]).shape == (0, 3, 16, 16)
    run("--evaluate_gen", "--resume", str(out), "--device", "cpu", "--num_images", "4", "--save_images", "--output_dir", str(tmp_path / "evaluated"))
    assert not (text_data / "text_cache").exists()


def test_a_store_made_ahead_of_time_is_complete_and_the_pooled_one_beside_it_left_alone(argv, text_data, llm_folder, tmp_path, monkeypatch, capsys):
    run(*flags(text_data, llm_folder(), tmp_path / "pooled", "--batch_size", 8, "--epochs", 1))
    pooled = contents(text_data / "text_cache")
    common = argv(tmp_path / "out", "--batch_size", 8, "--epochs", 1)
    cache_text.build(parse_cache(common))
    tokens = contents(text_data / "text_cache_tokens")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "load", lambda *args: pytest.fail("loaded"))
        run(*common)
    assert "holds 17 of 17 texts; the LLM is not loaded" in capsys.readouterr().out  # six captions, ten test prompts, the empty one
    assert contents(text_data / "text_cache_tokens") == tokens and contents(text_data / "text_cache") == pooled and len(tokens) == 2
    assert weights(tmp_path / "out")["text"]["pooling"] == "tokens" and weights(tmp_path / "pooled")["text"]["pooling"] == "mean"


def test_a_store_made_ahead_of_time_holds_prompts_and_what_evaluations_will_draw(argv, text_data, tmp_path, capsys):
    (tmp_path / "asked.txt").write_text("緑の星\n青い山\n", encoding="utf-8")
    common = argv(tmp_path / "out", "--online_eval", "--eval_captions", tmp_path / "asked.txt")
    for more, count in (([], 6 + 10 + 2 + 1), (["--prompt", "白い馬"], 6 + 1 + 2 + 1)):
        cache_text.build(parse_cache([*common, *more]))
        assert f"of {count} texts" in capsys.readouterr().out
    with pytest.raises(UserError, match="--prompt and --prompts_file: give one of them"):
        parse_cache([*common, "--prompt", "x", "--prompts_file", "x.txt"])


def test_a_checkpoint_of_pooled_text_and_one_of_tokens_are_not_taken_for_each_other(argv, text_data, llm_folder, tmp_path):
    run(*flags(text_data, llm_folder(), tmp_path / "pooled", "--batch_size", 8, "--epochs", 1))
    with pytest.raises(UserError, match=r"--model is \S+, but .* was trained with JiT-Pico/8-Text"):
        run(*argv(tmp_path / "out", "--batch_size", 8, "--epochs", 1, "--resume", tmp_path / "pooled"))


@pytest.mark.parametrize("flag", ["--attn_dropout", "--proj_dropout"])
def test_dropout_with_mm_jit_is_an_error_in_one_line(flag):
    with pytest.raises(UserError, match="have no effect on --model MMJiT-Pico/8: MM-JiT has no dropout") as error:
        parse(["--model", "MMJiT-Pico/8", "--img_size", "16", "--data_path", "x", flag, "0.1"])
    assert "\n" not in str(error.value)


def test_mm_jit_reads_256_tokens_of_a_caption_and_jit_77_unless_told_otherwise():
    for name, more, length in [("MMJiT-B/16", [], 256), ("JiT-B/16-Tokens", [], 77), ("MMJiT-B/16", ["--max_text_len", "99"], 99)]:
        text = parse(["--model", name, "--data_path", "x", *more]).text.encoder
        assert (text.max_text_len, text.pooling) == (length, "tokens")


def test_batches_that_shared_memory_cannot_hold_are_called_out(monkeypatch, capsys):
    job = parse(["--model", "JiT-Pico/8-Tokens", "--img_size", "16", "--batch_size", "8", "--num_workers", "1"])
    conditions = Conditioning(SimpleNamespace(in_loader=True), torch.zeros(0), bytes_each=10_000)
    takes = 2 * 8 * (3 * 16 * 16 + 10_000)  # two batches are on their way
    for free, warned in ((takes, False), (takes - 1, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        prepare.check_shared_memory(job, conditions)
        said = capsys.readouterr().out
        assert ("warning: the 2 batches that the loader keeps ready need 0.0 GB" in said and "docker run --shm-size" in said) is warned


def test_a_store_of_tokens_says_its_size_first(llm_folder, tmp_path, monkeypatch, capsys):
    texts = text_features.Texts(CAPTIONS, np.arange(len(CAPTIONS)))
    lengths = [len(ids) for ids in load_encoder(llm_folder(), pooling="tokens").token_ids([*CAPTIONS, ""])]
    needed = round(sum(lengths) * 2 * 32 + 25 * len(lengths))
    source = TextSource(TextConfig(str(llm_folder()), 40, "last", "tokens"), "disk", str(tmp_path / "store"), "none")
    for free, words in ((2 * needed + 2, "text cache"), (needed + 1, "warning: text cache"), (needed - 1, None)):
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        if words is None:
            with pytest.raises(UserError, match=r"--text_cache off.*smaller --llm_model_name.*shorter --max_text_len"):
                text_features.prepare(replace(source, folder=str(tmp_path / "other")), texts, {}, torch.device("cpu"))
            continue
        text_features.prepare(source, texts, {}, torch.device("cpu"))
        assert f"\n{words} {tmp_path / 'store'}: the features of {len(lengths)} captions take" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "store")
