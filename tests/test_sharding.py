"""Weights, averages and optimizer shared out among processes; checkpoints that each writes its part of."""

import argparse
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_ranks
from PIL import Image
from safetensors.torch import load_file, save_file
from test_parallel import graphs  # noqa: F401
from test_training import flags, weights
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.staging import StagingOptions

import convert_checkpoint
import export
import main_jit
import resume
from flags import parse, parse_export
from util import checkpoint
from util import distributed as dist
from util.errors import UserError
from util.parts import SECTIONS, flat
from util.parts_writer import PartsWriter, Stager, write_parts
from util.sharding import whole

TOLERANCE = 1e-5  # of weights that are sums in another order; they are about 1


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All of a run's last checkpoint, by path."""
    state = weights(folder)
    return {name: whole(value) for name, value in flat({part: state[part] for part in ("model", "model_ema1", "model_ema2", "optimizer")})}


def assert_alike(one: Path, other: Path, atol: float = TOLERANCE) -> None:
    a, b = tensors(one), tensors(other)
    assert list(a) == list(b) and weights(one)["step"] == weights(other)["step"]
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def train(text_data, llm_folder, tmp_path):
    """train(name, world, *flags): into tmp_path / name, in so many processes, two of them a node; 0 is without torchrun."""

    def run(name: str, world: int, *more) -> Path:
        argv = flags(text_data, llm_folder(), tmp_path / name, *more)

        def work():
            os.environ["LOCAL_WORLD_SIZE"] = "2"
            main_jit.main(argv)

        if world:
            in_ranks(world, work)
        else:
            main_jit.run(parse(argv))
        return tmp_path / name

    return run


@pytest.mark.parametrize(
    ("kind", "world", "more"),
    [
        pytest.param("fsdp", 2, (), marks=pytest.mark.long),
        ("fsdp", 2, ("--accum_iter", 2, "--grad_clip", 0.05, "--grad_checkpointing", "blocks")),
        pytest.param("hsdp", 4, ("--model", "MMJiT-Pico/8", "--text_cache", "off", "--llm_layer", "last"), marks=pytest.mark.long),
    ],
)
def test_a_sharded_run_trains_as_a_whole_one_does(train, kind, world, more):
    common = ["--batch_size", 4 // world, "--epochs", 2, "--log_freq", 1, "--online_eval", "--eval_freq", 1, "--proj_dropout", 0.2, *more]
    if "MMJiT-Pico/8" in more:
        common.remove("--proj_dropout"), common.remove(0.2)
    one, other = train("whole", world, *common), train("sharded", world, *common, "--parallel", kind)
    assert_alike(one, other)
    for mine, yours in zip(pictures(one), pictures(other), strict=True):
        assert np.abs(mine - yours).max() <= 1


def pictures(folder: Path) -> list[np.ndarray]:
    """The test prompts that were drawn within training."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [np.asarray(Image.open(io.BytesIO(image.encoded_image_string)), dtype=int) for image in events.Images("test_prompts")]


@pytest.mark.slow
def test_a_run_goes_on_in_any_number_of_processes_and_either_form(train):
    """Twelve pictures a step in all of them."""

    def more(world, epochs, *rest):
        return ("--batch_size", 12 // max(world, 1), "--epochs", epochs, *rest)

    whole_run = train("whole", 0, *more(0, 4))
    saved = train("saved", 4, *more(4, 2, "--parallel", "fsdp"))
    file = train("file", 0, *more(0, 2))
    for name, world, origin, kind in [
        ("one", 1, saved, "fsdp"),
        ("three", 3, saved, "fsdp"),
        ("nodes", 4, saved, "hsdp"),
        ("plain", 0, saved, "ddp"),
        ("from a file", 2, file, "fsdp"),
    ]:
        out = saved.with_name(name)
        shutil.copytree(origin, out)
        train(name, world, *more(world, 4, "--parallel", kind, "--resume", out))
        assert_alike(whole_run, out)
        in_parts = kind != "ddp"
        assert ("parts" in weights(out)) == in_parts and len([*out.glob("checkpoint-step-*")]) == in_parts


def test_a_step_whose_gradient_is_not_finite_changes_nothing(train, monkeypatch):
    import engine_jit

    take, before = engine_jit.take_step, {}

    def spoilt(state, *rest):
        if state.step == 1:
            state.trained[3].grad *= float("nan")
            before.update({name: value.full_tensor().clone() for name, value in state.net.named_parameters()})
        norm = take(state, *rest)
        if state.step == 2:
            assert all(torch.equal(value.full_tensor(), before[name]) for name, value in state.net.named_parameters()) and not norm.isfinite()
        return norm

    monkeypatch.setattr(engine_jit, "take_step", spoilt)
    out = train("out", 2, "--batch_size", 2, "--epochs", 1, "--parallel", "fsdp")
    assert weights(out)["skips"][0] == 1


@pytest.mark.long
def test_compiled_blocks_are_sharded(train, graphs):  # noqa: F811
    common = ["--batch_size", 2, "--epochs", 2, "--log_freq", 1]
    assert_alike(train("whole", 2, *common), train("sharded", 2, *common, "--parallel", "fsdp", "--compile"))


def test_what_cannot_be_shared_out_is_told(train):
    with pytest.raises(UserError, match="--parallel fsdp shards the weights over several processes; start it with torchrun"):
        train("out", 0, "--parallel", "fsdp")
    with pytest.raises(UserError, match="--lora_rank trains only a few weights"):
        train("out", 0, "--parallel", "fsdp", "--lora_rank", 4, "--init_from", "nowhere")


# --- the folder of parts


def test_a_state_is_staged_without_page_locked_memory_where_that_is_refused(monkeypatch, capsys):
    def refused(address, size):
        raise RuntimeError("Registering memory failed with cudaError: 2.")

    monkeypatch.setattr("torch.cuda._pin_memory_utils.pin_memory", refused)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        stager = Stager(StagingOptions(use_pinned_memory=True, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False))
    for step in (1, 2):
        value = torch.arange(4.0) + step
        assert torch.equal(stager.stage({"a": value})["a"], torch.arange(4.0) + step)
    assert capsys.readouterr().out.count("warning: rank 0: host memory could not be page-locked (Registering memory failed") == 1
    stager.close()


def plain_state(step: int = 3) -> dict:
    g = torch.Generator().manual_seed(step)
    net = {"net.a": torch.randn(5, 2, generator=g), "net.b": torch.randn(3, generator=g)}
    return {
        "model": net,
        "model_ema1": net,
        "model_ema2": net,
        "optimizer": {"a": {"step": torch.tensor(float(step)), "exp_avg": torch.randn(5, 2, generator=g)}},
        "epoch": 0,
        "step": step,
        "job": {},
    }


def test_parts_become_one_file_and_parts_again(tmp_path, capsys):
    state = plain_state()
    checkpoint.save(tmp_path / "a.pth", state)
    convert_checkpoint.main(["--resume", str(tmp_path / "a.pth"), "--out", str(tmp_path / "b.pth"), "--parts"])
    convert_checkpoint.main(["--resume", str(tmp_path / "b.pth"), "--out", str(tmp_path / "c.pth")])
    again = checkpoint.load(tmp_path / "c.pth")
    assert {name: value for name, value in again.items() if name in ("epoch", "step", "job")} == {"epoch": 0, "step": 3, "job": {}} and "parts" not in again
    for name, value in flat({part: state[part] for part in SECTIONS}):
        assert torch.equal(dict(flat(again))[name], value)
    found = {name: torch.zeros_like(value) for name, value in flat({part: state[part] for part in SECTIONS})}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path / "checkpoint-step-3")), no_dist=True)  # others read it too
    assert all(torch.equal(found[name], value) for name, value in flat({part: state[part] for part in SECTIONS}))
    convert_checkpoint.main(["--resume", str(tmp_path / "b.pth"), "--out", str(tmp_path / "d.pth"), "--parts"])
    copied = dict(flat(checkpoint.load(tmp_path / "d.pth")))
    assert all(torch.equal(value, whole(copied[name])) for name, value in flat({part: state[part] for part in SECTIONS}))
    (tmp_path / "other.pth").write_bytes(b"of something else")
    checkpoint.remove_unused_parts(tmp_path)  # as a run that trains in this folder does
    assert checkpoint.load(tmp_path / "b.pth")["step"] == 3
    for argv, message in [
        (["--resume", str(tmp_path / "a.pth"), "--out", str(tmp_path / "b.pth")], "b.pth is there already; wanted a new name"),
        (["--resume", str(tmp_path / "a.pth"), "--out", str(tmp_path / "b")], "wanted a new name that ends in .pth"),
    ]:
        with pytest.raises(SystemExit):
            convert_checkpoint.main(argv)
        assert message in capsys.readouterr().err


def test_a_published_file_opens_in_either_form_as_it_did(tmp_path, capsys):
    """What it says by flags; its optimizer state by position is of no use to anyone."""
    state = {name: value for name, value in plain_state().items() if name not in ("job", "step")}
    by_position = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0, "params": [0]}]}
    args = argparse.Namespace(model="JiT-B/16", img_size=256, class_num=1000, cfg=2.9, interval_min=0.1, interval_max=1.0, data_path="/theirs", seed=7)
    torch.save(state | {"optimizer": by_position, "args": args, "epoch": 4}, tmp_path / "a.pth")
    for argv in (["a.pth", "b.pth", "--parts"], ["a.pth", "c.pth"], ["b.pth", "d.pth"]):
        convert_checkpoint.main(["--resume", str(tmp_path / argv[0]), "--out", str(tmp_path / argv[1]), *argv[2:]])
    assert capsys.readouterr().out.count("optimizer state is not by name") == 2
    theirs = resume.read(tmp_path / "a.pth")
    assert theirs.job["model"]["name"] == "JiT-B/16" and theirs.job["averages"] == {"warmup": False}
    for name in ("b.pth", "c.pth", "d.pth"):
        ours = resume.read(tmp_path / name)
        assert (ours.job, ours.progress, ours.world, ours.text, ours.optimizer) == (theirs.job, theirs.progress, None, {}, {}), name
        for one, other in zip((ours.weights, *ours.averages), (theirs.weights, *theirs.averages)):
            assert one.keys() == other.keys() and all(torch.equal(whole(value), other[key]) for key, value in one.items())


def test_a_run_may_save_while_its_checkpoint_is_read(tmp_path, monkeypatch):
    write_parts(plain_state(3), tmp_path / checkpoint.LAST)
    read = checkpoint.read_parts

    def late(path, state):
        monkeypatch.setattr(checkpoint, "read_parts", read)
        write_parts(plain_state(4), path)
        shutil.rmtree(tmp_path / "checkpoint-step-3")
        return read(path, state)

    monkeypatch.setattr(checkpoint, "read_parts", late)
    assert checkpoint.load(tmp_path / checkpoint.LAST)["step"] == 4


def test_a_checkpoint_in_parts_draws_exports_and_begins_other_runs_as_the_file_does(train, tmp_path):
    out = train("file", 0, "--batch_size", 4, "--epochs", 1)
    (tmp_path / "parts").mkdir()
    convert_checkpoint.main(["--resume", str(out), "--out", str(tmp_path / "parts" / checkpoint.LAST), "--parts"])
    found = {}
    for folder in (out, tmp_path / "parts"):
        main_jit.run(parse(["--generate", "--resume", str(folder), "--device", "cpu", "--prompt", "赤い三"]))
        export.export(parse_export(["--resume", str(folder), "--out", str(folder / "exported"), "--with_text_encoder"]))
        begun = train(f"from {folder.name}", 0, "--batch_size", 4, "--epochs", 1, "--init_from", folder)
        found[folder] = [(folder / "samples" / "0000.png").read_bytes(), (folder / "exported" / "model.safetensors").read_bytes(), tensors(begun)]
    (a, b, c), (d, e, f) = found.values()
    assert a == d and b == e and all(torch.equal(value, f[name]) for name, value in c.items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def grow(path: Path) -> None:
    cut_off = load_file(path)
    save_file(
        {**cut_off, "model/net.a": torch.zeros(9, 2)},
        path,
        {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [0] * value.ndim} for name, value in cut_off.items()})},
    )


def run_code(path: Path) -> None:
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")


@pytest.mark.parametrize("spoil", [cut, grow, run_code, Path.unlink])
def test_a_folder_that_does_not_hold_the_tensors_is_told_in_one_line(tmp_path, monkeypatch, spoil):
    monkeypatch.chdir(tmp_path)
    write_parts(plain_state(), tmp_path / "a.pth")
    (part,) = (tmp_path / "checkpoint-step-3").glob("*.safetensors")
    (part.parent / ".metadata").write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")
    assert torch.equal(checkpoint.load(tmp_path / "a.pth")["model"]["net.b"][:], plain_state()["model"]["net.b"])  # what lies beside is not read
    spoil(part)
    with pytest.raises(UserError, match="checkpoint-step-3 does not hold the tensors of its checkpoint") as told:
        checkpoint.load(tmp_path / "a.pth")
    assert "\n" not in str(told.value) and not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "said", [7, {}, {"folder": "../elsewhere", "shapes": {}}, {"folder": "there", "shapes": {"a": "b"}}, {"folder": "nowhere", "shapes": {}}]
)
def test_a_file_that_says_no_such_folder_is_told_in_one_line(tmp_path, said):
    (tmp_path / "there").mkdir()
    checkpoint.save(tmp_path / "a.pth", {"epoch": 0, "parts": said})
    with pytest.raises(UserError, match="needs the folder .* next to it, which holds its tensors and is missing|not a JiT checkpoint"):
        checkpoint.load(tmp_path / "a.pth")


def test_one_process_that_cannot_write_leaves_the_last_good_checkpoint(tmp_path, capfd):
    """And the next is written where it can be again; two in a row end the run."""
    from util import parts_writer

    def work():
        write, fails = parts_writer.save_file, {2, 4, 5}
        calls = iter(range(1, 100))

        def full(*args):
            if next(calls) in fails and dist.rank() == 1:
                raise OSError(28, "No space left on device")
            write(*args)

        parts_writer.save_file = full
        writer = PartsWriter(None, torch.device("cpu"))
        for step in (1, 2, 3, 4):
            writer.write(plain_state(step), tmp_path / checkpoint.LAST)
            writer.settle()
        with pytest.raises(UserError, match="two checkpoints in a row could not be written .*rank 1: .*No space left"):
            writer.close()

    in_ranks(2, work)
    assert weights(tmp_path)["step"] == 3 and [path.name for path in tmp_path.glob("checkpoint-step-*")] == ["checkpoint-step-3"]
    assert capfd.readouterr().out.count("warning: no checkpoint could be written (rank 1") == 2


def test_numbered_checkpoints_keep_their_parts_as_long_as_they_are_kept(tmp_path):
    def work():
        writer = PartsWriter(1, torch.device("cpu"))
        for epoch in (100, 200):
            for step, numbered in ((epoch, tmp_path / f"checkpoint-{epoch}.pth"), (epoch + 1, None)):
                writer.write(plain_state(step), tmp_path / checkpoint.LAST, numbered)
        writer.close()

    in_ranks(2, work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-200.pth", "checkpoint-last.pth", "checkpoint-step-200", "checkpoint-step-201"]
