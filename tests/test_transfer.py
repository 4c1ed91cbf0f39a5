"""--init_from: every tensor copied, made, new or dropped; what the network did without a condition it goes on doing; a run that begins, and goes on."""

import re

import pytest
import torch
from conftest import wake, write_text_data
from test_training import flags, run, weights
from torch._subclasses import FakeTensorMode

import models_jit
import models_mmjit
from config import DiffusionConfig
from flags import parse
from models_jit import JiT, interleaved
from resume import Saved
from transfer import check_origin, say_noise, transfer
from util.errors import UserError
from util.schedule import Progress
from util.text import Text

SIZE = {"input_size": 16}


def jit(name, seed=0, **kwargs):
    return wake(models_jit.build_model(name, **SIZE, **({"num_classes": 10} | kwargs)), seed).eval()


def mmjit(name="MMJiT-Nano/4", seed=0, text_dim=24):
    return wake(models_mmjit.build_model(name, **SIZE, text_dim=text_dim), seed).eval()


def saved(net, path="origin.pth", name=None):
    state = {f"net.{key}": value.clone() for key, value in net.state_dict().items()}
    return Saved(path, state, [state, state], Progress(epoch=0), {"model": {"name": name}} if name else {}, {})


def begun(origin, net, same_text=False, null=None):
    report = transfer(saved(origin), net, same_text, torch.zeros(1) if null is None else null)
    told = [*report.copied, *report.made, *report.new]
    assert sorted(told) == sorted(name for name in net.state_dict() if name != "pos_embed")  # each once
    assert set(report.dropped) == {name for name in origin.state_dict() if name not in net.state_dict()}
    for name in report.copied:
        assert torch.equal(net.state_dict()[name], origin.state_dict()[name]), name
    return report


def pictures(net, y, t=(0.1, 0.5, 0.9)):
    torch.manual_seed(1)
    with torch.no_grad():
        return net(torch.randn(3, 3, 16, 16), torch.tensor(t), y)


def test_from_classes_to_pooled_text_the_nulls_output_stays():
    origin, net, null = jit("JiT-Nano/4"), jit("JiT-Nano/4-Text", 1, text_dim=24), torch.randn(1, 24)
    report = begun(origin, net, null=null)
    assert set(report.made) == {"y_embedder.proj.weight", "y_embedder.proj.bias"} and not report.new
    wanted = pictures(origin, torch.full((3,), 10))
    assert wanted.std() > 0.1
    torch.testing.assert_close(pictures(net, null.expand(3, -1)), wanted, rtol=0, atol=1e-5)
    captions, table = net.y_embedder(torch.randn(2000, 24)), origin.y_embedder.embedding_table.weight[:-1]
    spread = lambda rows: rows.var(0).mean().sqrt().item()  # noqa: E731
    assert spread(captions) == pytest.approx(spread(table), rel=0.1)  # captions differ as classes did


def unturned(net: JiT) -> JiT:
    """Without RoPE on the caption's tokens, which class and pooled models do not have."""
    count = net.in_context_len
    net.rope_with_context[:count] = interleaved(torch.zeros(count, net.rope.shape[1] // 4))
    return net


def test_from_classes_to_tokens_the_nulls_output_stays():
    """Exactly where there are as many tokens as in-context tokens were, but for RoPE."""
    origin, net = jit("JiT-Nano/4"), jit("JiT-Nano/4-Tokens", 1, text_dim=24, text_len=8)
    fresh = net.y_embedder.proj.weight.clone()
    report = begun(origin, net)
    assert set(report.made) == {"y_embedder.proj.bias", "y_embedder.mask_token", "t_embedder.mlp.2.bias"} and report.new == ["y_embedder.proj.weight"]
    assert torch.equal(net.y_embedder.proj.weight, fresh)  # as loud as from scratch
    torch.testing.assert_close(pictures(unturned(net), Text.null(8, 24).expand(3)), pictures(origin, torch.full((3,), 10)), rtol=0, atol=1e-5)
    longer = jit("JiT-Nano/4-Tokens", 1, text_dim=24, text_len=20)
    assert "the first 8 copied" in begun(origin, longer).made["in_context_posemb"]
    assert torch.equal(longer.in_context_posemb[:, :8], origin.in_context_posemb)


@pytest.mark.parametrize(
    ("old", "new", "same_text"),
    [("", "-Text", False), ("", "-Tokens", False), ("-Text", "-Tokens", True), ("-Text", "-Text", False), ("-Tokens", "-Tokens", False)],
)
def test_a_network_on_a_gpu_takes_weights_that_lie_in_memory(old, new, same_text):
    """Told by tensors without values: torch refuses an operation on two devices all the same."""
    with FakeTensorMode():
        sizes = {"": {}, "-Text": {"text_dim": 24}, "-Tokens": {"text_dim": 24, "text_len": 20}}
        origin = models_jit.build_model(f"JiT-Nano/4{old}", **SIZE, num_classes=10, **sizes[old])
        with torch.device("cuda"):
            net = models_jit.build_model(f"JiT-Nano/4{new}", **SIZE, num_classes=10, **sizes[new])
        assert net.t_embedder.mlp[0].weight.is_cuda
        transfer(saved(origin), net, same_text, torch.zeros(1, 24, device="cuda"))


def test_from_pooled_text_to_tokens_the_mean_captions_output_stays():
    origin, net = jit("JiT-Nano/4-Text", text_dim=24), jit("JiT-Nano/4-Tokens", 1, text_dim=24, text_len=8)
    report = begun(origin, net, same_text=True)
    assert "y_embedder.proj.weight" in report.copied
    torch.testing.assert_close(pictures(unturned(net), Text.null(8, 24).expand(3)), pictures(origin, torch.zeros(3, 24)), rtol=0, atol=1e-5)


def test_to_another_language_model_nulls_stay():
    origin, net = jit("JiT-Nano/4-Tokens", text_dim=24, text_len=8), jit("JiT-Nano/4-Tokens", 1, text_dim=40, text_len=8)
    assert set(begun(origin, net).made) == {"y_embedder.proj.weight", "y_embedder.proj.bias", "y_embedder.mask_token"}
    torch.testing.assert_close(pictures(net, Text.null(8, 40).expand(3)), pictures(origin, Text.null(8, 24).expand(3)), rtol=0, atol=1e-5)
    origin, net = jit("JiT-Nano/4-Text", text_dim=24), jit("JiT-Nano/4-Text", 1, text_dim=40)
    begun(origin, net)
    torch.testing.assert_close(pictures(net, torch.zeros(3, 40)), pictures(origin, torch.zeros(3, 24)), rtol=0, atol=1e-5)  # the mean caption's
    origin, net = mmjit(), mmjit(seed=1, text_dim=192)  # wider than the network, so that any vector can enter
    assert set(begun(origin, net).made) == {"txt_embedder.weight", "mask_token"}
    torch.testing.assert_close(pictures(net, Text.null(8, 192).expand(3)), pictures(origin, Text.null(8, 24).expand(3)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_a_mask_token_is_no_louder_than_it_must_be(seed):
    """Where a language model is as wide as the network, what a vector has to be to enter exactly is tens of times as large as a token."""
    origin, net = mmjit(), mmjit(seed=1 + seed, text_dim=128)
    begun(origin, net)
    old, new = (model.mask_token.flatten() @ model.txt_embedder.weight.T for model in (origin, net))
    exact = torch.linalg.lstsq(net.txt_embedder.weight, old[:, None]).solution
    assert net.mask_token.square().mean().sqrt() < 0.5 * exact.square().mean().sqrt() and (new - old).norm() < 0.5 * old.norm()


def test_from_classes_to_other_classes_each_begins_as_the_null():
    origin, net = jit("JiT-Nano/4"), jit("JiT-Nano/4", 1, num_classes=3)
    report = begun(origin, net)
    assert list(report.made) == ["y_embedder.embedding_table.weight"] and not report.new and not report.dropped
    for label in (0, 3):  # 3 is the new null
        assert torch.equal(pictures(net, torch.full((3,), label)), pictures(origin, torch.full((3,), 10)))


def test_other_noise_than_the_origins_is_told(capsys):
    origin = saved(mmjit())
    origin.job["diffusion"] = {"noise_scale": 2.0, "P_mean": -0.8, "P_std": 0.8}
    say_noise(origin, DiffusionConfig(noise_scale=2.0))
    assert capsys.readouterr().out == ""
    say_noise(origin, DiffusionConfig())
    assert capsys.readouterr().out == "--init_from origin.pth was trained with --noise_scale 2; this run has 1\n"
    say_noise(saved(mmjit()), DiffusionConfig())  # which says nothing of its noise
    assert capsys.readouterr().out == ""


def test_the_same_features_are_a_copy():
    text = Text(torch.randn(3, 8, 24), torch.rand(3, 8) < 0.5)
    for origin, net, y in (
        (jit("JiT-Nano/4-Tokens", text_dim=24, text_len=8), jit("JiT-Nano/4-Tokens", 1, text_dim=24, text_len=8), text),
        (mmjit(), mmjit(seed=1), text),
        (jit("JiT-Nano/4-Text", text_dim=24), jit("JiT-Nano/4-Text", 1, text_dim=24), torch.randn(3, 24)),
        (jit("JiT-Nano/4"), jit("JiT-Nano/4", 1), torch.tensor([0, 3, 10])),
    ):
        report = begun(origin, net, same_text=True)
        assert not report.made and not report.new and not report.dropped
        assert torch.equal(pictures(net, y), pictures(origin, y))


def test_patches_of_another_size_are_new():
    origin, net = mmjit("MMJiT-Nano/4"), mmjit("MMJiT-Nano/8")
    assert set(begun(origin, net, same_text=True).new) == {"img_embedder.proj1.weight", "final_layer.linear.weight", "final_layer.linear.bias"}


def test_what_cannot_be_of_use_is_one_line():
    for origin, name, words in (
        ("JiT-B/16", "MMJiT-B/16", "is JiT-B, and --model MMJiT-B/16 is another network"),
        ("JiT-L/16", "JiT-B/16-Tokens", "is JiT-L"),
        ("JiT-B/16-Tokens", "JiT-B/16-Text", "weights can go from labels to pooled to tokens, but not back"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            check_origin(saved(torch.nn.Linear(1, 1), name=origin), name)
    check_origin(saved(torch.nn.Linear(1, 1)), "JiT-B/16")  # a file that does not say what it is of
    with pytest.raises(UserError, match=r"blocks\.0\.\S+ is not there or of another shape"):
        transfer(saved(mmjit()), jit("JiT-Nano/4"), False, torch.zeros(1))


def test_flags_that_contradict_are_one_line(tmp_path):
    with pytest.raises(UserError, match="--init_from starts a new run and --resume continues one"):
        parse(["--init_from", "a", "--resume", "b", "--output_dir", "c"])
    assert parse(["--init_from", "a", "--resume", "b/", "--output_dir", "b"]).train.init_from == "a"
    with pytest.raises(UserError, match="--init_from is for training"):
        parse(["--generate", "--init_from", "a", "--resume", "b"])
    with pytest.raises(UserError, match="--init_from nowhere: no such file or folder"):
        run("--model", "JiT-Pico/8", "--init_from", "nowhere", "--output_dir", str(tmp_path), "--device", "cpu")


@pytest.mark.parametrize("model", ["JiT-Nano/8-Text", "JiT-Nano/8-Tokens"])
def test_a_run_begins_with_a_checkpoint_and_goes_on_with_its_own(model, class_data, text_data, llm_folder, tmp_path, capsys):
    classes = ["--model", "JiT-Nano/8", "--img_size", "16", "--class_num", "3", "--device", "cpu", "--num_workers", "0", "--batch_size", "4"]
    run(*classes, "--data_path", str(class_data), "--output_dir", str(tmp_path / "classes"), "--epochs", "1")
    begin = [*flags(text_data, llm_folder(), tmp_path / "out", "--model", model, "--batch_size", 4), "--init_from", str(tmp_path / "classes")]
    run(*begin, "--epochs", "1")
    said = capsys.readouterr().out
    assert "EMA 1: " in said and "dropped: y_embedder.embedding_table.weight" in said
    lines = (tmp_path / "out" / "init_from.txt").read_text().splitlines()
    new = {"new"} if model.endswith("Tokens") else set()  # the projection
    assert {line.split()[0] for line in lines} == {"copied", "made", "dropped"} | new and len(lines) > 50
    run(*begin, "--epochs", "2")
    said = capsys.readouterr().out
    assert "a run that was started with --init_from" in said and "next epoch 1" in said and "tensors copied" not in said
    assert weights(tmp_path / "out")["step"] == 4
    run(*begin[:-2], "--resume", str(tmp_path / "out"), "--epochs", "3")
    run(*begin, "--epochs", "4")  # it is still known what it was begun with
    assert weights(tmp_path / "out")["step"] == 8


def test_a_second_stage_keeps_the_statistics_of_the_first(llm_folder, tmp_path):
    data = [write_text_data(tmp_path / name, count) for name, count in (("many", 12), ("few", 4))]
    for i, more in enumerate(([], ["--init_from", str(tmp_path / "out0")])):
        run(*flags(data[i], llm_folder(), tmp_path / f"out{i}", "--model", "MMJiT-Pico/8", "--batch_size", 4, "--epochs", 1), *more)
    first, second = (torch.load(tmp_path / f"out{i}" / "checkpoint-last.pth", weights_only=True)["text"] for i in (0, 1))
    assert torch.equal(first["mean"], second["mean"]) and torch.equal(first["std"], second["std"])
