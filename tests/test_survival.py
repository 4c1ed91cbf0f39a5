"""A run that survives: exact resumption within epochs, kills, signals, full disks, other worlds, numbers that are not finite, bad data."""

import io
import os
import random
import resource
import signal
import subprocess
import sys
import time
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import ROOT, child, ended, in_ranks, open_text, write_text_data
from PIL import Image, PngImagePlugin
from test_training import assert_same_training, flags, moved, run, weights
from torch._utils import ExceptionWrapper

import engine_jit
import flags as command_line
import main_jit
import resume
import sampling
from datasets.captioned import CaptionedPictures
from datasets.stream import Shuffle, StreamSampler
from datasets.text_image import read_captions
from util import checkpoint
from util import distributed as dist
from util.errors import UserError
from util.files import Lock
from util.report import Report
from util.staging import Staging
from util.stopping import Stop
from util.workers import loader_deaths


def class_flags(data, out, *more):
    common = ["--model", "JiT-Pico/8", "--img_size", "16", "--class_num", "3", "--device", "cpu", "--num_workers", "0", "--lr", "1e-3"]
    return [*common, "--data_path", str(data), "--output_dir", str(out), "--warmup_epochs", "1", *map(str, more)]


@pytest.fixture(autouse=True)
def language_model_is_there(llm_folder):
    """Or every forked process would make its own."""
    llm_folder()


@pytest.fixture
def losses(monkeypatch):
    """What each step's loss was, by the run's number of the step."""
    found = {}
    add = Report.add

    def remember(self, loss):
        found.setdefault(self.bar.n + 1, []).append(loss.item())
        add(self, loss)

    monkeypatch.setattr(Report, "add", remember)
    return found


class StopAfter:
    """In place of a signal: asks to stop before step `number` of the process."""

    def __init__(self, monkeypatch, number):
        calls = iter(range(1, 10**6))
        monkeypatch.setattr(Stop, "agreed", lambda self: next(calls) == number)


@pytest.mark.parametrize("kind, extra", [("text", []), ("text", ["--precision", "bf16", "--accum_iter", 2]), ("class", ["--proj_dropout", "0.3"])])
def test_a_run_stopped_within_epochs_and_resumed_is_the_uninterrupted_one(kind, extra, text_data, class_data, llm_folder, tmp_path, monkeypatch, losses):
    def argv(out):
        common = ["--batch_size", 2, "--epochs", 3, *extra]
        return flags(text_data, llm_folder(), out, *common) if kind == "text" else class_flags(class_data, out, *common)

    run(*argv(tmp_path / "whole"))
    whole = weights(tmp_path / "whole")
    straight = dict(losses)
    losses.clear()
    steps = whole["step"] // 3
    assert steps > 1 and moved(whole) > 1e-4
    for number in (1, steps, 2):  # in the first epoch, at an end of one, and within another
        with monkeypatch.context() as patch:
            StopAfter(patch, number)
            run(*argv(tmp_path / "parts"), "--resume", str(tmp_path / "parts"))
        assert weights(tmp_path / "parts")["step"] < whole["step"] or number == 2
    run(*argv(tmp_path / "parts"), "--resume", str(tmp_path / "parts"))
    assert_same_training(whole, weights(tmp_path / "parts"))
    assert losses == straight  # each step once, and to the bit


def test_two_ranks_resumed_within_an_epoch_are_bit_identical(text_data, llm_folder, tmp_path, monkeypatch):
    def argv(out, *more):
        return flags(text_data, llm_folder(), out, "--batch_size", 1, "--epochs", 2, "--precision", "bf16", "--resume", out, *more)

    def stopped():
        StopAfter(monkeypatch, 3)
        run(*argv(tmp_path / "parts"))

    run(*argv(tmp_path / "warm"))  # the text store
    in_ranks(2, lambda: run(*argv(tmp_path / "whole")))
    in_ranks(2, stopped)
    assert weights(tmp_path / "parts")["step"] == 3 and weights(tmp_path / "parts")["epoch_step"] == 3
    in_ranks(2, lambda: run(*argv(tmp_path / "parts")))
    assert_same_training(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_nothing_of_the_skipped_part_of_an_epoch_is_read_again(text_data, llm_folder, tmp_path, monkeypatch):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 1, "--held_out", 0, "--resume", tmp_path / "out")
    with monkeypatch.context() as patch:
        StopAfter(patch, 3)
        run(*argv)
    read = []
    item = CaptionedPictures.__getitem__
    monkeypatch.setattr(CaptionedPictures, "__getitem__", lambda self, key: read.append(key[1]) or item(self, key))
    run(*argv)
    assert read == [6, 7]


def test_save_freq_steps_and_the_numbered_files(text_data, llm_folder, tmp_path, monkeypatch):
    saved = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: saved.append((state["epoch"], state["epoch_step"], state["step"])) or save(path, state))
    run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 3, "--save_freq_steps", 3))
    assert saved == [(-1, 3, 3), (0, 2, 6), (1, 1, 9), (2, 0, 12)]  # epochs of four steps; the last one ends the run


def test_numbered_checkpoints_are_kept_as_many_as_asked_for(tmp_path):
    writer = checkpoint.Writer(keep_last=2)
    for epoch in (100, 200, 300, 1000):
        state = {"model": {"a": torch.full((4,), float(epoch))}}
        writer.write(state, tmp_path / checkpoint.LAST, tmp_path / f"checkpoint-{epoch}.pth")
        state["model"]["a"].zero_()  # what training does next is not in the file
    writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1000.pth", "checkpoint-300.pth", "checkpoint-last.pth"]
    assert [checkpoint.load(tmp_path / f"checkpoint-{name}.pth")["model"]["a"][0].item() for name in (300, 1000, "last")] == [300, 1000, 1000]
    assert checkpoint.find(str(tmp_path / "checkpoint-300.pth"), "x") == tmp_path / "checkpoint-300.pth"


def test_no_step_changes_the_weights_before_the_copy_of_the_last_checkpoint_is_settled(text_data, llm_folder, tmp_path, monkeypatch):
    events = []

    def noted(cls, name):
        call = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda *args, **kwargs: events.append(name) or call(*args, **kwargs))

    noted(Staging, "copy"), noted(Staging, "settle"), noted(torch.optim.AdamW, "step")
    run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 1, "--save_freq_steps", 2))
    assert events == ["settle", "step", "settle", "step", "copy"] * 2


# --- kills and signals


def until_done(argv, out, kill):
    """Start, let `kill(pid)` end it, start again, until it ends by itself.  Returns: the number of kills."""
    for kills in range(1000):
        pid = child(lambda: run(*argv, "--resume", str(out)))
        if not kill(pid, kills):
            assert ended(pid) == 0
            return kills
        code = ended(pid)
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, code


def test_killed_at_random_moments_the_end_is_the_same(text_data, llm_folder, tmp_path):
    """The small version of benchmarks/kill_test.py."""

    def argv(out):
        return flags(text_data, llm_folder(), out, "--batch_size", 2, "--epochs", 4, "--save_freq_steps", 1, "--log_freq", 100)

    start = time.perf_counter()
    assert ended(child(lambda: run(*argv(tmp_path / "whole")))) == 0
    patience = time.perf_counter() - start
    rng = random.Random(0)

    def kill(pid, kills):
        if kills == 5:
            return False
        time.sleep(rng.uniform(0.05, 0.4) * patience)
        os.kill(pid, signal.SIGKILL)
        return True

    kills = until_done(argv(tmp_path / "killed"), tmp_path / "killed", kill)
    assert kills >= 3
    assert_same_training(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    again = child(lambda: run(*argv(tmp_path / "killed"), "--resume", str(tmp_path / "killed")))
    assert ended(again) == 0  # a finished run says so and ends


def wait_for(path, seconds=20):
    for _ in range(int(seconds * 100)):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"no {path}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_leaves_with_zero(number, text_data, llm_folder, tmp_path, capfd):
    def argv(out):
        return flags(text_data, llm_folder(), out, "--batch_size", 2, "--epochs", 6, "--save_freq_steps", 2, "--log_freq", 1000)

    out = tmp_path / "out"
    pid = child(lambda: run(*argv(out), "--resume", str(out)))
    wait_for(out / checkpoint.LAST)
    os.kill(pid, number)
    assert ended(pid) == 0
    printed = capfd.readouterr().out
    step = weights(out)["step"]
    assert step < 24
    assert f"stopped by {number.name} after step {step}; to continue, run the same command with --resume {out}" in printed
    if number == signal.SIGTERM:
        assert ended(child(lambda: run(*argv(out), "--resume", str(out)))) == 0
        assert ended(child(lambda: run(*argv(tmp_path / "whole")))) == 0
        assert_same_training(weights(tmp_path / "whole"), weights(out))


def test_a_second_signal_leaves_at_once(text_data, llm_folder, tmp_path):
    def work():
        matrix = torch.randn(4000, 4000)
        engine_jit.take_step = lambda *_: (tmp_path / "busy").touch() or torch.linalg.svd(matrix)  # minutes that no signal handler interrupts
        run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 1))

    pid = child(work)
    wait_for(tmp_path / "busy")
    start = time.perf_counter()
    for pause in (0, 0.2, 1.0):  # one keystroke may come twice; a second one comes later
        time.sleep(pause)
        os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 128 + signal.SIGTERM and time.perf_counter() - start < 10


def test_a_signal_to_one_rank_stops_both_after_the_same_step(text_data, llm_folder, tmp_path, monkeypatch):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 1, "--epochs", 60, "--resume", tmp_path / "out")
    run(*argv, "--epochs", "1", "--output_dir", str(tmp_path / "store"), "--resume", str(tmp_path / "store"))
    take = engine_jit.take_step

    def signalled(state, *rest):
        if state.step == 5 and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(state, *rest)

    monkeypatch.setattr(engine_jit, "take_step", signalled)
    in_ranks(2, lambda: run(*argv))
    assert 6 <= weights(tmp_path / "out")["step"] <= 8


def test_a_signal_while_evaluating_leaves_at_once_with_all_saved(text_data, llm_folder, tmp_path, capfd):
    def work():
        sampling.draw_sheet = lambda *_: (tmp_path / "evaluating").touch() or time.sleep(60)
        run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 9, "--online_eval", "--eval_freq", 2))

    pid = child(work)
    wait_for(tmp_path / "evaluating")
    start = time.perf_counter()
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 0 and time.perf_counter() - start < 10
    assert weights(tmp_path / "out")["step"] == 8 and "stopped by SIGTERM after step 8" in capfd.readouterr().out

    made = []  # the evaluation that was cut short is made by the next start, once

    def again(*epochs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "draw_sheet", lambda *_: made.append(1) or np.zeros((8, 8, 3), np.uint8))
            run(
                *flags(
                    text_data,
                    llm_folder(),
                    tmp_path / "out",
                    "--batch_size",
                    2,
                    "--epochs",
                    *epochs,
                    "--online_eval",
                    "--eval_freq",
                    2,
                    "--resume",
                    tmp_path / "out",
                )
            )

    again(2)
    assert len(made) == 1
    again(2)
    assert len(made) == 1
    again(3)
    assert len(made) == 2


@pytest.mark.slow
def test_torchrun_goes_on_by_itself_after_a_rank_died(text_data, llm_folder, tmp_path):
    script = tmp_path / "dies_once.py"
    script.write_text(
        f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import engine_jit, main_jit
take = engine_jit.take_step
def once(state, *rest):
    if state.step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return take(state, *rest)
engine_jit.take_step = once
main_jit.main()
""",
        encoding="utf-8",
    )
    out = tmp_path / "out"

    def argv(out):
        return flags(text_data, llm_folder(), out, "--model", "JiT-Nano/8-Text", "--batch_size", 1, "--epochs", 2, "--save_freq_steps", 2, "--resume", out)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1", str(script), *argv(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170, env=environment)
    assert done.returncode == 0 and "next epoch 1" in done.stdout, done.stderr[-3000:]
    in_ranks(2, lambda: run(*argv(tmp_path / "whole")))
    assert_same_training(weights(tmp_path / "whole"), weights(out))


# --- disk


def test_a_full_disk_is_loud_once_and_ends_the_run_the_second_time(text_data, llm_folder, tmp_path, monkeypatch, capsys):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--save_freq_steps", 1, "--resume", tmp_path / "out")
    run(*argv, "--epochs", "1")
    good = (tmp_path / "out" / checkpoint.LAST).read_bytes()
    save, fails = checkpoint.save, {2, 4, 5}
    calls = iter(range(1, 100))

    def full(path, state):
        if next(calls) in fails:
            raise OSError(28, "No space left on device")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(UserError, match="two checkpoints in a row could not be written .*No space left.*last good one is untouched"):
        run(*argv, "--epochs", "3")
    assert capsys.readouterr().out.count("warning: no checkpoint could be written") == 2  # the second and the fourth; the third was written
    assert weights(tmp_path / "out")["step"] == 4 + 3 and (tmp_path / "out" / checkpoint.LAST).read_bytes() != good


def test_the_last_checkpoint_of_a_run_is_there_or_the_run_has_failed(text_data, llm_folder, tmp_path, monkeypatch):
    save = checkpoint.save
    for fails, error in [(1, OSError(28, "No space left on device")), (2, OSError(28, "No space left on device")), (2, MemoryError("no memory"))]:
        out, calls = tmp_path / f"{fails}{type(error).__name__}", iter(range(1, 100))

        def full(path, state, fails=fails, error=error, calls=calls):
            if next(calls) <= fails:
                raise error
            save(path, state)

        monkeypatch.setattr(checkpoint, "save", full)
        argv = flags(text_data, llm_folder(), out, "--batch_size", 4, "--epochs", 1)
        if fails == 1:  # tried once more
            run(*argv)
            assert weights(out)["step"] == 2
        else:
            with pytest.raises(UserError, match="could not be written"):
                run(*argv)


def test_a_full_disk_ends_the_events_and_not_the_training(text_data, llm_folder, tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 2))
    assert weights(tmp_path / "out")["step"] == 8 and capsys.readouterr().out.count("tensorboard cannot be written to") == 1


def test_an_error_does_not_throw_a_checkpoint_away_that_is_being_written(text_data, llm_folder, tmp_path, monkeypatch, capsys):
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: time.sleep(0.5) or save(*args))
    poisoned(monkeypatch, set(range(2, 40)))
    with pytest.raises(UserError, match="10 steps in a row"):
        run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 9, "--save_freq_steps", 11))
    assert weights(tmp_path / "out")["step"] == 11 and weights(tmp_path / "out")["skips"].tolist() == [9, 9]
    capsys.readouterr()
    with pytest.raises(UserError, match="10 steps in a row .* steps 3 to 12"):  # they are counted on
        run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 9, "--save_freq_steps", 1, "--resume", tmp_path / "out"))
    assert "1 of 1 steps before step 12 were skipped" in capsys.readouterr().out  # the nine before were told of


def test_a_file_that_finds_no_room_leaves_the_one_before(tmp_path):
    path = tmp_path / checkpoint.LAST
    checkpoint.save(path, {"model": {"a": torch.zeros(10)}})
    before = path.read_bytes()

    def too_large():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoint.save(path, {"model": {"a": torch.zeros(10**6)}})
        except OSError:
            raise UserError("no room") from None

    assert ended(child(too_large)) == 1
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [checkpoint.LAST]


# --- mistakes on resume, two jobs


def test_another_world_with_the_same_batch_goes_on_and_another_batch_is_refused(text_data, llm_folder, tmp_path, monkeypatch, capsys):
    def argv(out, *more):
        return flags(text_data, llm_folder(), out, "--epochs", 2, "--resume", out, *more)

    run(*argv(tmp_path / "one", "--batch_size", 2))

    def stopped():
        StopAfter(monkeypatch, 2)
        run(*argv(tmp_path / "two", "--batch_size", 1))

    in_ranks(2, stopped)
    capsys.readouterr()
    run(*argv(tmp_path / "two", "--batch_size", 1, "--accum_iter", 2))
    assert "was trained by 2 processes, this run has 1; the effective batch and the order of the data are the same" in capsys.readouterr().out
    assert_same_training(weights(tmp_path / "one"), weights(tmp_path / "two"), exact=False)
    for extra, message in [
        (["--batch_size", 4], r"an effective batch of 2, and --batch_size x --accum_iter x processes is 4 x 1 x 1 = 4; make it 2"),
        (["--batch_size", 2, "--seed", 1], "--seed is 1, but .* was trained with 0; give --seed 0"),
        (["--batch_size", 2, "--held_out", 3], "--held_out is 3, but .* was trained with 64"),
    ]:
        with pytest.raises(UserError, match=message):
            run(*argv(tmp_path / "two", *extra))


def test_the_same_command_goes_on_with_what_it_has_written(text_data, llm_folder, tmp_path, monkeypatch, capsys):
    """Also where --resume names the checkpoint of another run to begin from, and where torchrun starts it again."""

    def argv(out, *more):
        return flags(text_data, llm_folder(), out, "--batch_size", 2, *more)

    run(*argv(tmp_path / "other", "--epochs", 1))
    tuned = argv(tmp_path / "new", "--epochs", 3, "--resume", tmp_path / "other")
    with monkeypatch.context() as patch:
        StopAfter(patch, 2)
        run(*tuned)
    assert weights(tmp_path / "new")["step"] == 4 + 2
    capsys.readouterr()
    run(*tuned)
    assert f"resuming {tmp_path / 'new' / checkpoint.LAST} instead of --resume" in capsys.readouterr().out and weights(tmp_path / "new")["step"] == 12

    begun = argv(tmp_path / "other", "--epochs", 3, "--resume", tmp_path / "other", "--start_epoch", 2)
    with monkeypatch.context() as patch:
        StopAfter(patch, 2)
        run(*begun)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    run(*begun)
    assert "2 of its 4 steps done" in capsys.readouterr().out
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(UserError, match="--init_from .*other: .*new.* was started without it; to continue that run leave out --init_from"):
        run(*argv(tmp_path / "new", "--epochs", 4, "--init_from", tmp_path / "other"))


def test_a_restart_by_torchrun_goes_on_with_what_was_written_since_torchrun_began_and_with_nothing_older(tmp_path, monkeypatch):
    out, base = tmp_path / "out", tmp_path / "base"
    out.mkdir(), base.mkdir()
    own, kept = out / checkpoint.LAST, out / "checkpoint-100.pth"
    own.touch(), kept.touch(), (base / checkpoint.LAST).touch()

    def beginning(*argv):
        return resume.beginning(command_line.parse(["--output_dir", str(out), *map(str, argv)]))

    ways = {("--resume", out, "--start_epoch", 2): (own, 2), ("--init_from", "x.pth", "--start_epoch", 2): (own, None), ("--resume", kept): (kept, None)}
    ways[("--resume", base, "--start_epoch", 2)] = (own, None)  # it began there once
    assert {argv: beginning(*argv) for argv in ways} == ways
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert {argv: beginning(*argv) for argv in [*ways, ()]} == dict.fromkeys([*ways, ()], (own, None))
    os.utime(own, (0, 0))
    assert {argv: beginning(*argv) for argv in ways} == ways
    with pytest.raises(UserError, match="exists already; to continue that run give --resume"):
        beginning()
    shell = subprocess.Popen(["bash", "-c", "echo; sleep 60; true"], stdout=subprocess.PIPE)  # with the variable, as a script of torchrun's has it
    shell.stdout.readline()  # /proc shows an empty environment until the program has begun
    monkeypatch.setattr(os, "getppid", lambda: shell.pid)
    began, now = dist.torchrun_began(), time.time()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert dist.torchrun_began() is None
    waiting = subprocess.Popen(["sleep", "60"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(os, "getppid", lambda: waiting.pid)
    assert abs(dist.torchrun_began() - now) < 2 and began < now - 1  # pytest is what began the shell
    monkeypatch.setattr(os, "getppid", lambda: 0)  # of another namespace
    assert dist.torchrun_began() == 0
    shell.kill(), waiting.kill()


def test_within_an_epoch_the_data_must_be_the_same(tmp_path, llm_folder, monkeypatch, capsys):
    data = write_text_data(tmp_path / "data", 8)
    argv = flags(data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--resume", tmp_path / "out")
    with monkeypatch.context() as patch:
        StopAfter(patch, 2)
        run(*argv, "--epochs", "1")
    write_text_data(data, 12)
    changed = "was saved in the middle of an epoch and had epochs of 4 steps; this run has other files in --data_path .*, and its epochs have 6 steps; .* --start_epoch 0"
    with pytest.raises(UserError, match=changed):
        run(*argv, "--epochs", "1")
    (data / "images" / "8.png").unlink(), (data / "images" / "9.png").unlink(), (data / "images" / "10.png").unlink()
    (data / "images" / "11.png").unlink()
    (data / "images" / "0.png").rename(data / "images" / "x.png")
    (data / "captions" / "0.txt").rename(data / "captions" / "x.txt")
    with pytest.raises(UserError, match="its epochs have 4 steps"):  # as many, but others
        run(*argv, "--epochs", "1", "--missing_captions", "skip")
    write_text_data(data, 12)
    (data / "images" / "x.png").unlink(), (data / "captions" / "x.txt").unlink()
    run(*argv, "--epochs", "1", "--start_epoch", "0")
    capsys.readouterr()
    write_text_data(data, 16)
    run(*argv, "--epochs", "2")
    assert "had epochs of 6 steps; this run has other files" in capsys.readouterr().out
    run(*argv, "--epochs", "3", "--start_epoch", "2", "--batch_size", "4")
    assert "had epochs of 8 steps; this run has another batch size or --held_out, and its epochs have 4 steps" in capsys.readouterr().out


def test_two_jobs_in_one_output_dir(text_data, llm_folder, tmp_path, capfd):
    out = tmp_path / "out"
    (out).mkdir()
    (out / ".lock").write_text("a job that was killed, process 1\n")  # a lock is held by a process, not by a file
    argv = flags(text_data, llm_folder(), out, "--batch_size", 2, "--epochs", 1)

    def hold():
        lock = Lock(out, "--output_dir")
        (tmp_path / "held").touch()
        time.sleep(60)
        lock.free()

    pid = child(hold)
    wait_for(tmp_path / "held")
    with pytest.raises(UserError, match=rf"--output_dir .* is in use by another job \(.*process {pid}\); wait for it, or name another"):
        run(*argv)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    run(*argv)
    assert weights(out)["step"] == 4


# --- numbers


def poisoned(monkeypatch, bad, rank=0, kind=float("nan")):
    """The loss of the steps `bad` (from 0) is not finite, on one rank."""
    loss = engine_jit.batch_loss

    def spoiled(net, batch, *rest):
        n = batch.numbers[0]
        value = loss(net, batch, *rest)
        return value * kind if n // 2 in bad and dist.rank() == rank else value

    monkeypatch.setattr(engine_jit, "batch_loss", spoiled)


@pytest.mark.parametrize("clip", [[], ["--grad_clip", "1"]])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(text_data, llm_folder, tmp_path, monkeypatch, capsys, clip):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--save_freq_steps", 1, "--epochs", 1, *clip)
    states = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: states.append(deepcopy(state)) or save(path, state))
    poisoned(monkeypatch, {1, 2}, kind=float("inf"))
    run(*argv)
    before, _, after, last = states
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items())
    assert all(torch.equal(value, after["optimizer"][name][key]) for name, parts in before["optimizer"].items() for key, value in parts.items())
    assert any(not torch.equal(value, last["model"][name]) for name, value in after["model"].items())
    assert all(value.isfinite().all() for key in ("model", "model_ema1") for value in last[key].values())
    printed = capsys.readouterr().out
    assert printed.count("warning: 1 of 1 steps before step") == 2 and "step 2 were skipped" in printed


def test_both_ranks_skip_a_step_that_is_not_finite_on_one(text_data, llm_folder, tmp_path, monkeypatch):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 1, "--epochs", 1, "--resume", tmp_path / "out")
    run(*argv, "--output_dir", str(tmp_path / "store"), "--resume", str(tmp_path / "store"))

    def work():
        poisoned(monkeypatch, {1}, rank=1)
        after = []
        take = engine_jit.take_step

        def remember(state, *rest):
            norm = take(state, *rest)
            after.append(state.net.final_layer.linear.weight.clone())
            return norm

        monkeypatch.setattr(engine_jit, "take_step", remember)
        run(*argv)
        assert torch.equal(after[0], after[1]) and not torch.equal(after[1], after[2])
        ours = [weight.double().sum() for weight in after]
        assert dist.sum_over_ranks(torch.stack(ours)).tolist() == [2 * value.item() for value in ours]

    in_ranks(2, work)


def test_ten_such_steps_in_a_row_end_the_run_with_what_reproduces_them(text_data, llm_folder, tmp_path, monkeypatch):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 4, "--log_freq", 14, "--seed", 5)
    message = r"10 steps in a row was not finite, steps 3 to 12 \(lr .*, --seed 5\).*Pictures of step 12: "
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message) as error:
        poisoned(patch, set(range(2, 12)))
        run(*argv)
    sampler = StreamSampler(Shuffle(torch.arange(8), seed=5), 2, range(16), 0, 1)
    names = [f"{index}.png" for index in sampler.pictures_of(11, 1)]
    assert [os.path.basename(name) for name in str(error.value).split("step 12: ")[1].split(", ")] == names
    poisoned(monkeypatch, set(range(9)))
    run(*argv, "--output_dir", str(tmp_path / "nine"))  # nine are borne


# --- bad data


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette_with_transparency():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return png(image, transparency=1)


def turned_by_exif():
    image = Image.new("RGB", (20, 10), "white")
    image.paste("red", (0, 0, 10, 10))  # the left half; upright it is the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif, quality=95)


def bomb():
    """A PNG of 100,000 x 100,000 pixels in few bytes."""
    body = png(Image.new("1", (1, 1)))
    header = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + body[24:29]
    import zlib

    return body[:12] + header + zlib.crc32(header).to_bytes(4, "big") + body[33:]


GREY16 = np.full((20, 20), 0x80FF, dtype=np.uint16)
PICTURES = {  # bytes, colour of its upper left corner as training sees it; None where it cannot be read
    "truncated.jpg": (encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")[:900], None),
    "empty.png": (b"", None),
    "text.jpg": ("これは写真ではありません".encode(), None),
    "bomb.png": (bomb(), None),
    "one_pixel.png": (png(Image.new("RGB", (1, 1), (10, 20, 30))), (10, 20, 30)),
    "wide.png": (png(Image.new("RGB", (20_000, 20), (10, 20, 30))), (10, 20, 30)),
    "cmyk.jpg": (encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", quality=95), (254, 0, 0)),
    "sixteen_bits.png": (png(Image.fromarray(GREY16)), (128, 128, 128)),
    "palette.png": (palette_with_transparency(), (255, 255, 255)),
    "see_through.png": (png(Image.new("RGBA", (20, 20), (255, 0, 0, 0))), (255, 255, 255)),
    "half_through.webp": (encoded(Image.new("RGBA", (20, 20), (255, 0, 0, 128)), "WEBP", lossless=True), (255, 127, 127)),
    "grey_alpha.png": (png(Image.new("LA", (20, 20), (0, 0))), (255, 255, 255)),
    "animated.webp": (
        encoded(Image.new("RGB", (20, 20), "red"), "WEBP", save_all=True, append_images=[Image.new("RGB", (20, 20), "blue")], lossless=True),
        (255, 0, 0),
    ),
    "turned.jpg": (turned_by_exif(), (254, 0, 0)),
    "bilevel.png": (png(Image.new("1", (20, 20), 1)), (255, 255, 255)),
    "long_comment.png": (png(Image.new("RGB", (20, 20), "red"), pnginfo=(lambda i: i.add_text("a", "b" * 200_000) or i)(PngImagePlugin.PngInfo())), (255, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_kind(name, tmp_path):
    content, corner = PICTURES[name]
    data = write_text_data(tmp_path / "data", 2)
    (data / "images" / "0.png").unlink()
    (data / "images" / f"0{os.path.splitext(name)[1]}").write_bytes(content)
    picture, index, broken = open_text(data, 16).readable(0)
    assert picture.shape == (3, 16, 16) and picture.dtype == torch.uint8
    if corner is None:
        assert index == 1 and len(broken) == 1 and "/0." in broken[0] and "\n" not in broken[0]
    else:
        assert not broken and (picture[:, 0, 0].int() - torch.tensor(corner)).abs().max() <= 2
        if name == "turned.jpg":
            assert picture[:, 0, 15].tolist()[1] < 20 and picture[:, 15, 0].tolist()[1] > 235


CAPTION_FILES = {  # bytes -> captions, or a part of the error
    "plain": ("赤い三\n".encode(), ("赤い三",)),
    "bom": (b"\xef\xbb\xbf" + "赤い三".encode(), ("赤い三",)),
    "lines": ("一\r\n\r\n 二 \n".encode(), ("一", "二")),
    "empty": (b"", ()),
    "blank": (b" \n\t\n", ()),
    "shift_jis": ("夕焼けの海辺".encode("shift_jis"), "is not UTF-8; convert it, for instance: iconv -f SHIFT_JIS -t UTF-8"),
    "utf16": ("夕焼け".encode("utf-16"), "is not UTF-8"),
    "lone_surrogate": (b"\xed\xa0\x80", "is not UTF-8"),
    "nul": ("赤い\x00三".encode(), ("赤い\x00三",)),
    "long": (("猫" * 100_000).encode(), ("猫" * 100_000,)),
}


@pytest.mark.parametrize("name", CAPTION_FILES)
def test_captions_of_every_kind(name, tmp_path, llm_folder):
    content, wanted = CAPTION_FILES[name]
    data = write_text_data(tmp_path / "data", 4)
    (data / "captions" / "0.txt").write_bytes(content)
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            read_captions(data / "captions" / "0.txt")
        return
    assert read_captions(data / "captions" / "0.txt") == wanted
    if name in ("nul", "long"):  # through the LLM and a step of training too
        run(*flags(data, llm_folder(), tmp_path / "out", "--batch_size", 4, "--epochs", 1))
    if not wanted:
        with pytest.raises(UserError, match=r"1 caption files without a line of text \(0\)"):
            open_text(data, 16)


def test_a_loader_process_that_dies_is_an_error_with_its_cause(text_data, llm_folder, tmp_path, capfd):
    def work():
        CaptionedPictures.__getitem__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 1, "--num_workers", 1))

    assert ended(child(work)) == 1
    printed = capfd.readouterr().out
    assert "a loader process died (DataLoader worker" in printed and "--num_workers" in printed


def test_what_a_loader_process_says_is_one_line_too():
    try:
        raise UserError("--text_cache_dir: x.safetensors is damaged")
    except UserError:
        met = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UserError, match=r"^--text_cache_dir: x.safetensors is damaged$"), loader_deaths():
        met.reraise()


def test_prompts_reach_no_path_outside_output_dir(text_data, llm_folder, tmp_path):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 4, "--epochs", 1)
    run(*argv)
    before = {path for path in tmp_path.rglob("*") if (tmp_path / "out") not in path.parents}
    prompts = ["../../outside", "/etc/passwd", "$(touch pwned); `touch pwned`", "a\x00b", "-rf", "%s%n" * 20]
    run(*argv, "--generate", "--resume", str(tmp_path / "out"), *(part for prompt in prompts for part in (f"--prompt={prompt}",)))
    assert {path for path in tmp_path.rglob("*") if (tmp_path / "out") not in path.parents} == before
    assert sorted(path.name for path in (tmp_path / "out" / "samples").glob("0*.png")) == [f"{i:04d}.png" for i in range(6)]


def test_an_error_that_ends_training_is_the_last_line_and_has_it_to_itself(text_data, llm_folder, tmp_path, capfd):
    """The progress bar ends its line first."""
    (text_data / "images" / "3.png").write_bytes(b"broken")
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 3, "--held_out", 0, "--bad_images", "error")

    def work():
        sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8")
        try:
            main_jit.main(argv)
        except SystemExit as left:
            os._exit(left.code)

    code = ended(child(work))
    *_, bar, last, rest = capfd.readouterr().err.split("\n")
    assert code == 1 and rest == "" and "training: " in bar
    assert last.startswith("error: broken picture ") and "3.png" in last and last.endswith("to skip broken pictures give --bad_images skip")
