"""The command line, the READMEs' commands, the files that name the dependencies, and Hugging Face's package of our folder's name."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT

import engine_jit
import flags
import main_jit
from config import EvaluateJob, GenerateJob, Job, SweepJob, TrainJob, from_plain, to_plain
from demo import run as demo_run
from util.errors import UserError

TEXT = ["--model", "JiT-B/16-Text"]
SWEEP = ["--sweep", "--resume", "x"]


def checked(*argv: str) -> Job:
    return flags.parse(list(argv))


def test_defaults():
    wanted = {
        "model": "JiT-B/16", "img_size": 256, "attn_dropout": 0, "proj_dropout": 0, "llm_model_name": "llm-jp/llm-jp-3-3.7b", "freeze_llm": True,
        "max_text_len": 77, "epochs": 200, "warmup_epochs": 5, "batch_size": 128, "accum_iter": 1, "lr": None, "blr": 5e-5, "min_lr": 0,
        "lr_schedule": "constant", "weight_decay": 0, "ema_decay1": 0.9999, "ema_decay2": 0.9996, "P_mean": -0.8, "P_std": 0.8, "noise_scale": 1,
        "t_eps": 0.05, "label_drop_prob": 0.1, "grad_clip": None, "seed": 0, "start_epoch": None, "num_workers": 12, "pin_mem": True,
        "sampling_method": "heun", "num_sampling_steps": 50, "cfg": 1, "interval_min": 0, "interval_max": 1, "num_images": 50000, "eval_freq": 40,
        "online_eval": False, "evaluate_gen": False, "sweep": False, "sweep_images": 8000, "interval": None, "eval_ema": "1", "save_images": False,
        "fid_stats": None, "inception_weights": None, "eval_captions": None, "clip_model": None, "precision_recall": False, "fd_dinov2": None,
        "generate": False, "gen_bsz": 256, "class_num": 1000, "save_last_freq": 5, "log_freq": 100,
        "device": "auto", "llm_layer": "mean", "llm_dtype": "auto", "text_norm": "standardize", "text_cache": "disk", "text_cache_dir": None, "held_out": 64,
    }  # fmt: skip
    found = {known.name: default for group in flags.GROUPS for config in group.configs for known, default, _ in flags.flags_in(config)}
    assert {name: found[name] for name in wanted} == wanted
    job = checked()
    assert isinstance(job, TrainJob) and job.text is None and job.evaluation is None and job.data.pin_mem and job.averages.warmup
    assert (job.train.peak_lr(8), job.train.effective_batch(8)) == (5e-5 * 1024 / 256, 1024)
    assert not checked("--no_pin_mem").data.pin_mem and not checked("--no_ema_warmup").averages.warmup
    assert [checked(*hflip).data.hflip for hflip in ([], ["--hflip"], ["--no-hflip"])] == [None, True, False]


def test_each_mode_is_a_job_of_its_own():
    assert checked(*TEXT, "--online_eval", "--num_images", "9").evaluation.num_images == 9
    assert checked("--generate", "--resume", "x", "--prompt", "猫", "--prompt", "犬").prompts == ("猫", "犬")
    kinds = {"--generate": GenerateJob, "--evaluate_gen": EvaluateJob, "--sweep": SweepJob}
    for mode, kind in kinds.items():
        assert type(checked(mode, "--resume", "x", *(["--cfg", "1,2"] if mode == "--sweep" else []))) is kind
    job = checked(*TEXT, "--cfg", "2.9", "--interval_min", "0.1", "--eval_ema", "raw", "--text_cache", "memory")
    assert (
        job.drawing.sampler.cfg_scale == 2.9 and job.drawing.sampler.cfg_interval == (0.1, 1.0) and job.drawing.weights == "raw" and job.text.cache == "memory"
    )
    assert from_plain(TrainJob, to_plain(job)) == job


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", "JiT-B16"], "'JiT-B16' is no model"),
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
        ([*SWEEP, "--cfg", "1", "--interval", "0-1,0.1-1"], "--sweep needs several settings"),
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
    assert checked(*SWEEP, "--cfg", "1.0:4.0:0.1").sweep.scales == tuple(round(1 + 0.1 * i, 10) for i in range(31))
    assert checked("--cfg", "2.9").drawing.sampler.cfg_scale == 2.9 and checked(*SWEEP, "--cfg", "1,2.5").sweep.scales == (1.0, 2.5)
    assert checked(*SWEEP, "--cfg", "2", "--interval", "0-1,0.1-0.9").sweep.intervals == ((0.0, 1.0), (0.1, 0.9))
    assert checked(*SWEEP, "--eval_ema", "1,2,raw").sweep.weights == ("1", "2", "raw")


@pytest.mark.parametrize(
    "argv", [["--cfg", "x"], ["--cfg", "1:2"], ["--cfg", "1:2:0"], ["--cfg", "2:1:0.5"], ["--interval", "1"], ["--interval", "a-b"], ["--eval_ema", "3"]]
)
def test_lists_that_are_none_are_one_line(argv, capsys):
    with pytest.raises(SystemExit):
        flags.parse(argv)
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: argument {argv[0]}: {argv[1]}: wanted") and printed.count("\n") == 1


def test_a_typo_in_any_flag_is_an_error_that_names_the_flag(capsys):
    options = flags.get_parser().options
    assert len(options) > 75
    for option in options:
        typo = option[:-2] + option[-1] + option[-2] if option[-1] != option[-2] else option + "x"
        if typo in options:
            continue
        with pytest.raises(SystemExit) as stop:
            flags.parse([typo])
        assert stop.value.code == 2
        assert re.fullmatch(rf"error: unknown flag {re.escape(typo)}; did you mean --\w[\w-]*\?\n", capsys.readouterr().err), typo


def test_every_flag_changes_the_job_and_is_explained():
    """None is read past: a value that is not the default makes another job, or an error that names the flag."""
    bases = [[], TEXT, ["--online_eval"], [*TEXT, "--online_eval"], [*SWEEP, "--cfg", "1,2"], ["--generate", "--resume", "x"]]
    values = {"model": "JiT-B/32", "interval": "0-1,0.1-1", "eval_ema": "raw", "lr_schedule": "cosine"}

    def outcome(argv: list[str]) -> object:
        """The job without the list of what was given, or the error."""
        try:
            job = checked(*argv)
        except UserError as error:
            return str(error)
        return job if isinstance(job, TrainJob) else replace(job, given={})

    def changes(known, argv: list[str], base: list[str]) -> bool:
        before, after = outcome(base), outcome([*base, *argv])
        return f"--{known.name}" in after or bool(known.off and f"--{known.off}" in after) if isinstance(after, str) else after != before

    found = {}
    for group in flags.GROUPS:
        for config in group.configs:
            for known, default, kind in flags.flags_in(config):
                assert known.help and known.ja and known.name in flags.get_parser().format_help(), known.name
                other = {bool: None, int: "2", float: "0.25"}.get(kind, next((choice for choice in known.choices if choice != default), "x"))
                argv = [f"--{known.off}" if default is True else f"--{known.name}", *([] if kind is bool else [values.get(known.name, other)])]
                found[known.name] = any(changes(known, argv, base) for base in bases)
    assert [name for name, changed in found.items() if not changed] == []
    assert "P_mean" in flags.get_parser().format_help() and "sampling and evaluation" in flags.get_parser().format_help()


def test_help_and_what_flags_alone_decide_come_without_torch():
    cannot_work = {"prepare_ref.py": ["--img_size", "0", "--out", "x.npz"], "export.py": ["--out", "x"], "app.py": ["--port", "0"]}
    cannot_work |= {"convert_checkpoint.py": ["--out", "x.pth"], "prepare_data.py": ["--out", "x", "--shard_pictures", "0"]}
    for program in ("main_jit.py", "cache_text.py", "prepare_ref.py", "export.py", "convert_checkpoint.py", "prepare_data.py", "app.py"):
        for argv, code in ((["--help"], 0), (["--no_such_flag"], 2), (cannot_work.get(program, ["--img_size", "250"]), 1)):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, program, *argv], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == code and time.perf_counter() - start < 1, (program, argv, done)
            assert done.stderr.count("\n") == (code != 0) and (not code or done.stderr.startswith("error: ")), done.stderr
    code = "import sys, flags; flags.parse([]); assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_pages_of_all_flags_are_up_to_date():
    """`python flags.py` writes them."""
    for language, path in (("en", "docs/flags.md"), ("ja", "docs/ja/flags.md")):
        assert (ROOT / path).read_text(encoding="utf-8") == flags.markdown(language), f"{path}: run python flags.py"
    shown = {
        flags.shown_default(known, default) for group in flags.GROUPS for config in group.configs for known, default, _ in flags.flags_in(config) if known.shown
    }
    assert shown - {"engine_jit.test_prompts"} <= set(flags.SHOWN_JA)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([*TEXT, "--data_path", "/nothing"], "error: --data_path /nothing is not there"),
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


PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("data", "evaluation", "export", "page", "multi_node", "running", "text", "models", "science", "troubleshooting")),
]
PAIRS = [(page, "README_ja.md" if page == "README.md" else page.replace("docs/", "docs/ja/")) for page in PAGES]
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))


def commands(name: str) -> list[str]:
    """The shell lines of a page's ```bash blocks, continuation lines joined."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [shlex.join(shlex.split(line, comments=True)) for line in blocks.splitlines() if line.strip() and not line.strip().startswith("#")]


def check_command(line: str) -> None:
    """It parses, and what it names is there."""
    parsers = {
        "main_jit.py": flags.parse,
        "cache_text.py": flags.parse_cache,
        "prepare_ref.py": flags.parse_reference,
        "prepare_data.py": flags.parse_prepare,
        "export.py": flags.parse_export,
        "convert_checkpoint.py": flags.parse_convert,
    }
    parsers["app.py"] = flags.parse_app
    for program, parse in parsers.items():
        rest = line.split(f"{program} ", 1)[1:]
        if rest and rest != ["--help"]:
            parse(shlex.split(rest[0]))
    if line.startswith("make "):
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
        assert {word for word in line.split()[1:] if "=" not in word} <= targets, line
    for module in re.findall(r"-m ((?:datasets|demo|benchmarks)[\w.]*)", line):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), line
    for recipe in re.findall(r"recipes/\S+\.sh", line):
        assert (ROOT / recipe).is_file(), line


@pytest.mark.parametrize("name", [page for pair in PAIRS for page in pair])
def test_every_command_on_every_page_parses(name):
    found = commands(name)
    assert found or "troubleshooting" in name or "models" in name
    for line in found:
        check_command(line)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_runs_the_command_that_it_holds(path, tmp_path):
    """Through bash, with programs in the place of torchrun and python that write down how they are called; the script names its computed cost."""
    (tmp_path / "bin").mkdir()
    for program in ("torchrun", "python"):
        (tmp_path / "bin" / program).write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/called\n')
        (tmp_path / "bin" / program).chmod(0o755)
    for program, does in (("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"'), ("scontrol", "seq -f node%.0f 20000")):  # more than a pipe holds
        (tmp_path / "bin" / program).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "DATA": "some data", "OUT": "some/out", "GPUS": "2"}
    environment |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", str(path), "--seed", "7"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    job = flags.parse(called[called.index("main_jit.py") + 1 :])
    assert job.run.seed == 7 and job.data.path == "some data" and job.run.output_dir == job.run.resume == "some/out"
    assert "computed" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("signalled", [False, True])
def test_a_slurm_job_is_queued_again_where_its_time_is_over(signalled, tmp_path):
    """By programs in the place of Slurm's and of torchrun, which runs until the signal comes and then ends as torchrun does."""
    programs = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": f'[[ $1 == show ]] && echo node1 && exit; echo "$@" >> {tmp_path}/requeued',
        "scancel": f'[[ "$*" == "--signal=USR1 7" ]] && kill -USR1 $(cat {tmp_path}/running)',
        "torchrun": f"trap 'sleep 0.3; echo saved > {tmp_path}/saved; exit 1' USR1; echo $$ > {tmp_path}/running; "
        + ("while :; do sleep 0.05; done" if signalled else "exit 3"),
    }
    for program, does in programs.items():
        (tmp_path / program).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", str(ROOT / "recipes" / "slurm.sh")], cwd=ROOT, env=environment)
    if signalled:
        while not (tmp_path / "running").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == (0 if signalled else 3)
    assert (tmp_path / "requeued").exists() == (tmp_path / "saved").exists() == signalled


@pytest.mark.parametrize("english, japanese", PAIRS)
def test_both_languages_have_the_same_headings_and_commands(english, japanese):
    def outline(name: str) -> list[str]:
        return re.findall(r"^(#+) ", re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.S), re.M)

    assert outline(english) == outline(japanese)
    assert commands(english) == commands(japanese)


@pytest.mark.parametrize("name", ["README.md", "README_ja.md"])
def test_the_readmes_are_for_a_reader_in_a_hurry(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", [page for pair in PAIRS for page in pair])
def test_flags_and_links_on_every_page_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    others = {f"--{known.name}" for job in (flags.ExportJob, flags.ConvertJob, flags.Shards, flags.AppJob) for known, _, _ in flags.flags_in(job)}
    known = {*flags.get_parser().options, *others, "--help", "--out", "--text_pooling", "--nproc_per_node", "--max-restarts", "--signals-to-handle"}
    assert set(re.findall(r"`(--[\w-]+)", text)) <= known
    for link, place in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text):
        page = (ROOT / name).parent / link if link else ROOT / name
        assert page.exists(), link
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M) if place else []
        assert not place or place in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, f"{link}#{place}"


@pytest.mark.parametrize("name", ["docs/models.md", "docs/ja/models.md"])
def test_the_parameters_of_the_table_are_the_codes(name):
    from test_models import COUNTS

    text = (ROOT / name).read_text(encoding="utf-8")
    for model, count in COUNTS.items():
        assert re.search(rf"\| `{re.escape(model)}` \|.*\b{count:.2f}M", text), model


def test_one_list_of_dependencies():
    """environment.yaml holds what a run and the demos need, and tools of the tests; the extras are left to pyproject.toml, whose `dev` has them all."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]

    def names(lines: list[str]) -> set[str]:
        return {re.split(r"[<>=\[ ]", line)[0] for line in lines}

    pip = next(part["pip"] for part in yaml.safe_load((ROOT / "environment.yaml").read_text())["dependencies"] if isinstance(part, dict))
    extras = {extra: names(lines) for extra, lines in project["optional-dependencies"].items()}
    optional = set().union(*(extras[extra] for extra in ("app", "lora", "export", "data", "track", "ray")))
    assert names(pip) == (names(project["dependencies"]) | extras["demo"] | extras["dev"]) - optional - {"playwright"} and optional <= extras["dev"]


def test_our_folder_datasets_does_not_disturb_transformers(llm_folder, tmp_path):
    """Hugging Face's package of the same name may be installed, hidden by our folder; that it need not be there, all other tests show."""
    site = tmp_path / "site"
    (site / "datasets-5.2.0.dist-info").mkdir(parents=True)
    (site / "datasets-5.2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 5.2.0\n")
    (site / "datasets").mkdir()
    (site / "datasets" / "__init__.py").write_text("__version__ = '5.2.0'\n")
    code = "import main_jit, torch, peft, diffusers; from config import TextConfig; from text_encoder import LanguageModel; "
    code += f"LanguageModel(TextConfig({str(llm_folder())!r})).load(torch.device('cpu')); print('loaded')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(site)})
    assert done.stdout.strip() == "loaded", done.stderr[-2000:]


def test_a_demo_clears_the_folder_of_an_earlier_one_and_no_other(tmp_path):
    demo_run.clear(tmp_path / "out", own=False)
    (tmp_path / "out" / "data").mkdir()
    demo_run.clear(tmp_path / "out", own=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".demo"]
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="holds files that no demo made, and a demo begins by removing data/"):
        demo_run.clear(tmp_path, own=False)
    assert (tmp_path / "data").exists()


def test_the_demo_prompts_are_ready_to_edit():
    assert engine_jit.test_prompts == [f"{what}の写真" for what in ("猫", "犬", "風景", "建物", "花", "車", "鳥", "食べ物", "人物", "動物")]
