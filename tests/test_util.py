"""EMA, learning rate, checkpoints, figures, sheet."""

import argparse
import io
import math
import os
import pickle
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from resume import TrainState
from util import checkpoint
from util.ema import Ema
from util.errors import UserError
from util.extractors import Extractor, load_clip
from util.logging import say
from util.lr_sched import lr_at
from util.sheet import captioned_sheet, japanese_font, save_sheet, wrap
from util.staging import Staging

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def set_all(net: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(value)
    return net


def test_ema_in_closed_form():
    net = set_all(nn.Linear(2, 2), 1.0)
    ema = Ema(net, 0.9, warmup=False)
    set_all(net, 0.0)
    for n in range(5):
        ema.update(list(net.parameters()), n)
    assert ema.average["weight"][0, 0].item() == pytest.approx(0.9**5)


def test_ema_warm_up_forgets_the_initial_weights():
    net = set_all(nn.Linear(2, 2), 1.0)
    warm, cold = Ema(net, 0.9999), Ema(net, 0.9999, warmup=False)
    assert [warm.decay_at(n) for n in (0, 90, 10**7)] == [0.1, 0.91, 0.9999]
    set_all(net, 0.0)
    for n in range(100):
        warm.update(list(net.parameters()), n)
        cold.update(list(net.parameters()), n)
    assert warm.average["weight"][0, 0] < 1e-9 and cold.average["weight"][0, 0] > 0.98
    expected = math.prod((1 + n) / (10 + n) for n in range(100))
    assert warm.average["weight"][0, 0].item() == pytest.approx(expected, rel=1e-3)


def test_averages_follow_what_is_trained_alone_and_on_after_a_swap():
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    set_all(net, 1.0)
    net[0].requires_grad_(False)
    state = TrainState(net=net, emas=[ema := Ema(net, 0.5, warmup=False)], optimizer=None)
    for n in range(2):
        with ema.applied(net):
            assert net[1].weight.item() == 1 / 2**n
        net[1].weight.data.zero_()
        ema.update(state.trained, n)
    assert list(ema.average) == ["1.weight", "1.bias"] and ema.average["1.weight"].item() == 0.25 and ema.average["1.bias"].item() == 1


def test_ema_swaps_in_and_out_bit_for_bit_and_leaves_buffers():
    net = nn.BatchNorm1d(3)
    ema = Ema(net, 0.5)
    set_all(net, 7.0)
    with ema.applied(net):
        assert net.weight.eq(1).all()
    assert net.weight.eq(7).all() and ema.average["weight"].eq(1).all()
    assert set(ema.state_dict(net)) == set(net.state_dict()) and ema.state_dict(net)["weight"].eq(1).all()


def test_learning_rate():
    assert [lr_at(e, 2.0, 4, 10) for e in (0, 1, 4, 9.9)] == [0, 0.5, 2, 2]
    cosine = [lr_at(e, 2.0, 4, 10, "cosine", 0.5) for e in (2, 4, 7, 10, 11)]
    assert cosine == pytest.approx([1, 2, 1.25, 0.5, 0.5])
    assert lr_at(0, 2.0, 0, 10) == 2


def test_checkpoint_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-last.pth"
    checkpoint.save(path, {"model": {"net.a": torch.ones(2)}, "step": 1})

    def dies(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="space"):
        checkpoint.save(path, {"model": {}, "step": 2})
    assert checkpoint.load(path)["step"] == 1


def awkward(device: str) -> dict:
    """Tensors of every kind among plain data."""
    whole, generator = torch.arange(24, dtype=torch.float64, device=device).view(4, 6), torch.Generator().manual_seed(0)
    kinds = {str(kind): torch.randint(0, 2, (3, 5), generator=generator).to(device, kind) for kind in (torch.bfloat16, torch.int64, torch.bool, torch.uint8)}
    shared = {"whole": whole, "row": whole[1], "column": whole[:, 1], "again": whole}
    strided = {
        "transposed": whole.T,
        "steps": whole[::2, ::3],
        "same": whole[:1].expand(3, 6),
        "channels": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    small = {"empty": torch.empty(0, 3, device=device), "scalar": torch.tensor(3.5, device=device), "param": nn.Parameter(torch.ones(7, device=device))}
    return {"model": kinds | small, "nested": [{"a": [shared, 1, None]}, "word", (1, 2.5)], "strided": strided, "step": 3, "nothing": {}, "none": []}


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for item in items for tensor in tensors_in(item)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_written_state_is_the_state_as_it_was_whatever_its_tensors_are(device, tmp_path):
    state, path = awkward(device), tmp_path / checkpoint.LAST
    expected = [tensor.detach().to("cpu", copy=True) for tensor in tensors_in(state)]
    writer = checkpoint.Writer()
    writer.write(state, path)
    writer.settle()
    with torch.no_grad():
        for tensor in tensors_in({key: value for key, value in state.items() if key != "strided"}):
            tensor.zero_()
    writer.wait()
    loaded = torch.load(path, weights_only=True, mmap=True)
    found = tensors_in(loaded)
    assert [(t.dtype, t.shape, t.stride()) for t in found] == [(t.dtype, t.shape, t.stride()) for t in expected]
    assert all(map(torch.equal, found, expected)) and not any(tensor.requires_grad for tensor in found)
    assert loaded["nested"][0]["a"][1:] == [1, None] and loaded["nested"][1:] == ["word", (1, 2.5)] and (loaded["step"], loaded["none"]) == (3, [])
    assert path.stat().st_size < sum(tensor.nbytes for tensor in expected) + 20_000  # no tensor takes another's storage along


@pytest.mark.parametrize("device", DEVICES)
def test_every_copy_of_a_state_lies_where_the_one_before_lay(device):
    staging, state = Staging(), {"a": torch.arange(1000.0, device=device), "b": [torch.ones(3, 5, dtype=torch.bfloat16, device=device)]}

    def copied():
        copy = staging.copy(state)
        staging.settle()
        staging.wait()
        return copy

    first = copied()
    state["a"].mul_(2)
    assert first["a"][9] == 9
    second = copied()
    assert [tensor.data_ptr() for tensor in tensors_in(first)] == [tensor.data_ptr() for tensor in tensors_in(second)] and second["a"][9] == 18
    assert len(staging.memory) == 4032 + 64  # both, on cache lines
    state["c"] = torch.ones(9, device=device)
    third = copied()
    assert all(map(torch.equal, tensors_in(third), (tensor.cpu() for tensor in tensors_in(state)))) and len(staging.memory) == 4032 + 64 + 64


def test_resume_finds_a_file_a_folder_or_says_what_is_wrong(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    assert checkpoint.find(str(out), str(out)) is None  # new output_dir
    for path in (other, tmp_path / "nothing"):
        with pytest.raises(UserError, match="--resume"):
            checkpoint.find(str(path), str(out))
    (other / "checkpoint-100.pth").write_bytes(b"")
    with pytest.raises(UserError, match="name the file"):
        checkpoint.find(str(other), str(other))
    (other / "checkpoint-last.pth").write_bytes(b"")
    assert checkpoint.find(str(other), str(out)) == other / "checkpoint-last.pth"
    assert checkpoint.find(str(other / "checkpoint-100.pth"), str(out)).name == "checkpoint-100.pth"
    with pytest.raises(UserError, match="not a loadable checkpoint"):
        checkpoint.load(other / "checkpoint-last.pth")


class Bomb:
    went_off = False

    def __reduce__(self):
        return (setattr, (Bomb, "went_off", True))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"model": {}, "args": Bomb()}, path)
    with pytest.raises(UserError, match="not a loadable checkpoint"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="not a loadable checkpoint"):
        checkpoint.load(path)
    assert not Bomb.went_off
    pickle.loads(pickle.dumps(Bomb()))
    assert Bomb.went_off  # it would have


def test_a_published_checkpoint_opens(tmp_path):
    path = tmp_path / "checkpoint-last.pth"
    args = argparse.Namespace(model="JiT-B/16", img_size=256, cfg=2.9)
    torch.save({"model": {"net.a": torch.ones(2)}, "optimizer": {"state": {}, "param_groups": []}, "epoch": 599, "args": args}, path)
    state = checkpoint.load(path)
    assert state["args"] == vars(args) and state["epoch"] == 599
    assert checkpoint.without_prefix(state["model"], {"a": torch.zeros(2)}, "it")["a"].eq(1).all()


def test_weights_that_do_not_fit_are_one_line():
    expected = {"a": torch.zeros(2, 3)}
    for state, message in [
        ({}, "has no a"),
        ({"net.a": torch.zeros(2, 4)}, r"a is \(2, 4\), wanted \(2, 3\)"),
        ({"net.a": torch.zeros(2, 3), "net.b": 1}, "the model has no b"),
    ]:
        with pytest.raises(UserError, match=message):
            checkpoint.without_prefix(state, expected, "file.pth")


def test_optimizer_state_is_matched_by_name():
    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return net, torch.optim.AdamW([{"params": [net[0].bias, net[1].bias]}, {"params": [net[1].weight, net[0].weight]}])

    net, optimizer = trained()
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = checkpoint.optimizer_state(optimizer, net)
    assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    fresh, other = trained()
    assert checkpoint.load_optimizer_state(other, fresh, state)
    for name, param in fresh.named_parameters():
        assert torch.equal(other.state[param]["exp_avg"], state[name]["exp_avg"]), name
    assert not checkpoint.load_optimizer_state(other, fresh, {"state": {}, "param_groups": []})


def test_japanese_captions_show_on_the_sheet():
    assert japanese_font() is not None
    pictures = [Image.new("RGB", (16, 16), "white")] * 3
    one, two = (np.asarray(captioned_sheet(pictures, [text] * 3)[0]) for text in ("猫", "鯨"))
    assert (one < 64).any() and (one != two).any()  # ink, and not the box of a missing glyph


def test_long_captions_are_wrapped():
    from PIL import ImageFont

    font = ImageFont.truetype(japanese_font(), 14)
    text = wrap("夕焼けの海辺を走る柴犬の写真" * 3, font, 128)
    assert text.count("\n") == 1 and text.endswith("…") and all(font.getlength(line) <= 128 for line in text.split("\n"))
    assert wrap("猫", font, 128) == "猫"


def test_without_a_font_captions_go_into_a_text_file(tmp_path, monkeypatch):
    monkeypatch.setattr("util.sheet.japanese_font", lambda: None)
    save_sheet(tmp_path / "sheet.png", [Image.new("RGB", (8, 8))], ["猫の写真"])
    assert (tmp_path / "sheet.txt").read_text(encoding="utf-8") == "猫の写真\n" and (tmp_path / "sheet.png").is_file()


def test_a_line_is_said_whatever_the_names_in_it_are(monkeypatch):
    for encoding, shown in (("utf-8", "写真/\\udcff.png"), ("ascii", "\\u5199\\u771f/\\udcff.png")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))  # strict
        say("写真/\udcff.png")  # a file's name that is not UTF-8, as Python reads it
        assert sys.stdout.buffer.getvalue().decode(encoding) == f"{shown}\n"


def test_evaluation_networks_convolve_in_float32_on_any_device(clip_folder, monkeypatch):
    """cuDNN's convolutions are in TF32 unless that is switched off, and references may be of a CPU."""
    seen = []
    clip = load_clip(str(clip_folder()), torch.device("cpu"))
    features = clip.network.get_image_features
    monkeypatch.setattr(clip.network, "get_image_features", lambda **inputs: seen.append(torch.backends.cudnn.allow_tf32) or features(**inputs))
    assert clip.of_pictures(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).isfinite().all() and seen == [False]
    seen.clear()
    network = lambda pictures: seen.append(torch.backends.cudnn.allow_tf32) or [pictures.flatten(1).float()]  # noqa: E731
    (features,) = Extractor("x", network, torch.device("cpu"))(torch.ones(2, 3, 4, 4, dtype=torch.uint8))
    assert features.shape == (2, 48) and seen == [False] and torch.backends.cudnn.allow_tf32


def test_a_process_that_is_killed_while_it_writes_leaves_the_others_writing():
    def child(work) -> int:
        pid = os.fork()
        if not pid:
            work()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert child(lambda: (tqdm.get_lock().acquire(), os.kill(os.getpid(), signal.SIGKILL))) == -signal.SIGKILL
    assert tqdm.get_lock().acquire(timeout=1)  # by any thread, so it is free
    tqdm.get_lock().release()
    held, end = threading.Event(), threading.Event()

    def hold():
        with tqdm.get_lock():
            held.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert child(lambda: os._exit(0 if tqdm.get_lock().acquire(timeout=1) else 3)) == 0  # forked while another thread writes
    end.set()
    thread.join()
