"""Training as a whole, at toy size: resuming, ranks, accumulation, the frozen LLM, what stops a run."""

import multiprocessing
import time

import pytest
import torch
from conftest import in_ranks, load_encoder, write_text_data
from PIL import Image

import engine_jit
import main_jit
from config import DiffusionConfig
from datasets.captioned import CaptionedPictures
from denoiser import sample_time
from evaluation import text_gap
from flags import parse
from text_encoder import LanguageModel
from util import checkpoint
from util.errors import UserError

TINY = ["--model", "JiT-Pico/8-Text", "--img_size", "16", "--device", "cpu", "--num_workers", "0", "--lr", "1e-3", "--log_freq", "4"]
SAMPLING = ["--num_sampling_steps", "2", "--cfg", "2", "--num_images", "6", "--gen_bsz", "4"]


def flags(data, llm, out, *more):
    return [*TINY, "--data_path", str(data), "--llm_model_name", str(llm), "--output_dir", str(out), "--warmup_epochs", "1", *SAMPLING, *map(str, more)]


def run(*argv):
    """main_jit in this process; a UserError comes through."""
    main_jit.run(parse(list(argv)))


def weights(out, name="checkpoint-last.pth"):
    return checkpoint.load(out / name)


def assert_same_training(a, b, exact=True):
    assert a["step"] == b["step"] and a["epoch"] == b["epoch"]
    for key in ("model", "model_ema1", "model_ema2"):
        for name, value in a[key].items():
            if exact:
                assert torch.equal(value, b[key][name]), (key, name)
            else:
                torch.testing.assert_close(value, b[key][name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    for name, state in a["optimizer"].items():
        assert not exact or all(torch.equal(value, b["optimizer"][name][key]) for key, value in state.items()), name


def scalars(out, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out))
    events.Reload()
    return [event.value for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else None


def moved(state):
    """How far training took the weights that start at zero."""
    return state["model"]["net.final_layer.linear.weight"].abs().max().item()


class Reading:
    """Which samples have been read, in any process."""

    def __init__(self, file, monkeypatch):
        self.file, read = file, CaptionedPictures.__getitem__

        def noted(data, key):
            with file.open("a") as notes:
                notes.write(f"{key[1]}\n")
            return read(data, key)

        monkeypatch.setattr(CaptionedPictures, "__getitem__", noted)

    def samples(self):
        return [int(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []


def test_loader_processes_live_through_an_epochs_end_and_read_on(text_data, llm_folder, tmp_path, monkeypatch):
    reading, train, alive = Reading(tmp_path / "read", monkeypatch), engine_jit.train_one_epoch, []

    def watched(training, *rest):
        due = train(training, *rest)
        wanted, patience = min(2 * training.state.step + 4, 24), time.monotonic() + 30  # two batches are read ahead
        while len(reading.samples()) < wanted and time.monotonic() < patience:
            time.sleep(0.01)
        assert reading.samples() == list(range(wanted))
        alive.append({process.pid for process in multiprocessing.active_children()})
        return due

    monkeypatch.setattr(engine_jit, "train_one_epoch", watched)
    run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 2, "--epochs", 3, "--num_workers", 1))
    assert len(alive[0]) == 1 and alive[0] == alive[1] == alive[2] and multiprocessing.active_children() == []
    assert reading.samples() == list(range(24))  # nothing past the run's end


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_cut_off_within_an_epoch_reads_what_was_left_to_the_same_end(text_data, llm_folder, tmp_path, monkeypatch, workers):
    def argv(out):
        return flags(text_data, llm_folder(), out, "--batch_size", 2, "--epochs", 4, "--accum_iter", 2, "--num_workers", workers, "--resume", out)

    def cut_off(state, *rest):
        if state.step == 5:
            raise UserError("cut off")
        return take(state, *rest)

    run(*argv(tmp_path / "whole"))
    take = engine_jit.take_step
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cut off"):
        patch.setattr(engine_jit, "take_step", cut_off)
        run(*argv(tmp_path / "cut"), "--save_freq_steps", "1")
    assert multiprocessing.active_children() == []
    reading = Reading(tmp_path / "read", monkeypatch)
    run(*argv(tmp_path / "cut"))
    assert sorted(reading.samples()) == list(range(20, 32))  # from step 5 of 8 on, the second of an epoch
    assert_same_training(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize("extra", [[], ["--proj_dropout", "0.3", "--attn_dropout", "0.2"], ["--precision", "bf16"]])
def test_n_and_n_resumed_epochs_equal_2n(text_data, llm_folder, tmp_path, extra):
    common = ["--batch_size", 4, *extra]
    run(*flags(text_data, llm_folder(), tmp_path / "whole", *common, "--epochs", 4))
    for epochs in (2, 4):
        run(*flags(text_data, llm_folder(), tmp_path / "parts", *common, "--epochs", epochs, "--resume", tmp_path / "parts"))
    whole = weights(tmp_path / "whole")
    assert whole["step"] == 8 and whole["epoch"] == 3 and moved(whole) > 1e-4
    assert_same_training(whole, weights(tmp_path / "parts"))


def test_accumulated_parts_take_the_step_of_the_whole_batch(text_data, llm_folder, tmp_path):
    run(*flags(text_data, llm_folder(), tmp_path / "a", "--batch_size", 4, "--epochs", 2))
    run(*flags(text_data, llm_folder(), tmp_path / "b", "--batch_size", 2, "--accum_iter", 2, "--epochs", 2))
    assert_same_training(weights(tmp_path / "a"), weights(tmp_path / "b"), exact=False)


def test_two_ranks_train_evaluate_resume_and_equal_one_process_with_the_double_batch(text_data, llm_folder, tmp_path, capfd):
    one, two = tmp_path / "one", tmp_path / "two"
    run(*flags(text_data, llm_folder(), one, "--batch_size", 4, "--epochs", 2, "--grad_clip", "1"))
    parts = ["--batch_size", 2, "--grad_clip", "1", "--online_eval", "--resume", two]
    for epochs in (1, 2):
        in_ranks(2, lambda epochs=epochs: run(*flags(text_data, llm_folder(), two, *parts, "--epochs", epochs)))
    printed = capfd.readouterr().out
    assert printed.count("resumed") == 1 and "next epoch 1, step 2" in printed
    assert "FID and IS are left out" in printed  # the tests' cache has no Inception weights
    a, b = weights(one), weights(two)
    assert moved(a) > 1e-4
    assert_same_training(a, b, exact=False)


def test_the_llm_is_bit_identical_after_training_and_in_no_checkpoint(text_data, llm_folder, tmp_path, monkeypatch):
    encoders = []
    load = LanguageModel.load
    monkeypatch.setattr(LanguageModel, "load", lambda *args: encoders.append(load(*args)) or encoders[-1])
    run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 4, "--epochs", 1))
    fresh = load_encoder(llm_folder())
    llm = encoders[0].llm
    assert not any(module.training for module in llm.modules())
    assert all(torch.equal(value, fresh.llm.state_dict()[name]) for name, value in llm.state_dict().items())
    state = weights(tmp_path / "out")
    assert not any("llm" in name or "embed_tokens" in name for key in ("model", "model_ema1", "optimizer") for name in state[key])
    assert state["text"]["width"] == 32 and state["text"]["pooling"] == "mean"
    torch.load(tmp_path / "out" / "checkpoint-last.pth", weights_only=True)  # plain data only


def test_class_models_train_evaluate_and_draw(class_data, tmp_path):
    common = ["--model", "JiT-Pico/8", "--img_size", "16", "--class_num", "3", "--device", "cpu", "--num_workers", "0", "--batch_size", "4", *SAMPLING]
    out = tmp_path / "out"
    common += ["--data_path", str(class_data), "--output_dir", str(out)]
    run(*common, "--epochs", "2", "--online_eval", "--warmup_epochs", "0")
    run(*common, "--generate", "--resume", str(out), "--prompt", "2", "--prompt", "0")
    assert (out / "samples" / "0001.png").is_file() and (out / "samples" / "prompts.txt").read_text() == "2\n0\n"
    with pytest.raises(UserError, match="label numbers from 0 to 2"):
        run(*common, "--generate", "--resume", str(out), "--prompt", "3")


def test_a_trained_model_recalls_the_picture_of_each_caption(tmp_path, llm_folder):
    """The least that conditioning must do: four captions, four flat colours, drawn apart again."""
    colours = {"赤い三": (220, 0, 0), "富士山と桜の写真、2024年春": (0, 160, 0), "a black cat on a chair": (0, 0, 200), "ﾊﾝｶｸとＦＵＬＬ": (240, 240, 240)}
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("images", "captions"):
        (data / name).mkdir(parents=True)
    for i, (caption, colour) in enumerate(colours.items()):
        Image.new("RGB", (16, 16), colour).save(data / "images" / f"{i}.png")
        (data / "captions" / f"{i}.txt").write_text(caption, encoding="utf-8")
    argv = flags(data, llm_folder(), out, "--batch_size", 32, "--epochs", 60, "--save_last_freq", 60, "--log_freq", 2)
    run(*argv)
    prompts = [part for caption in colours for part in ("--prompt", caption)]
    run(*argv, "--generate", "--resume", str(out), *prompts)
    for i, colour in enumerate(colours.values()):
        drawn = torch.tensor(list(Image.open(out / "samples" / f"{i:04d}.png").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))))
        nearest = min(colours.values(), key=lambda other: (drawn - torch.tensor(other)).square().sum().item())
        assert nearest == colour, (i, drawn)
    gap = {name: scalars(out, f"text_gap/{name}") for name in ("loss", "shuffled", "null")}
    assert abs(gap["shuffled"][0]) < 0.05 and gap["shuffled"][-1] > 10 * gap["loss"][-1] and gap["null"][-1] > gap["loss"][-1]


def test_evaluation_leaves_the_training_state_as_it_was(text_data, llm_folder, tmp_path):
    for name, extra in (("plain", []), ("evaluated", ["--online_eval", "--eval_freq", 1])):
        run(*flags(text_data, llm_folder(), tmp_path / name, "--batch_size", 4, "--epochs", 3, "--proj_dropout", "0.1", *extra))
    assert_same_training(weights(tmp_path / "plain"), weights(tmp_path / "evaluated"))


def test_broken_pictures_are_listed_and_too_many_stop_the_run(tmp_path, llm_folder):
    data = write_text_data(tmp_path / "data", 120)
    (data / "images" / "7.png").write_bytes(b"broken")
    argv = flags(data, llm_folder(), tmp_path / "out", "--batch_size", 40, "--epochs", 1, "--held_out", 0)
    run(*argv)
    assert "7.png" in (tmp_path / "out" / "bad_images.txt").read_text()
    with pytest.raises(UserError, match=r"7\.png.*--bad_images skip"):
        run(*argv, "--bad_images", "error", "--output_dir", str(tmp_path / "other"))
    (data / "images" / "8.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="2 of 120 pictures cannot be read, over 1 %"):
        run(*argv, "--output_dir", str(tmp_path / "third"))


def test_a_forgotten_resume_does_not_overwrite_a_checkpoint(text_data, llm_folder, tmp_path):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 4, "--epochs", 1)
    run(*argv)
    with pytest.raises(UserError, match="exists already; to continue that run give --resume"):
        run(*argv)


def test_five_pictures_and_the_default_batch_size(tmp_path, llm_folder, capsys):
    run(*flags(write_text_data(tmp_path / "data", 5), llm_folder(), tmp_path / "out", "--epochs", 1))
    printed = capsys.readouterr().out
    assert "a step takes 128 pictures and there are 5" in printed and "1 steps per epoch" in printed


def test_a_small_batch_under_blr_is_warned_about(text_data, llm_folder, tmp_path, capsys):
    argv = [flag for flag in flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 8, "--epochs", 1) if flag not in ("--lr", "1e-3")]
    run(*argv)
    printed = capsys.readouterr().out
    assert "lr 1.56" in printed and "below 2e-05" in printed and "--accum_iter" in printed


def test_a_checkpoint_of_another_setting_is_refused_in_one_line(text_data, llm_folder, tmp_path):
    out = tmp_path / "out"
    argv = flags(text_data, llm_folder(), out, "--batch_size", 4, "--epochs", 1)
    run(*argv)
    for extra, message in [
        (["--model", "JiT-Pico/4-Text"], "--model is JiT-Pico/4-Text, but .* was trained with JiT-Pico/8-Text"),
        (["--img_size", "32"], "--img_size"),
        (["--noise_scale", "2"], "--noise_scale"),
        (["--max_text_len", "33"], "--max_text_len"),
        (["--text_norm", "none"], "--text_norm"),
        (["--llm_layer", "last"], "--llm_layer"),
        (["--llm_model_name", str(llm_folder("bert"))], "--llm_model_name"),
    ]:
        with pytest.raises(UserError, match=message):
            run(*argv, *extra, "--generate", "--resume", str(out))


def test_a_published_class_checkpoint_resumes_and_draws(class_data, tmp_path, monkeypatch):
    """Keys as the published files have them: `net.` names, an optimizer by position, a Namespace."""
    import argparse

    from models_jit import build_model

    state = {f"net.{name}": value for name, value in build_model("JiT-Pico/8", input_size=16, num_classes=3).state_dict().items()}
    args = argparse.Namespace(model="JiT-Pico/8", img_size=16, class_num=3, noise_scale=1.0)
    optimizer = {"state": {0: {}}, "param_groups": [{"params": [0]}]}
    path = tmp_path / "checkpoint-last.pth"
    torch.save({"model": state, "model_ema1": state, "model_ema2": state, "optimizer": optimizer, "epoch": 1, "args": args}, path)
    common = ["--model", "JiT-Pico/8", "--img_size", "16", "--class_num", "3", "--device", "cpu", "--num_workers", "0", *SAMPLING]
    common += ["--data_path", str(class_data), "--output_dir", str(tmp_path / "out"), "--resume", str(tmp_path)]
    run(*common, "--generate")
    assert len(list((tmp_path / "out" / "samples").glob("0*.png"))) == 3
    (tmp_path / "elsewhere" / "data").mkdir(parents=True)  # named as the flag's default, and of no concern
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        run("--evaluate_gen", "--save_images", "--resume", str(path), "--output_dir", "drawn", "--device", "cpu", *SAMPLING)
    assert len(list((tmp_path / "elsewhere" / "drawn" / "eval").glob("*/*.png"))) == 6
    run(*common, "--epochs", "3", "--batch_size", "4", "--warmup_epochs", "0")
    assert weights(tmp_path / "out")["epoch"] == 2 and weights(tmp_path / "out")["step"] == 2 * 3 + 3


class FlatPictures:
    """Picture i is one grey everywhere; its caption is number i."""

    greys = torch.tensor([0, 51, 153, 255], dtype=torch.uint8)

    def readable(self, index):
        return self.greys[index].expand(3, 4, 4), index, []

    def condition(self, index, n):
        return index


def flat_conditions(lines):
    return FlatPictures.greys[lines].float() / 127.5 - 1


flat_conditions.null = torch.zeros(1)


def test_the_text_gap_in_closed_form():
    diffusion = DiffusionConfig(noise_scale=2.0)
    chosen = text_gap.choose(FlatPictures(), range(4), 64)

    class Draws(torch.nn.Module):  # exactly the picture that y tells of
        def forward(self, z_t, t, y):
            return y.view(-1, 1, 1, 1).expand_as(z_t)

    class Deaf(torch.nn.Module):
        def forward(self, z_t, t, y):
            return z_t * 0.5

    def gap(net):
        return {name: value.item() for name, value in text_gap.TextGap(chosen, flat_conditions, diffusion, 0, 5, torch.device("cpu"))(net).items()}

    found = gap(Draws())
    grey = flat_conditions(torch.arange(64) % 4)
    t = sample_time(torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(64) + 0.5) / 64), diffusion)
    weight = 1 / (1 - t).clamp_min(0.05) ** 2
    assert found["text_gap/loss"] == pytest.approx(0, abs=1e-6)
    assert found["text_gap/shuffled"] == pytest.approx((weight * (grey - grey.roll(1)).square()).mean().item(), rel=1e-4)
    assert found["text_gap/null"] == pytest.approx((weight * grey.square()).mean().item(), rel=1e-4)
    deaf = gap(Deaf())
    assert deaf["text_gap/loss"] > 0.1 and deaf["text_gap/shuffled"] == deaf["text_gap/null"] == 0


def test_measuring_the_text_gap_changes_nothing(text_data, llm_folder, tmp_path, class_data):
    for name, often in (("often", 1), ("once", 100)):
        run(*flags(text_data, llm_folder(), tmp_path / name, "--batch_size", 4, "--epochs", 2, "--proj_dropout", "0.2", "--log_freq", often))
    assert_same_training(weights(tmp_path / "often"), weights(tmp_path / "once"))
    assert len(scalars(tmp_path / "often", "text_gap/shuffled")) == 4 and len(scalars(tmp_path / "once", "text_gap/shuffled")) == 1
    common = ["--model", "JiT-Pico/8", "--img_size", "16", "--class_num", "3", "--device", "cpu", "--num_workers", "0", "--batch_size", "4", "--epochs", "1"]
    run(*common, "--data_path", str(class_data), "--output_dir", str(tmp_path / "class"))
    assert scalars(tmp_path / "class", "train_loss") and scalars(tmp_path / "class", "text_gap/shuffled") is None


def test_wherever_the_features_come_from_the_training_is_the_same(text_data, llm_folder, tmp_path):
    common = ["--batch_size", 4, "--epochs", 2]
    for cache in ("disk", "memory", "off"):
        run(*flags(text_data, llm_folder(), tmp_path / cache, *common, "--text_cache", cache))
    run(*flags(text_data, llm_folder(), tmp_path / "workers", *common, "--num_workers", 1))
    disk = weights(tmp_path / "disk")
    assert (text_data / "text_cache" / "manifest.json").is_file() and moved(disk) > 1e-4
    for cache in ("memory", "workers"):
        assert_same_training(disk, weights(tmp_path / cache))
    off = weights(tmp_path / "off")
    for name, value in disk["model"].items():
        assert (value - off["model"][name]).abs().mean() < 0.05 * 1e-3 * disk["step"], name  # Adam's steps are lr long, whatever the gradient


def test_an_evaluation_encodes_only_the_captions_that_it_draws(text_data, llm_folder, tmp_path, capsys):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 4, "--epochs", 1)
    run(*argv)
    capsys.readouterr()
    run(*argv, "--resume", str(tmp_path / "out"), "--evaluate_gen", "--save_images", "--num_images", "2", "--text_cache_dir", str(tmp_path / "new"))
    assert "holds 0 of 13 texts" in capsys.readouterr().out  # two captions, ten test prompts, the empty one
    run(*argv, "--resume", str(tmp_path / "out"), "--evaluate_gen", "--save_images")
    assert "the LLM is not loaded" in capsys.readouterr().out
