"""The rules of resuming: by tables without files, and with real checkpoints of this version, of the one before and of the paper's authors."""

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import in_ranks, write_text_data
from test_training import flags, run, weights

import engine_jit
import resume
from config import from_plain, to_plain
from flags import parse
from resume import RULES, World, completed, look_up, put
from util import checkpoint
from util import distributed as dist
from util.broken import Broken
from util.errors import UserError
from util.schedule import Progress

TEXT = {"llm": "a/b", "layer": "mean", "max_text_len": 77, "text_norm": "standardize", "width": 8}


def saved_of(trained, text=None, **changed):
    """A checkpoint of that job, without a file."""
    world = World(1, 128, 10, "data")
    return replace(resume.Saved(Path("x.pth"), {}, [None, None], Progress(1, 0, 10), to_plain(trained), text or {}, world=world), **changed)


TEXT_RUN = ["--model", "JiT-B/16-Text", "--llm_model_name", "a/b"]
OTHER = {  # flag -> another value than the default
    "model": "JiT-B/32-Text", "img_size": 512, "noise_scale": 2.0, "P_mean": 0.0, "P_std": 1.0, "t_eps": 0.1, "llm_model_name": "c/d", "max_text_len": 33,
    "llm_layer": "last", "text_norm": "none", "class_num": 10, "seed": 1, "held_out": 0, "optimizer": "muon",
}  # fmt: skip
REFUSED = {  # flag -> (in training, in training whose steps are counted anew, in drawing)
    "model": (True, True, True), "img_size": (True, True, True), "noise_scale": (True, True, True), "P_mean": (False, False, True), "P_std": (False, False, True),
    "t_eps": (False, False, True), "llm_model_name": (True, True, True), "max_text_len": (True, True, True), "llm_layer": (True, True, True),
    "text_norm": (True, True, True), "class_num": (True, True, True), "seed": (True, False, False), "held_out": (True, False, False),
    "optimizer": (True, True, False),
}  # fmt: skip


@pytest.mark.parametrize("flag", [rule.flag for rule in RULES if rule.flag != "lora_rank"])  # which test_lora.py tries
def test_what_must_agree_and_when(flag):
    kind = [] if flag == "class_num" else TEXT_RUN
    saved = saved_of(parse(kind), TEXT if kind else None)
    argv = [*kind, f"--{flag}", str(OTHER[flag])]
    drawing = parse([*argv, "--generate", "--resume", "x"])
    found = []
    for job, checkpoint_ in ((parse(argv), saved), (parse(argv), replace(saved, anew=True)), (drawing, saved)):
        try:
            resume.check(checkpoint_, job)
            found.append(False)
        except UserError as error:
            was = look_up(saved.job, next(rule.field for rule in RULES if rule.flag == flag))
            assert str(error) == f"--{flag} is {OTHER[flag]}, but x.pth was trained with {was}; give --{flag} {was}"
            found.append(True)
    assert tuple(found) == REFUSED[flag]
    resume.check(saved, parse(kind))


def test_a_language_models_folder_may_move(tmp_path):
    job = parse(["--model", "JiT-B/16-Text", "--llm_model_name", str(tmp_path)])
    resume.check(saved_of(parse(TEXT_RUN), TEXT), job)  # its content is compared when it is opened


def test_a_text_model_needs_a_checkpoint_that_says_how_its_features_were_made():
    with pytest.raises(UserError, match="--model JiT-B/16-Text is a text model, but x.pth does not say how"):
        resume.check(saved_of(parse([])), parse(TEXT_RUN))


TRAINED = [
    *TEXT_RUN,
    "--cfg",
    "2.9",
    "--interval_min",
    "0.1",
    "--num_sampling_steps",
    "25",
    "--seed",
    "7",
    "--noise_scale",
    "2",
    "--img_size",
    "512",
    "--eval_ema",
    "2",
]
TRAINED += ["--data_path", "there", "--ema_decay1", "0.5", "--text_cache_dir", "store", "--trust_remote_code", "--num_workers", "3", "--precision", "bf16"]


def test_what_a_drawing_run_takes_from_its_checkpoint():
    saved = saved_of(parse(TRAINED), TEXT)
    job = completed(parse(["--generate", "--resume", "x"]), saved)
    made = from_plain(type(parse(TRAINED)), saved.job)
    assert (job.model, job.diffusion, job.averages, job.drawing) == (made.model, made.diffusion, made.averages, made.drawing)
    assert (job.data.path, job.run.seed, job.run.precision, job.text.folder, job.text.encoder.llm) == ("there", 7, "bf16", "store", "a/b")
    assert job.run.output_dir == "." and job.data.workers == 12  # where the checkpoint is; a matter of the machine
    assert not job.text.encoder.trust_remote_code  # no file may ask for code to be run

    given = [
        "--cfg",
        "1.5",
        "--interval_max",
        "0.9",
        "--seed",
        "0",
        "--data_path",
        "here",
        "--output_dir",
        "out",
        "--text_cache",
        "memory",
        "--ema_decay1",
        "0.9",
    ]
    job = completed(parse(["--generate", "--resume", "x", *given]), saved)
    assert (job.drawing.sampler.cfg_scale, job.drawing.sampler.cfg_interval, job.drawing.sampler.steps) == (1.5, (0.1, 0.9), 25)
    assert (job.run.seed, job.data.path, job.run.output_dir, job.text.cache, job.text.folder) == (0, "here", "out", "memory", None)
    assert job.averages.decay1 == 0.5  # what the averages were made with

    table = saved_of(parse([*TRAINED, "--data_format", "table", "--image_root", "pictures", "--caption_column", "cap"]), TEXT)
    kept, other = (completed(parse(["--generate", "--resume", "x", *more]), table).data for more in ([], ["--data_path", "here"]))
    assert (kept.format, kept.image_root, kept.caption_column) == ("table", "pictures", "cap")
    assert (other.format, other.image_root, other.caption_column) == ("auto", None, None)  # they belong to the other data

    job = completed(parse(["--sweep", "--resume", "x", "--eval_ema", "1,raw"]), saved)
    assert (job.sweep.weights, job.sweep.scales, job.sweep.intervals) == (("1", "raw"), (2.9,), ((0.1, 1.0),))
    job = completed(parse(["--sweep", "--resume", "x", "--interval", "0-1,0.1-1"]), saved)  # guided, as the checkpoint says
    assert len(job.sweep.intervals) == 2
    with pytest.raises(UserError, match="--sweep needs several settings"):
        completed(parse(["--sweep", "--resume", "x", "--interval", "0-1,0.1-1"]), saved_of(parse(TEXT_RUN), TEXT))
    small = saved_of(parse(["--model", "JiT-Nano/5", "--img_size", "20"]))
    assert completed(parse(["--generate", "--resume", "x", "--img_size", "20"]), small).model.img_size == 20
    with pytest.raises(UserError, match="--use_text_conditioning needs a text model; try --model JiT-Nano/5-Text"):
        completed(parse(["--generate", "--resume", "x", "--use_text_conditioning"]), small)
    job = completed(parse(["--evaluate_gen", "--resume", "x"]), saved_of(parse(["--class_num", "10"])))
    assert job.text is None and job.model.class_num == 10
    with pytest.raises(UserError, match="--held_out has no effect on the class model"):
        completed(parse(["--generate", "--resume", "x", "--held_out", "3"]), saved_of(parse([])))


def test_files_without_configs_are_completed_by_flags():
    """Published ones, and ours of before, hold flags by name; what they do not say, the command does."""
    published = {
        "model": "JiT-B/32",
        "img_size": 512,
        "noise_scale": 2.0,
        "cfg": 2.9,
        "interval_min": 0.1,
        "interval_max": 1.0,
        "proj_dropout": 0.0,
        "world_size": 8,
    }
    job = completed(parse(["--generate", "--resume", "x"]), saved_of(parse([]), job=resume.of_flags(published)))
    assert (job.model.name, job.model.img_size, job.diffusion.noise_scale, job.model.class_num) == ("JiT-B/32", 512, 2.0, 1000)
    assert job.drawing.sampler.cfg_scale == 2.9 and job.drawing.sampler.cfg_interval == (0.1, 1.0) and not job.averages.warmup
    nothing = saved_of(parse([]), job=resume.of_flags({}))
    job = completed(parse(["--generate", "--resume", "x", "--model", "JiT-B/32", "--img_size", "512"]), nothing)
    assert (job.model.name, job.model.img_size) == ("JiT-B/32", 512)
    ours = {"model": "JiT-B/16-Text", "cfg": (2.0,), "eval_ema": ("2",), "llm_layer": "last", "text_norm": "none", "ema_warmup": True, "seed": 3, "hflip": None}
    plain = resume.plain_job({"args": ours, "text": TEXT})
    assert look_up(plain, "text.encoder.layer") == "mean" and look_up(plain, "text.encoder.llm") == "a/b"  # what its features were really made with
    job = completed(parse(["--generate", "--resume", "x"]), saved_of(parse([]), TEXT, job=plain))
    assert (job.drawing.weights, job.drawing.sampler.cfg_scale, job.run.seed, job.averages.warmup, job.text.norm) == ("2", 2.0, 3, True, "standardize")


ODD = [  # where in a checkpoint, and what stands there
    ("job.model.img_size", "big"), ("job.model.img_size", -16), ("job.model.name", "JiT-XXL/1"), ("job.model.name", 3), ("job.drawing.sampler.steps", 0),
    ("job.drawing.sampler.cfg_interval", 0.5), ("job.drawing.sampler.cfg_interval", (0.1, 0.2, 0.3)), ("job.drawing", 3), ("job.data.path", None),
    ("job.text", "abc"), ("job.text.encoder", "abc"), ("job.text.encoder.llm", ["a"]), ("job", "abc"), ("text", torch.zeros(1)), ("text", {}), ("text.llm", 5),
    ("model_ema1", [1]), ("optimizer", None), ("optimizer", {"x": 5}), ("step", "5"), ("epoch", 0.5), ("epoch", -7), ("epoch_step", "1"), ("epoch_step", 50),
    ("skips", torch.zeros(3)), ("skips", "no"), ("world", "x"), ("world", {}), ("world.processes", "two"), ("evaluation_due", "yes"), ("model", {}),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained_file(llm_folder, tmp_path_factory):
    out, data = tmp_path_factory.mktemp("trained"), write_text_data(tmp_path_factory.mktemp("data"))
    run(*flags(data, llm_folder(), out, "--batch_size", 4, "--epochs", 1))
    return flags(data, llm_folder(), out, "--batch_size", 4, "--epochs", 2), torch.load(out / checkpoint.LAST, weights_only=True)


@pytest.mark.parametrize("path, value", ODD, ids=[f"{path}={str(value)[:12]}" for path, value in ODD])
def test_a_checkpoint_that_holds_something_odd_is_used_or_ends_in_one_line(path, value, trained_file, tmp_path):
    argv, state = trained_file
    state = copy.deepcopy(state)
    put(state, path, value)
    torch.save(state, tmp_path / checkpoint.LAST)
    for attempt in (
        ["--generate", "--resume", str(tmp_path), "--device", "cpu", "--prompt", "猫"],
        [*argv, "--resume", str(tmp_path), "--output_dir", str(tmp_path / "new")],
    ):
        try:
            run(*attempt)
        except UserError as error:
            assert str(error) and "\n" not in str(error)


def test_a_run_lets_go_of_the_file_that_it_went_on_from(text_data, llm_folder, tmp_path, monkeypatch):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 4, "--resume", tmp_path / "out")
    run(*argv, "--epochs", "1")
    held, take = [], engine_jit.take_step

    def look(*rest):
        held.append([line for line in Path("/proc/self/maps").read_text().splitlines() if "checkpoint-last.pth" in line])
        return take(*rest)

    monkeypatch.setattr(engine_jit, "take_step", look)
    saved = resume.read(tmp_path / "out" / checkpoint.LAST)
    assert any("checkpoint-last.pth" in line for line in Path("/proc/self/maps").read_text().splitlines())  # as long as it is open
    saved.close()
    del saved
    run(*argv, "--epochs", "2")
    assert held == [[], []]
    monkeypatch.undo()
    run("--generate", "--resume", str(tmp_path / "out"), "--device", "cpu")
    assert not any("checkpoint-last.pth" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_drawing_and_evaluating_need_resume_alone(text_data, llm_folder, clip_folder, tmp_path, capsys):
    out, argv = tmp_path / "out", flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 4, "--epochs", 1, "--cfg", "2.9", "--seed", 5)
    run(*argv)
    capsys.readouterr()
    run("--generate", "--resume", str(out), "--device", "cpu", "--prompt", "赤い三")
    assert "cfg 2.9 in 0-1, heun 2, seed 5" in capsys.readouterr().out
    alone = (out / "samples" / "0000.png").read_bytes()
    run(*argv, "--generate", "--resume", str(out), "--prompt", "赤い三", "--output_dir", str(tmp_path / "spelled"))
    assert (tmp_path / "spelled" / "samples" / "0000.png").read_bytes() == alone
    run(
        "--evaluate_gen",
        "--resume",
        str(out / checkpoint.LAST),
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--num_images",
        "6",
        "--clip_model",
        str(clip_folder()),
    )
    (record,) = (out / "eval").glob("*.json")
    assert '"cfg_scale": 2.9' in record.read_text()

    moved = tmp_path / "moved"
    shutil.copytree(llm_folder(), moved)
    run("--generate", "--resume", str(out), "--device", "cpu", "--llm_model_name", str(moved), "--prompt", "赤い三")
    assert (out / "samples" / "0000.png").read_bytes() == alone
    with pytest.raises(UserError, match="--llm_model_name is no/model, but .* was trained with"):
        state = torch.load(out / checkpoint.LAST, weights_only=True)
        state["text"]["llm"] = "a/hub-name"
        torch.save(state, tmp_path / "hub.pth")
        run("--generate", "--resume", str(tmp_path / "hub.pth"), "--device", "cpu", "--llm_model_name", "no/model")


def test_a_checkpoint_of_the_version_before_resumes_and_draws(text_data, llm_folder, tmp_path):
    """It held the flags, by name, as `args`."""
    argv = flags(text_data, llm_folder(), tmp_path / "new", "--batch_size", 4, "--resume", tmp_path / "new")
    run(*argv, "--epochs", "1")
    state = torch.load(tmp_path / "new" / checkpoint.LAST, weights_only=True)
    job = from_plain(type(parse(argv)), state.pop("job"))
    state["args"] = {
        "model": job.model.name, "img_size": 16, "noise_scale": 1.0, "P_mean": -0.8, "seed": 0, "held_out": 64, "cfg": (2.0,), "eval_ema": ("1",),
        "interval_min": 0.0, "interval_max": 1.0, "ema_decay1": 0.9999, "ema_decay2": 0.9996, "ema_warmup": True, "data_path": str(text_data), "is_text": True,
        "num_sampling_steps": 2, "sampling_method": "heun", "text_cache": "disk", "text_cache_dir": None, "freeze_llm": True, "missing_captions": "error",
    }  # fmt: skip
    os.makedirs(tmp_path / "old")
    torch.save(state, tmp_path / "old" / checkpoint.LAST)
    for place in ("old", "new"):
        run(*flags(text_data, llm_folder(), tmp_path / place, "--batch_size", 4, "--epochs", 2, "--resume", tmp_path / place))
    old, new = weights(tmp_path / "old"), weights(tmp_path / "new")
    assert old["step"] == 4 and all(torch.equal(value, new["model"][name]) for name, value in old["model"].items())
    torch.save(state, tmp_path / "old" / "one.pth")
    run("--generate", "--resume", str(tmp_path / "old" / "one.pth"), "--device", "cpu", "--prompt", "赤い三")
    assert (tmp_path / "old" / "samples" / "0000.png").is_file()


def test_the_list_of_broken_pictures_is_written_before_too_many_end_the_run(tmp_path, llm_folder):
    data = write_text_data(tmp_path / "data", 120)
    for i in (7, 8):
        (data / "images" / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"2 of 120 pictures cannot be read, over 1 %; .*bad_images.txt lists them, the first is .*\.png") as error:
        run(*flags(data, llm_folder(), tmp_path / "out", "--batch_size", 40, "--epochs", 3, "--held_out", 0))
    assert "\n" not in str(error.value)
    listed = (tmp_path / "out" / "bad_images.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in listed] == [str(data / "images" / f"{i}.png") for i in (7, 8)]


def test_a_base_learning_rate_trains(text_data, llm_folder, tmp_path, capsys):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 4, "--epochs", 1, "--blr", "1e-2")
    run(*[part for part in argv if part not in ("--lr", "1e-3")])
    assert "lr 1.56" in capsys.readouterr().out and weights(tmp_path / "out")["step"] == 2
    small = [*(part for part in argv[:-2] if part not in ("--lr", "1e-3")), "--blr", "1e-6", "--lr_schedule", "cosine", "--min_lr", "1e-2"]
    run(*small, "--output_dir", str(tmp_path / "small"))
    said = capsys.readouterr().out
    assert "training will be very slow" in said and "warning: --min_lr 0.01 is above the peak, 1.6e-08: the learning rate will rise to it" in said
    run(*small, "--output_dir", str(tmp_path / "tuned"), "--init_from", str(tmp_path / "out"))
    assert "training will be very slow" not in capsys.readouterr().out  # a small rate is what fine-tuning wants


def test_each_ranks_broken_pictures_are_listed_and_counted_together(tmp_path):
    def work(limit):
        broken = Broken(tmp_path, limit, "skip")
        broken.note([f"/{dist.rank()}.png: OSError: é"])
        broken.write()

    in_ranks(2, lambda: work(1000))
    assert (tmp_path / "bad_images.txt").read_text(encoding="utf-8").splitlines() == ["/0.png: OSError: é", "/1.png: OSError: é"]

    def too_many():
        with pytest.raises(UserError, match="2 of 150 pictures cannot be read"):  # neither rank alone has met over 1 %
            work(150)

    in_ranks(2, too_many)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_images.txt"]
