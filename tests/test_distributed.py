"""Ranks that wait for each other, and the GPU that each takes."""

import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from conftest import ended, in_ranks, start_ranks
from test_training import flags, run, weights

import engine_jit
import main_jit
import resume
import sampling
import text_features
from util import agreement
from util import distributed as dist
from util.errors import UserError


def says_into(path) -> None:
    """stderr of this process, from here on."""
    sys.stderr = open(path, "w", encoding="utf-8")  # noqa: SIM115


def wait_for_rank_0(action) -> None:
    """Two ranks run `action`; rank 1 hangs in it, and rank 0 is to end with 1."""
    waits, hangs = start_ranks(2, action)
    try:
        assert ended(waits) == 1
    finally:
        os.kill(hangs, signal.SIGKILL)
        ended(hangs)


@pytest.mark.slow
def test_a_rank_that_hangs_in_training_ends_the_others_in_one_line(text_data, llm_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "IN_STEPS", timedelta(seconds=2))
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 1, "--epochs", 2, "--save_freq_steps", 2)
    take = engine_jit.take_step

    def take_step(state, *rest):
        if state.step == 2:
            (tmp_path / "second step").touch()
            time.sleep(600 * dist.rank())
        return take(state, *rest)

    def work():
        says_into(tmp_path / f"{dist.rank()}.txt")
        main_jit.main(argv)

    monkeypatch.setattr(engine_jit, "take_step", take_step)
    wait_for_rank_0(work)
    said = (tmp_path / "0.txt").read_text(encoding="utf-8")
    assert "Traceback" not in said and time.time() - (tmp_path / "second step").stat().st_mtime < 30
    line = said.splitlines()[-1]
    assert (
        line.startswith("error: rank 0 of 2 lost contact with the others: one of them died or hangs")
        and ("Timed out" in line or "timeout" in line)
        and "/" not in line
    )
    assert weights(tmp_path / "out")["step"] == 2


def test_a_hang_is_told_also_where_the_main_thread_waits_for_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "GRACE", 0)

    def work():
        says_into(tmp_path / f"{dist.rank()}.txt")
        with dist.patience(timedelta(seconds=1)):
            if dist.rank() == 0:
                dist.Exchange().any(False)
            time.sleep(600)

    wait_for_rank_0(work)
    (line,) = (tmp_path / "0.txt").read_text(encoding="utf-8").splitlines()
    assert line.startswith("error: rank 0 of 2 lost contact with the others")


def test_a_rank_that_died_is_told_in_one_line_too(tmp_path):
    def work():
        if dist.rank() == 1:
            os._exit(3)
        with (
            pytest.raises(UserError, match="rank 0 of 2 lost contact with the others: one of them died or hangs; .*Connection (closed|reset) by peer"),
            dist.lost_ranks(),
        ):
            dist.barrier()
        os._exit(0)

    assert [ended(pid) for pid in start_ranks(2, work)] == [0, 3]


@pytest.mark.slow
def test_what_one_rank_does_alone_may_take_longer_than_a_step(text_data, llm_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "IN_STEPS", timedelta(seconds=3))
    argv, took = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 1, "--online_eval"), []

    def slow(module, name):
        real = getattr(module, name)

        def function(*args):
            if dist.is_main():
                took.append(name)
                time.sleep(4)
            return real(*args)

        monkeypatch.setattr(module, name, function)

    slow(text_features, "check_room")  # while it prepares
    slow(resume.Saver, "__call__")
    slow(sampling, "draw_sheet")  # in an evaluation

    def work():
        main_jit.main(argv)
        assert took == (["check_room", "__call__", "draw_sheet"] if os.environ["RANK"] == "0" else [])

    in_ranks(2, work)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(uuids): torch sees them.  Returns: how the group was joined, as far as init has come."""
    joined = {}

    def see(uuids):
        monkeypatch.setattr("torch.cuda.is_available", lambda: bool(uuids))
        monkeypatch.setattr("torch.cuda.device_count", lambda: len(uuids))
        monkeypatch.setattr("torch.cuda.set_device", lambda gpu: joined.update(gpu=gpu))
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda gpu: SimpleNamespace(uuid=uuids[gpu.index]))
        monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **more: joined.update(backend=backend, **more))
        return joined

    return see


def init_as(monkeypatch, number, world, store) -> torch.device:
    """What torchrun's process `number` of one node takes."""
    monkeypatch.setattr("torch.distributed.rendezvous", lambda *_, timeout: iter([(store, number, world)]))
    monkeypatch.setenv("LOCAL_RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    return dist.init("auto")


def test_each_process_takes_its_own_gpu_and_nccl_connects_at_once(gpus, monkeypatch):
    store, joined = torch.distributed.HashStore(), gpus(["a", "b"])
    assert init_as(monkeypatch, 0, 2, store) == torch.device("cuda", 0) and init_as(monkeypatch, 1, 2, store) == torch.device("cuda", 1)
    assert joined["gpu"] == joined["device_id"] == torch.device("cuda", 1) and joined["backend"] == "cpu:gloo,cuda:nccl"
    with pytest.raises(UserError, match=r"process 3 of this node has no GPU \(2 found\)"):
        init_as(monkeypatch, 2, 3, store)


def test_a_process_that_sees_one_gpu_takes_it_unless_another_has_it(gpus, monkeypatch):
    store = torch.distributed.HashStore()
    for number, uuid in enumerate("abcd"):  # as under Slurm
        gpus([uuid])
        assert init_as(monkeypatch, number, 4, store) == torch.device("cuda", 0)
        assert init_as(monkeypatch, number, 4, store) == torch.device("cuda", 0)  # its own still
    gpus(["b"])
    with pytest.raises(UserError, match=r"ranks 1 and 4 see the same one GPU \(b\)"):
        init_as(monkeypatch, 4, 5, store)


def test_without_a_gpu_the_group_is_gloos(gpus, monkeypatch):
    joined = gpus([])
    assert init_as(monkeypatch, 0, 1, torch.distributed.HashStore()) == torch.device("cpu")
    assert joined["backend"] == "gloo" and joined["device_id"] is None
    with pytest.raises(UserError, match=r"--device cuda: process 1 of this node has no GPU \(0 found\)"):
        dist.init("cuda")


def test_processes_that_see_different_things_are_told_in_one_line(tmp_path):
    assert agreement.spans([0, 1, 2, 3, 8, 10, 11]) == "0-3, 8, 10-11"

    def work():
        agreement.agree({"a": 1, "b": "x"})
        mine = "x" if dist.rank() in (0, 1) else "y"
        with pytest.raises(UserError, match=r"^the processes do not agree on b: x on rank 0-1; y on rank 2$"):
            agreement.agree({"a": 1, "b": mine})

    in_ranks(3, work)


@pytest.mark.parametrize(
    "what, said", [("--lr", "train.lr: 0.001 on rank 0; 0.002 on rank 1"), ("code", "the code: .* on rank 0; other on rank 1"), ("data", "their names")]
)
def test_nodes_that_differ_are_told_before_anything_is_encoded(text_data, llm_folder, tmp_path, monkeypatch, what, said):
    """Data may lie elsewhere, as long as they are the same."""
    shutil.copytree(text_data, tmp_path / "copy")
    if what == "data":
        (tmp_path / "copy" / "images" / "7.png").rename(tmp_path / "copy" / "images" / "8.png")
        (tmp_path / "copy" / "captions" / "7.txt").rename(tmp_path / "copy" / "captions" / "8.txt")
    monkeypatch.setattr(text_features, "prepare", lambda *_: pytest.fail("text was encoded"))

    def work():
        second = dist.rank() == 1
        if second and what == "code":
            agreement.code_version = lambda: "other"
        more = ["--lr", "2e-3"] if second and what == "--lr" else []
        with pytest.raises(UserError, match=f"the processes do not agree on {said}"):
            run(*flags(tmp_path / "copy" if second else text_data, llm_folder(), tmp_path / "out", "--batch_size", 1, "--epochs", 1, *more))

    in_ranks(2, work)
