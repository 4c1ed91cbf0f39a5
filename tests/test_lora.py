"""Adapters: they alone are trained, averaged and saved, for one base; an ordinary peft folder; a scale of 0 is the base to the bit; merging is exact to 1e-5."""

import json
import re
import shutil

import pytest
import torch
from conftest import in_ranks, write_text_data
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import export
from test_training import assert_same_training, flags, run, weights

import lora
import models_jit
import models_mmjit
from flags import parse
from sampling import load_painter
from util import checkpoint
from util.errors import UserError
from util.text import Text

PROMPTS = ("--prompt", "赤い三", "--prompt", "富士山と桜")
MODELS = {"class": "JiT-Pico/8", "text": "JiT-Pico/8-Text", "tokens": "MMJiT-Pico/8"}


def adapt(base, data, out, *more):
    """A run of two steps an epoch that trains adapters."""
    run("--init_from", str(base), "--lora_rank", "4", "--data_path", str(data), "--output_dir", str(out), "--lr", "1e-2", "--batch_size", "4",
        "--num_workers", "0", "--warmup_epochs", "0", "--device", "cpu", *map(str, more))  # fmt: skip
    return out


@pytest.fixture(scope="module")
def text_data(tmp_path_factory):
    return write_text_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(text_data, llm_folder, tmp_path_factory):
    """A trained MM-JiT, which no test changes."""
    out = tmp_path_factory.mktemp("trained") / "base"
    more = ["--batch_size", 4, "--epochs", 3, "--lr", "1e-2", "--noise_scale", 2, "--max_text_len", 24, "--seed", 3]
    run(*flags(text_data, llm_folder(), out, "--model", MODELS["tokens"], *more))
    return out


def generate(base, out, *more):
    """The bytes of the PNG files of --generate."""
    run("--generate", "--resume", str(base), "--output_dir", str(out), "--device", "cpu", *(more or PROMPTS))
    return [path.read_bytes() for path in sorted((out / "samples").glob("0*.png"))]


def test_adapters_alone_are_trained_averaged_and_saved(base, text_data, tmp_path):
    before = weights(base)
    adapters = weights(adapt(base, text_data, tmp_path / "lora", "--epochs", 2))
    parts = [adapters[key] for key in ("model", "model_ema1", "model_ema2")]
    assert all(set(part) == set(parts[0]) and all(".lora_" in name for name in part) for part in parts)
    assert {f"net.{name}" for name in adapters["optimizer"]} == set(parts[0])
    assert all(value.abs().max() > 0 for name, value in parts[1].items() if "lora_B" in name)  # which are 0 at the start
    matrices = {name for name, value in before["model"].items() if "blocks." in name and value.ndim == 2}
    assert {re.sub(r"\.lora_.*", ".weight", name) for name in parts[0]} == matrices
    assert torch.equal(adapters["text"]["mean"], before["text"]["mean"]) and adapters["job"]["diffusion"] == before["job"]["diffusion"]
    assert (adapters["job"]["model"], adapters["job"]["text"]["encoder"]["max_text_len"]) == (before["job"]["model"], 24)
    assert_same_training(before, weights(base))


def test_class_and_pooled_models_have_adapters_too(text_data, class_data, llm_folder, tmp_path):
    run("--model", MODELS["class"], "--img_size", "16", "--class_num", "3", "--device", "cpu", "--num_workers", "0", "--batch_size", "4",
        "--data_path", str(class_data), "--output_dir", str(tmp_path / "class"), "--epochs", "1")  # fmt: skip
    run(*flags(text_data, llm_folder(), tmp_path / "text", "--batch_size", 4, "--epochs", 1))
    for kind, data in (("class", class_data), ("text", text_data)):
        names = {
            re.sub(r"net\.blocks\.\d+\.|\.lora_.*", "", name) for name in weights(adapt(tmp_path / kind, data, tmp_path / f"on_{kind}", "--epochs", 1))["model"]
        }
        assert names == {"attn.qkv", "attn.proj", "mlp.w12", "mlp.w3"}
        prompts = ("--prompt", "2") if kind == "class" else PROMPTS
        plain = generate(tmp_path / kind, tmp_path / "a", *prompts)
        assert generate(tmp_path / kind, tmp_path / "b", *prompts, "--lora", str(tmp_path / f"on_{kind}"), "--lora_scale", "0") == plain


def test_a_run_goes_on_and_only_on_its_base(base, text_data, tmp_path):
    whole = weights(adapt(base, text_data, tmp_path / "whole", "--epochs", 4))
    for epochs in (2, 4):
        adapt(base, text_data, tmp_path / "parts", "--epochs", epochs)
    assert_same_training(whole, weights(tmp_path / "parts"))
    exported = export("--resume", base, "--out", tmp_path / "exported", "--with_text_encoder")
    adapt(exported, text_data, tmp_path / "parts", "--epochs", 5)  # the same weights in another file
    other = weights(base)
    other["model_ema1"]["net.final_layer.linear.bias"] = other["model_ema1"]["net.final_layer.linear.bias"] + 1e-3
    (tmp_path / "other").mkdir()
    torch.save({key: value for key, value in other.items() if key != "args"}, tmp_path / "other" / "checkpoint-last.pth")
    for argv, words in (
        ([tmp_path / "other", text_data, tmp_path / "parts", "--epochs", 6], "holds adapters for other weights than those of --init_from"),
        ([base, text_data, tmp_path / "parts", "--epochs", 6, "--lora_rank", 8], "--lora_rank is 8, but .* was trained with 4"),
        (
            [tmp_path / "parts", text_data, tmp_path / "new"],
            "holds only LoRA adapters; to draw give --resume .*exported --lora .*parts, to merge them run export.py",
        ),
        ([base, text_data, base], "holds a whole model and no adapters; leave out --lora_rank"),
        ([base, text_data, tmp_path / "new", "--model", "JiT-Pico/8-Text"], "--model is JiT-Pico/8-Text, but .* was trained with MMJiT-Pico/8"),
        ([base, text_data, tmp_path / "new", "--noise_scale", 1.5], "--noise_scale is 1.5, but .* was trained with 2.0"),
    ):
        with pytest.raises(UserError, match=words):
            adapt(*argv)
    with pytest.raises(UserError, match="holds only LoRA adapters; give --lora_rank"):
        run(
            "--model",
            MODELS["tokens"],
            "--img_size",
            "16",
            "--max_text_len",
            "24",
            "--resume",
            str(tmp_path / "parts"),
            "--output_dir",
            str(tmp_path / "parts"),
        )


def test_two_ranks_train_the_same_adapters(base, text_data, tmp_path):
    more = ["--epochs", 2, "--lr", "1e-3"]
    one = weights(adapt(base, text_data, tmp_path / "one", *more))
    in_ranks(2, lambda: adapt(base, text_data, tmp_path / "two", *more, "--batch_size", 2))
    for name, value in weights(tmp_path / "two")["model"].items():  # at the start the gradients are small, and Adam divides by them
        torch.testing.assert_close(value, one["model"][name], rtol=1e-3, atol=2e-5)


def test_drawing_with_adapters(base, text_data, tmp_path, capsys):
    folder = adapt(base, text_data, tmp_path / "lora", "--epochs", 4)
    plain, with_them = generate(base, tmp_path / "plain"), ["--lora", str(folder)]
    assert generate(base, tmp_path / "none", *PROMPTS, *with_them, "--lora_scale", "0") == plain
    full = generate(base, tmp_path / "full", *PROMPTS, *with_them)
    assert full != plain
    run("--generate", "--resume", str(base), "--device", "cpu", *PROMPTS, *with_them)
    assert (folder / "samples" / "0001.png").read_bytes() == full[1]  # pictures go to the adapters, not to the base
    out = export("--resume", base, "--out", tmp_path / "merged", "--with_text_encoder", *with_them)
    assert generate(out, tmp_path / "again") == full
    assert "with the adapters lora x 1" in (out / "README.md").read_text(encoding="utf-8")
    other = tmp_path / "drawn by EMA 2"
    other.mkdir()
    state = torch.load(base / checkpoint.LAST, weights_only=True)
    state["job"]["drawing"]["weights"], state["model_ema2"] = "2", {name: value + 0.1 for name, value in state["model"].items()}
    torch.save(state, other / checkpoint.LAST)
    capsys.readouterr()
    assert generate(other, tmp_path / "on EMA 1", *PROMPTS, *with_them) == full and "other weights" not in capsys.readouterr().out
    assert generate(other, tmp_path / "on EMA 2", *PROMPTS, *with_them, "--eval_ema", "2") != full and "other weights" in capsys.readouterr().out
    merged = export("--resume", other, "--out", tmp_path / "merged EMA 1", "--with_text_encoder", *with_them)
    assert (merged / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    own, half = load_painter(base, device="cpu"), load_painter(base, device="cpu")
    half.add_lora(folder, 0.5)
    half.add_lora(folder, 0.5)
    merged = load_file(out / "model.safetensors")
    for name, value in half.weights.net.named_parameters():
        torch.testing.assert_close(value, merged[f"net.{name}"], rtol=0, atol=1e-6)
    assert not torch.equal(own.weights.net.double_blocks[0].img_qkv.weight, merged["net.double_blocks.0.img_qkv.weight"])


def picture(net, y):
    torch.manual_seed(0)
    with torch.no_grad():
        return net(torch.randn(2, 3, 16, 16), torch.rand(2), y)


def test_the_folder_is_pefts_and_pefts_folder_draws(base, text_data, tmp_path):
    """peft alone computes what we merge, to 1e-5; what peft alone has written draws here."""
    folder = adapt(base, text_data, tmp_path / "lora", "--epochs", 4)
    y = Text(torch.randn(2, 24, 32), torch.ones(2, 24, dtype=torch.bool))
    plain, mine = load_painter(base, device="cpu").weights, load_painter(base, device="cpu")
    unchanged = {name: value.clone() for name, value in checkpoint.state_of(plain.net).items()}
    mine.add_lora(folder)
    with plain.drawing("1"), mine.weights.drawing("1"):
        before, merged = picture(plain.net, y), picture(mine.weights.net, y)
        wrapped = PeftModel.from_pretrained(plain.net, str(folder))
        torch.testing.assert_close(picture(wrapped, y), merged, rtol=0, atol=1e-5)
        assert (merged - before).abs().max() > 1e-3
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base"] == lora.digest(unchanged)

    net = load_painter(base, device="cpu").weights.net
    foreign = get_peft_model(net, LoraConfig(r=2, lora_alpha=8, target_modules=r".*img_qkv", init_lora_weights=False, use_rslora=True))
    foreign.save_pretrained(tmp_path / "foreign")
    again = load_painter(base, device="cpu")
    again.add_lora(tmp_path / "foreign")
    with again.weights.drawing("1"):
        torch.testing.assert_close(picture(again.weights.net, y), picture(foreign, y), rtol=0, atol=1e-5)


def test_what_are_no_adapters_of_the_model_is_one_line(base, text_data, tmp_path, capsys):
    folder = adapt(base, text_data, tmp_path / "lora", "--epochs", 1)
    capsys.readouterr()

    def damaged(name: str, change) -> str:
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("*.pth", "events*", ".lock"))
        change(tmp_path / name)
        return str(tmp_path / name)

    def without_one(path):
        tensors = load_file(path / lora.FILE)
        save_file(dict(list(tensors.items())[1:]), path / lora.FILE)

    def of_another_kind(path):
        (path / lora.CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["no_such_layer"], "r": 4}))

    def with_a_bias(path):
        save_file(load_file(path / lora.FILE) | {"base_model.model.final_layer.linear.bias": torch.zeros(3)}, path / lora.FILE)

    def for_another_base(path):
        save_file(load_file(path / lora.FILE), path / lora.FILE, {"base": "0" * 64})

    for argv, words in (
        ([str(tmp_path)], "wanted a folder with adapter_config.json"),
        ([damaged("cut", lambda path: (path / lora.FILE).write_bytes((path / lora.FILE).read_bytes()[:1000]))], "adapter_model.safetensors cannot be read"),
        ([damaged("more", with_a_bias)], "holds base_model.model.final_layer.linear.bias; wanted only LoRA's matrices"),
        ([damaged("less", without_one)], "does not fit the model .*is only in one of the two"),
        ([damaged("no json", lambda path: (path / lora.CONFIG).write_text("{"))], "does not fit the model"),
        ([damaged("kind", of_another_kind)], "does not fit the model"),
        ([str(folder), "--lora_scale", "nan"], "--lora_scale nan must be a finite number"),
    ):
        with pytest.raises(UserError, match=words) as error:
            run("--generate", "--resume", str(base), "--device", "cpu", "--prompt", "赤い三", "--lora", *argv)
        assert "\n" not in str(error.value)
    painter = load_painter(base, device="cpu")
    names = list(painter.weights.net.state_dict())
    for name in ("less", "kind"):
        with pytest.raises(UserError, match="does not fit the model"):
            painter.add_lora(tmp_path / name)
        assert list(painter.weights.net.state_dict()) == names
    painter.add_lora(folder)
    assert generate(base, tmp_path / "other", *PROMPTS, "--lora", damaged("elsewhere", for_another_base))
    assert "was trained on other weights than these" in capsys.readouterr().out
    for argv, words in (
        (["--lora_rank", "4"], "--lora_rank trains adapters for an existing model; give that model with --init_from"),
        (["--lora", "x"], "--lora is for drawing"),
        (["--generate", "--resume", "x", "--lora_scale", "0.5"], "--lora_scale is for --lora"),
        (["--init_from", "x", "--lora_rank", "0"], "--lora_rank 0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            parse(argv)


@pytest.mark.parametrize("name, options", [("JiT-B/16-Tokens", {"text_len": 77}), ("MMJiT-B/16", {})])
def test_adapters_are_small(name, options):
    """At most 6 % of the exported float32 file at rank 32."""
    build = models_mmjit.build_model if name.startswith("MMJiT") else models_jit.build_model
    with torch.device("meta"):
        net = build(name, input_size=256, text_dim=2560, **options)
        whole = sum(value.numel() for value in net.state_dict().values())
        lora.add(net, 32, 0)
    assert 0.03 < sum(param.numel() for param in net.parameters() if param.requires_grad) / whole < 0.06
