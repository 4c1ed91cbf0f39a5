"""The command line, the READMEs' commands, the files that name the dependencies, and Hugging Face's package of our folder's name."""

import argparse
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import cache_text
import main_jit
import prepare_ref
from main_jit import check_args, get_parser
from util.errors import UserError

TEXT = ["--model", "JiT-B/16-Text"]
SWEEP = ["--sweep", "--resume", "x"]


def checked(*argv: str) -> argparse.Namespace:
    args = get_parser().parse_args(list(argv))
    check_args(args)
    return args


def test_defaults():
    args = checked()
    wanted = {
        "model": "JiT-B/16", "img_size": 256, "attn_dropout": 0, "proj_dropout": 0, "llm_model_name": "llm-jp/llm-jp-3-3.7b", "freeze_llm": True,
        "max_text_len": 77, "epochs": 200, "warmup_epochs": 5, "batch_size": 128, "accum_iter": 1, "lr": None, "blr": 5e-5, "min_lr": 0,
        "lr_schedule": "constant", "weight_decay": 0, "ema_decay1": 0.9999, "ema_decay2": 0.9996, "P_mean": -0.8, "P_std": 0.8, "noise_scale": 1,
        "t_eps": 0.05, "label_drop_prob": 0.1, "grad_clip": None, "seed": 0, "start_epoch": None, "num_workers": 12, "pin_mem": True,
        "sampling_method": "heun", "num_sampling_steps": 50, "cfg": (1,), "interval_min": 0, "interval_max": 1, "num_images": 50000, "eval_freq": 40,
        "online_eval": False, "evaluate_gen": False, "sweep": False, "sweep_images": 8000, "interval": None, "eval_ema": ("1",), "save_images": False,
        "fid_stats": None, "inception_weights": None, "eval_captions": None, "clip_model": None, "precision_recall": False, "fd_dinov2": None,
        "generate": False, "gen_bsz": 256, "class_num": 1000, "save_last_freq": 5, "log_freq": 100,
        "device": "auto", "llm_layer": "mean", "llm_dtype": "auto", "text_norm": "standardize", "text_cache": "disk", "text_cache_dir": None, "held_out": 64,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert not checked("--no_pin_mem").pin_mem


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", "JiT-B16"], "'JiT-B16' is not a JiT"),
        (["--img_size", "250"], "--img_size 250 is not a multiple of the patch size 16 .* try 240"),
        (["--use_text_conditioning"], "try --model JiT-B/16-Text"),
        ([*TEXT, "--no-freeze_llm"], "always frozen"),
        (["--llm_model_name", "x/y"], "no effect on the class model"),
        ([*TEXT, "--class_num", "10"], "no effect on the text model"),
        (["--lr", "1e-4", "--blr", "1e-4"], "--lr and --blr"),
        (["--min_lr", "1e-5"], "--lr_schedule cosine"),
        (["--P_mean", "nan"], "--P_mean nan must be a finite number"),
        (["--cfg", "inf"], "--cfg inf"),
        (["--generate", "--online_eval", "--resume", "x"], "--generate and --online_eval are different runs"),
        (["--text_norm", "none"], "no effect on the class model"),
        (["--llm_layer", "-2"], "--llm_layer has no effect on the class model"),
        (["--held_out", "9"], "no effect on the class model"),
        ([*TEXT, "--text_cache", "memory", "--text_cache_dir", "x"], "no effect with --text_cache memory"),
        ([*TEXT, "--held_out", "-1"], "--held_out -1 must not be negative"),
        (["--epochs", "0"], "--epochs 0 must be at least 1"),
        (["--batch_size", "-3"], "--batch_size"),
        (["--cfg", "-1"], "--cfg"),
        (["--lr", "0"], "--lr"),
        (["--blr", "nan"], "--blr"),
        (["--grad_clip", "0"], "--grad_clip"),
        (["--t_eps", "0"], "--t_eps"),
        (["--ema_decay1", "1"], "--ema_decay1"),
        (["--label_drop_prob", "1.1"], "--label_drop_prob"),
        (["--interval_min", "0.8", "--interval_max", "0.2"], "interval_min <= interval_max"),
        (["--start_epoch", "200"], "--start_epoch 200"),
        (["--generate"], "--generate needs a trained model"),
        (["--evaluate_gen"], "--evaluate_gen needs a trained model"),
        (["--generate", "--evaluate_gen", "--resume", "x"], "--generate and --evaluate_gen are different runs"),
        (["--sweep", "--cfg", "1,2"], "--sweep needs a trained model"),
        ([*SWEEP], "--sweep needs several settings"),
        ([*SWEEP, "--interval", "0-1,0.1-1"], "--sweep needs several settings"),
        (["--evaluate_gen", "--resume", "x", "--precision_recall", "--num_images", "3"], "needs more than 3 pictures, and 3 are asked for"),
        ([*SWEEP, "--cfg", "2,-1"], "--cfg -1.0 must not be negative"),
        ([*SWEEP, "--cfg", "2", "--interval", "0.9-0.1,0-1"], "--interval 0.9-0.1: wanted 0 <= low <= high <= 1"),
        ([*SWEEP, "--cfg", "2", "--interval", "0-1,0.1-1", "--interval_min", "0.1"], "give one of them"),
        ([*SWEEP, "--cfg", "1,2", "--sweep_images", "0"], "--sweep_images 0 must be at least 1"),
        (["--cfg", "1,2"], "--cfg with several values needs --sweep"),
        (["--evaluate_gen", "--resume", "x", "--eval_ema", "1,raw"], "--eval_ema with several values needs --sweep"),
        (["--interval", "0-1"], "--interval is for --sweep"),
        (["--sweep_images", "10"], "--sweep_images is for --sweep"),
        (["--save_images"], "--save_images has no effect without --online_eval, --evaluate_gen or --sweep"),
        (["--generate", "--resume", "x", "--fid_stats", "x.npz"], "--fid_stats has no effect without"),
        (["--online_eval", "--vgg16_weights", "x"], "--vgg16_weights is for --precision_recall"),
        (["--online_eval", "--clip_model", "a/b"], "--clip_model has no effect on the class model"),
        (["--online_eval", "--eval_captions", "x"], "--eval_captions has no effect on the class model"),
        (["--prompt", "猫"], "is for --generate"),
        (["--generate", "--resume", "x", "--prompt", "猫", "--prompts_file", "f"], "give one of them"),
    ],
)
def test_values_that_cannot_work(argv, message):
    with pytest.raises(UserError, match=message) as error:
        checked(*argv)
    assert "\n" not in str(error.value)


def test_lists_and_ranges():
    assert checked(*SWEEP, "--cfg", "1.0:4.0:0.1").cfg == tuple(round(1 + 0.1 * i, 10) for i in range(31))
    assert checked("--cfg", "2.9").cfg == (2.9,) and checked(*SWEEP, "--cfg", "1,2.5").cfg == (1.0, 2.5)
    assert checked(*SWEEP, "--cfg", "2", "--interval", "0-1,0.1-0.9").interval == ((0.0, 1.0), (0.1, 0.9))
    assert checked(*SWEEP, "--eval_ema", "1,2,raw").eval_ema == ("1", "2", "raw")


@pytest.mark.parametrize(
    "argv", [["--cfg", "x"], ["--cfg", "1:2"], ["--cfg", "1:2:0"], ["--cfg", "2:1:0.5"], ["--interval", "1"], ["--interval", "a-b"], ["--eval_ema", "3"]]
)
def test_lists_that_are_none_are_one_line(argv, capsys):
    with pytest.raises(SystemExit):
        get_parser().parse_args(argv)
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: argument {argv[0]}: {argv[1]}: wanted") and printed.count("\n") == 1


def test_a_typo_in_any_flag_is_an_error_that_names_the_flag(capsys):
    for option in get_parser()._option_string_actions:
        if option.startswith("--") and option != "--help":
            typo = option[:-2] + option[-1] + option[-2] if option[-1] != option[-2] else option + "x"
            if typo in get_parser()._option_string_actions:
                continue
            with pytest.raises(SystemExit) as stop:
                get_parser().parse_args([typo])
            assert stop.value.code == 2
            assert re.fullmatch(rf"error: unknown flag {re.escape(typo)}; did you mean --\w[\w-]*\?\n", capsys.readouterr().err), typo


def test_every_flag_is_read_and_explained():
    source = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("flags.py", "main_jit.py"))
    for action in get_parser()._actions:
        if action.dest in ("help",):
            continue
        assert action.help, action.dest
        named = f'"{action.dest}"' in source.split("def check_args")[1]
        assert f"args.{action.dest}" in source or named, action.dest
    assert "P_mean" in get_parser().format_help() and "sampling and evaluation" in get_parser().format_help()


@pytest.mark.parametrize(
    "argv, message",
    [
        ([*TEXT, "--data_path", "/nothing"], "error: --data_path /nothing: no folder images/"),
        (["--data_path", "/nothing"], "error: --data_path /nothing: no folder train/"),
        (["--resume", "/nothing"], "error: --resume /nothing: no such file or folder"),
        ([*TEXT, "--generate", "--resume", "/nothing", "--prompts_file", "/nothing"], "error: --prompts_file /nothing cannot be read"),
        (["--device", "cuda"], "error: --device cuda"),
        (["--output_dir", "/dev/null"], "error: --output_dir /dev/null cannot be written to"),
    ],
)
def test_what_a_user_sees_is_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main_jit.main(argv)
    printed = capsys.readouterr().err
    assert stop.value.code == 1 and printed.startswith(message) and printed.count("\n") == 1


def commands(name: str) -> list[str]:
    """The shell lines of a README's ```bash blocks, continuation lines joined."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [" ".join(shlex.split(line, comments=True)) for line in blocks.splitlines() if line.strip() and not line.strip().startswith("#")]


@pytest.mark.parametrize("name", ["README.md", "README_ja.md"])
def test_every_command_in_the_readme_parses(name):
    found = commands(name)
    runs = [line.split("main_jit.py ", 1)[1] for line in found if "main_jit.py " in line]
    assert len(runs) >= 6
    for line in runs:
        checked(*shlex.split(line)) if line != "--help" else None
    builds = [line.split("cache_text.py ", 1)[1] for line in found if "cache_text.py " in line]
    assert builds
    for line in builds:
        check_args(cache_text.get_parser().parse_args(shlex.split(line)))
    references = [line.split("prepare_ref.py ", 1)[1] for line in found if "prepare_ref.py " in line]
    assert references
    for line in references:
        prepare_ref.get_parser().parse_args(shlex.split(line))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in found:
        if line.startswith("make "):
            assert {word for word in line.split()[1:] if "=" not in word} <= targets, line
        for module in re.findall(r"-m ((?:datasets|demo)[\w.]*)", line):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), line


def test_both_readmes_have_the_same_headings_and_commands():
    def outline(name: str) -> list[str]:
        return re.findall(r"^(#+) ", re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.S), re.M)

    assert outline("README.md") == outline("README_ja.md")
    assert commands("README.md") == commands("README_ja.md")
    assert {"JiT-L/16-Text", "--noise_scale 2.0"} <= {word for word in ("JiT-L/16-Text", "--noise_scale 2.0") if any(word in c for c in commands("README.md"))}


@pytest.mark.parametrize("name", ["README.md", "README_ja.md"])
def test_the_readmes_flags_and_figures_are_the_codes(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    known = set(get_parser()._option_string_actions)
    assert set(re.findall(r"`(--[\w-]+)", text)) <= known
    missing = {option for option in known if option.startswith("--") and option not in text} - {"--help", "--no-hflip", "--freeze_llm", "--pin_mem"}
    assert not missing
    from test_models import COUNTS

    for model, count in COUNTS.items():
        assert re.search(rf"\| `{re.escape(model)}` \|.*\b{count:.2f}M", text), model


def test_one_list_of_dependencies():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]

    def names(lines: list[str]) -> set[str]:
        return {re.split(r"[<>=\[ ]", line)[0] for line in lines}

    pip = next(part["pip"] for part in yaml.safe_load((ROOT / "environment.yaml").read_text())["dependencies"] if isinstance(part, dict))
    assert names(pip) == names(project["dependencies"]) | {name for extra in project["optional-dependencies"].values() for name in names(extra)}


def test_our_folder_datasets_does_not_disturb_transformers(llm_folder, tmp_path):
    """Hugging Face's package of the same name may be installed, hidden by our folder; that it need not be there, all other tests show."""
    site = tmp_path / "site"
    (site / "datasets-5.2.0.dist-info").mkdir(parents=True)
    (site / "datasets-5.2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 5.2.0\n")
    (site / "datasets").mkdir()
    (site / "datasets" / "__init__.py").write_text("__version__ = '5.2.0'\n")
    code = "import main_jit, torch; from text_encoder import LanguageModel, TextConfig; "
    code += f"LanguageModel(TextConfig({str(llm_folder())!r})).load(torch.device('cpu')); print('loaded')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(site)})
    assert done.stdout.strip() == "loaded", done.stderr[-2000:]


def test_nothing_but_main_reads_flags_and_one_module_talks_to_torch_distributed():
    for path in [*ROOT.glob("*.py"), *(ROOT / "util").glob("*.py"), *(ROOT / "datasets").glob("*.py")]:
        source = path.read_text(encoding="utf-8")
        if path.name not in ("flags.py", "main_jit.py", "cache_text.py", "prepare_ref.py", "checkpoint.py", "demo.py"):
            assert "argparse" not in source, path
        if path.name != "distributed.py":
            assert "torch.distributed" not in source.split('"""', 2)[-1], path


def test_the_demo_prompts_are_ready_to_edit():
    assert main_jit.engine.test_prompts == [f"{what}の写真" for what in ("猫", "犬", "風景", "建物", "花", "車", "鳥", "食べ物", "人物", "動物")]
