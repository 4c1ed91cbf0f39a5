"""A painter out of a checkpoint alone, as in the README's notebook."""

import re
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, in_ranks
from PIL import Image
from test_training import flags, run

from config import DiffusionConfig, SamplerConfig
from sampling import Painter, load_painter
from text_encoder import LanguageModel
from util import checkpoint
from util import distributed as dist
from util.errors import UserError

PROMPTS = ["赤い三", "夕焼けの海辺を走る柴犬", "富士山と桜"]


@pytest.fixture
def trained(text_data, llm_folder, tmp_path):
    run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 8, "--epochs", 12, "--lr", "1e-2", "--cfg", "2", "--interval_min", "0.1"))
    return tmp_path / "out"


def test_a_painter_draws_what_generate_draws(trained, llm_folder, tmp_path, monkeypatch):
    loads, load = [], LanguageModel.load
    monkeypatch.setattr(LanguageModel, "load", lambda *rest: loads.append(1) or load(*rest))
    painter = load_painter(trained, device="cpu")
    assert not loads  # the language model is loaded at the first use
    pictures = painter(PROMPTS)
    painter(PROMPTS[:1])
    assert len(loads) == 1 and pictures.shape == (3, 3, 16, 16) and pictures.dtype == torch.uint8
    run("--generate", "--resume", str(trained), "--device", "cpu", *(part for prompt in PROMPTS for part in ("--prompt", prompt)))
    drawn = [np.asarray(Image.open(trained / "samples" / f"{i:04d}.png")).transpose(2, 0, 1) for i in range(3)]
    assert np.abs(pictures.numpy().astype(int) - np.stack(drawn)).max() <= 1 and pictures.float().std() > 10

    assert torch.equal(painter(PROMPTS[0]), painter(PROMPTS[:1]))  # a string is one prompt
    run("--generate", "--resume", str(trained), "--device", "cpu", "--prompt", PROMPTS[0])
    assert [path.name for path in sorted((trained / "samples").glob("*.png"))] == ["0000.png", "sheet.png"]  # of the call before nothing is left
    again = painter(PROMPTS[1:], first=1)  # numbers, not places, decide
    assert (again.int() - pictures[1:].int()).abs().max() <= 1
    assert (painter(PROMPTS, seed=1).int() - pictures.int()).abs().max() > 20
    assert (painter(PROMPTS, SamplerConfig("euler", 1)).int() - pictures.int()).abs().max() > 1
    assert (load_painter(trained, weights="raw", device="cpu")(PROMPTS).int() - pictures.int()).abs().max() > 0
    assert painter([]).shape == (0, 3, 16, 16)
    moved = tmp_path / "moved"
    shutil.copytree(llm_folder(), moved)
    assert torch.equal(load_painter(trained, device="cpu", llm=str(moved))(PROMPTS), pictures)


@pytest.mark.parametrize(("which", "name"), [("1", "model_ema1"), ("2", "model_ema2"), ("raw", "model")])
def test_a_painter_holds_the_weights_that_it_draws_with_and_no_others(trained, which, name):
    painter, wanted = load_painter(trained, weights=which, device="cpu"), checkpoint.load(trained / checkpoint.LAST)[name]
    with painter.weights.drawing(which):
        for parameter, value in painter.weights.net.named_parameters():
            assert torch.equal(value, wanted[checkpoint.PREFIX + parameter]), parameter
    assert not any(ema.average for ema in painter.weights.emas)
    with pytest.raises(ValueError, match=f"were not read, only {which}"), painter.weights.drawing("2" if which == "1" else "1"):
        pass


def test_a_prompt_that_is_cut_is_told(trained, capsys):
    long = "夕焼けの海辺を走る柴犬" * 60
    run("--generate", "--resume", str(trained), "--device", "cpu", "--prompt", long, "--prompt", "赤い三")
    found = re.search(r"warning: 1 of 2 prompts are cut at --max_text_len (\d+); the longest has (\d+) tokens", capsys.readouterr().out)
    assert int(found[1]) < int(found[2])
    load_painter(trained, device="cpu")([long])
    assert "warning: 1 of 1 prompts are cut" in capsys.readouterr().out
    load_painter(trained, device="cpu")(["赤い三"])
    assert "cut" not in capsys.readouterr().out


def test_each_rank_may_draw_prompts_of_its_own(trained):
    whole = load_painter(trained, device="cpu")(PROMPTS)

    def draw():
        painter, mine = load_painter(trained, device="cpu"), PROMPTS[dist.rank() :]
        pictures = [painter(mine, first=dist.rank()) for _ in range(1 + dist.rank())]  # the second rank once more, alone
        assert (pictures[-1].int() - whole[dist.rank() :].int()).abs().max() <= 1

    in_ranks(2, draw)


def test_a_painter_of_classes_takes_labels(class_data, tmp_path):
    common = ["--model", "JiT-Pico/8", "--img_size", "16", "--class_num", "3", "--device", "cpu", "--num_workers", "0", "--batch_size", "4"]
    run(*common, "--data_path", str(class_data), "--output_dir", str(tmp_path), "--epochs", "1", "--num_sampling_steps", "2")
    painter = load_painter(tmp_path / "checkpoint-last.pth", device="cpu")
    assert painter([0, 2]).shape == (2, 3, 16, 16) and painter([]).shape == (0, 3, 16, 16)
    with pytest.raises(UserError, match="label numbers from 0 to 2"):
        painter([3])


def test_a_checkpoint_or_a_setting_that_is_none_is_one_line(trained, tmp_path):
    for attempt, message in [
        (lambda: load_painter(tmp_path / "nothing"), "no such file or folder"),
        (lambda: load_painter(trained, weights="3"), "--eval_ema 3: wanted one of 1, 2, raw"),
        (lambda: SamplerConfig(steps=0), "--num_sampling_steps 0 must be at least 1"),
        (lambda: SamplerConfig("rk4"), "--sampling_method rk4: wanted one of heun, euler, ab2, dpmpp2m"),
    ]:
        with pytest.raises(UserError, match=message):
            attempt()


@pytest.mark.parametrize("name", ["README.md", "README_ja.md"])
def test_the_readmes_notebook_runs(name, trained, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)
    assert len(code.strip().splitlines()) <= 10 and '"output/b16"' in code
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code.replace('"output/b16"', repr(str(trained))), found)
    assert found["pictures"].shape == (2, 3, 16, 16) and found["more"].shape == (1, 3, 16, 16) and (tmp_path / "shiba.png").is_file()


def test_a_notebooks_painter_draws_as_many_as_memory_holds(trained, monkeypatch):
    painter, prompts = load_painter(trained, device="cpu"), ["赤い1", "青い2", "緑の3"]
    whole, net = painter(prompts), painter.weights.net
    forward = net.forward

    def small(z, *more):
        if len(z) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(z, *more)

    monkeypatch.setattr(net, "forward", small)
    few = painter(prompts)
    assert (few.int() - whole.int()).abs().max() <= 1 and painter.room.pictures == 1
    painter(prompts)
    assert painter.room.pictures == 1  # it is remembered


def test_auto_batches_shrink_to_what_memory_holds_and_draw_the_same(capsys):
    """A network that a card has room to run for eight pictures at a time, guidance's second branch included."""
    seen = []

    def net(z, t, y):
        seen.append(len(z))
        if len(z) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return z * 0.5 + y.view(-1, 1, 1, 1)

    def painter(batch_size):
        sampler = SamplerConfig(steps=2, cfg_scale=2.0)
        return Painter(net, torch.zeros(1), 4, DiffusionConfig(), sampler, batch_size, torch.device("cpu"))

    def draw(painter):
        return torch.cat([pictures for _, pictures in painter.paint_in_batches(range(11), lambda numbers: torch.tensor(numbers) / 11)])

    auto = painter(None)
    assert torch.equal(draw(auto), draw(painter(3)))
    assert auto.room.pictures == 2 and "5 pictures at a time do not fit" in capsys.readouterr().out  # 11, 5, 2
    seen.clear()
    draw(replace(auto, seed=1))
    assert max(seen) == 4  # and it is remembered
    with pytest.raises(UserError, match="6 pictures at a time do not fit into the GPU's memory; give --gen_bsz auto"):
        draw(painter(6))
    full = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    for batch_size in (None, 1):
        with pytest.raises(UserError, match="not even one picture of 4 pixels fits into what is free of the GPU's memory"):
            draw(replace(painter(batch_size), net=full))
