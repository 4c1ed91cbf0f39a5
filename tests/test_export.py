"""Models out: the same picture, byte by byte, from a checkpoint, its safetensors and its folder for diffusers; the card; what goes wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from test_training import flags, run

import export as program
from datasets.transforms import to_image
from exporting import card, package
from flags import parse_export
from page.layout import headline
from sampling import load_painter
from util import checkpoint
from util.errors import UserError
from util.schedule import Progress

PROMPTS = ["赤い三", "夕焼けの海辺を走る柴犬", "富士山と桜"]
MODELS = {"class": "JiT-Nano/8", "text": "JiT-Nano/8-Text", "tokens": "MMJiT-Nano/8"}
PRECISION = {"class": "fp32", "text": "auto", "tokens": "bf16"}


def export(*argv) -> Path:
    return program.export(parse_export(list(map(str, argv))))


def train(kind: str, out: Path, text_data: Path, class_data: Path, llm: Path) -> Path:
    more = ["--epochs", 4, "--lr", "1e-2", "--cfg", "2", "--num_sampling_steps", "4", "--seed", "3", "--precision", PRECISION[kind]]
    if kind == "class":
        run(*map(str, ["--model", MODELS[kind], "--img_size", 16, "--class_num", 3, "--device", "cpu", "--num_workers", 0, "--batch_size", 4,
                       "--data_path", class_data, "--output_dir", out, *more]))  # fmt: skip
    else:
        run(*flags(text_data, llm, out, "--model", MODELS[kind], "--batch_size", 8, "--max_text_len", 24, *more))
    return out


def prompts_of(kind: str) -> list:
    return [0, 2, 1] if kind == "class" else PROMPTS


def drawn(trained: Path, kind: str) -> list[bytes]:
    """The PNG files of --generate."""
    run("--generate", "--resume", str(trained), "--device", "cpu", *(part for prompt in prompts_of(kind) for part in ("--prompt", str(prompt))))
    return [(trained / "samples" / f"{i:04d}.png").read_bytes() for i in range(3)]


def as_png(pictures, folder: Path) -> list[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        to_image(picture).save(folder / f"{i}.png")
    return [(folder / f"{i}.png").read_bytes() for i in range(len(pictures))]


@pytest.mark.slow
def test_every_road_draws_the_same_bytes(text_data, class_data, llm_folder, tmp_path):
    wanted, plans = {}, []
    for kind in MODELS:
        trained = train(kind, tmp_path / kind, text_data, class_data, llm_folder())
        wanted[kind] = drawn(trained, kind)
        assert len(set(wanted[kind])) == 3
        seed = {"seed": 3}
        assert as_png(load_painter(trained, device="cpu")(prompts_of(kind), **seed), tmp_path / "native" / kind) == wanted[kind]
        brought = [] if kind == "class" else ["--with_text_encoder"]
        folder = export("--resume", trained, "--out", tmp_path / "st" / kind, *brought)
        assert as_png(load_painter(folder, device="cpu")(prompts_of(kind), **seed), tmp_path / "painted" / kind) == wanted[kind]
        run("--generate", "--resume", str(folder), "--output_dir", str(tmp_path / "again" / kind), "--device", "cpu",
            *(part for prompt in prompts_of(kind) for part in ("--prompt", str(prompt))))  # fmt: skip
        assert [(tmp_path / "again" / kind / "samples" / f"{i:04d}.png").read_bytes() for i in range(3)] == wanted[kind]
        plans.append((str(export("--resume", trained, "--out", tmp_path / "df" / kind, "--diffusers", *brought)), prompts_of(kind), kind))
    shutil.rmtree(text_data)
    code = """
import json, sys
assert not [path for path in sys.path if path.rstrip("/") == sys.argv[2]]
import datasets  # another module of that name
from diffusers import DiffusionPipeline
for folder, prompts, kind in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).to("cpu")
    for i, image in enumerate(pipe(prompts, seed=3).images):
        image.save(f"{kind}{i}.png")
    pipe.save_pretrained(kind)
    try:
        pipe.to("cuda:1")
    except ValueError as error:
        assert "CUDA_VISIBLE_DEVICES" in str(error)
    else:
        raise AssertionError("another GPU")
    pipe(prompts[0], guidance_scale=1.0, num_inference_steps=2, solver="euler", seed=4).images[0].save(f"{kind}-other.png")
"""
    (tmp_path / "elsewhere" / "datasets").mkdir(parents=True)
    (tmp_path / "elsewhere" / "datasets" / "__init__.py").write_text("", encoding="utf-8")
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-c", code, json.dumps(plans), str(ROOT)], cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in MODELS:
        assert [(tmp_path / "elsewhere" / f"{kind}{i}.png").read_bytes() for i in range(3)] == wanted[kind]
        assert (tmp_path / "elsewhere" / f"{kind}-other.png").read_bytes() not in wanted[kind]
        assert (tmp_path / "elsewhere" / kind / "painter" / "model" / "model.safetensors").is_file()
    assert len(list((tmp_path / "df" / "text").glob("painter/jit_t2i_*/LICENSE"))) == 1
    assert as_png(load_painter(tmp_path / "df" / "text", device="cpu")(PROMPTS, seed=3), tmp_path / "inside") == wanted["text"]


@pytest.fixture
def trained(text_data, llm_folder, tmp_path):
    return train("text", tmp_path / "out", text_data, tmp_path, llm_folder())


def test_what_is_exported_is_one_set_of_weights_and_all_settings(trained, tmp_path):
    state = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    for which, name in (("1", "model_ema1"), ("2", "model_ema2"), ("raw", "model")):
        folder = export("--resume", trained, "--out", tmp_path / which, "--eval_ema", which, "--with_text_encoder")
        tensors = load_file(folder / "model.safetensors")
        assert tensors.keys() == state[name].keys() | {"text.mean", "text.std"}
        assert all(torch.equal(tensors[key], value) for key, value in state[name].items())
    state["job"]["drawing"]["weights"] = "2"
    torch.save(state, tmp_path / "second.pth")
    folder = export("--resume", tmp_path / "second.pth", "--out", tmp_path / "second", "--with_text_encoder")  # what draws, where no flag says it
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "2" / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "raw" / "config.json").read_text(encoding="utf-8"))
    assert config["step"] == state["step"] and config["weights"] == "raw" and config["job"]["model"]["name"] == MODELS["text"]
    assert not [word for word in json.dumps(config).split('"') if word.startswith("/")]  # no folders of this machine
    assert config["job"]["run"] == {"seed": 3, "precision": "auto"}
    half = load_file(export("--resume", trained, "--out", tmp_path / "half", "--dtype", "bf16", "--with_text_encoder") / "model.safetensors")
    assert {value.dtype for key, value in half.items() if not key.startswith("text.")} == {torch.bfloat16} and half["text.mean"].dtype == torch.float32
    assert os.path.getsize(tmp_path / "half" / "model.safetensors") < 0.52 * os.path.getsize(tmp_path / "1" / "model.safetensors")
    one, other = (load_painter(tmp_path / name, device="cpu")(PROMPTS).float() for name in ("1", "half"))
    assert 0 < (one - other).abs().mean() < 3
    raw = load_painter(tmp_path / "raw", device="cpu")
    assert raw.job.drawing.weights == "raw" and load_painter(tmp_path / "1", device="cpu").job.drawing.weights == "1"
    assert torch.equal(raw(PROMPTS), load_painter(trained, "raw", device="cpu")(PROMPTS))
    with pytest.raises(UserError, match="--eval_ema 2: .*raw holds only the weights raw"):
        load_painter(tmp_path / "raw", "2", device="cpu")
    with pytest.raises(UserError, match="--eval_ema 2: .*raw holds only the weights raw"):
        export("--resume", tmp_path / "raw", "--out", tmp_path / "again", "--with_text_encoder", "--eval_ema", "2")
    again = export("--resume", tmp_path / "raw", "--out", tmp_path / "again", "--with_text_encoder")
    assert json.loads((again / "config.json").read_text(encoding="utf-8"))["weights"] == "raw"


def fetched_by_diffusers(folder: Path, monkeypatch) -> set[str]:
    """What DiffusionPipeline.download asks of a repository on the hub that holds this folder."""
    from diffusers import DiffusionPipeline
    from diffusers.pipelines import pipeline_utils
    from huggingface_hub.utils import filter_repo_objects

    from exporting.pipeline import JiTPipeline

    names, found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()], set()
    index = folder.parent / "cache" / "model_index.json"  # the only file that is there already
    index.parent.mkdir()
    shutil.copy(folder / index.name, index)

    def snapshot(repository, allow_patterns, ignore_patterns, **_):
        found.update(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return folder

    for name, answer in (
        ("_resolve_revision", lambda *_, **__: "main"),
        ("model_info", lambda *_, **__: SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])),
        ("hf_hub_download", lambda *_, **__: str(index)),
        ("_get_pipeline_class", lambda *_, **__: JiTPipeline),
        ("snapshot_download", snapshot),
    ):
        monkeypatch.setattr(pipeline_utils, name, answer, raising=name != "_resolve_revision")
    DiffusionPipeline.download("me/model", trust_remote_code=True)
    return found


def test_diffusers_fetches_from_the_hub_all_that_draws(trained, tmp_path, monkeypatch):
    folder = export("--resume", trained, "--out", tmp_path / "df", "--diffusers", "--with_text_encoder")
    draws = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != "README.md"}
    assert {"pipeline.py", "painter/painter.py", "painter/model/model.safetensors", "painter/model/text_encoder/config.json"} <= draws
    assert fetched_by_diffusers(folder, monkeypatch) == draws


def test_folders_for_diffusers_of_before_28_november_2026_still_open(trained, tmp_path):
    folder = export("--resume", trained, "--out", tmp_path / "df", "--diffusers", "--with_text_encoder")
    assert checkpoint.find(str(folder), "") == folder / "painter" / "model"
    wanted = load_painter(folder, device="cpu")(PROMPTS)
    for path in list((folder / "painter" / "model").iterdir()):
        path.rename(folder / "painter" / path.name)
    assert torch.equal(load_painter(folder, device="cpu")(PROMPTS), wanted)


def test_a_language_model_of_bin_files_is_warned_of_in_a_folder_for_diffusers(tmp_path, capsys):
    """It ignores them where any weights are safetensors."""
    encoder = tmp_path / "painter" / "model" / "text_encoder"
    for names, warned in ((["pytorch_model.bin"], True), (["pytorch_model.bin", "model.safetensors"], False)):
        encoder.mkdir(parents=True)
        for name in names:
            (encoder / name).touch()
        package.add_code(tmp_path)
        assert ("warning: the language model's weights are .bin files" in capsys.readouterr().out) == warned
        shutil.rmtree(tmp_path / "painter")


@pytest.fixture
def on_the_hub(llm_folder):
    """The language model in the hub's cache, with the files of its licence."""
    folder = Path(os.environ["HF_HOME"], "hub", "models--llm-jp--along")
    snapshot = folder / "snapshots" / ("0123456789abcdef" * 3)[:40]
    shutil.copytree(llm_folder(), snapshot)
    for name in ("LICENSE", "NOTICE.txt", "README.md"):
        (snapshot / name).write_text("Apache-2.0")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    yield "llm-jp/along"
    shutil.rmtree(folder)


def test_a_language_model_that_goes_along_keeps_its_name_its_licence_and_what_was_learned_of_it(on_the_hub, text_data, tmp_path):
    common = ["--epochs", 1, "--batch_size", 8, "--max_text_len", 24]
    run(*flags(text_data, on_the_hub, tmp_path / "out", *common))
    folder = export("--resume", tmp_path / "out", "--out", tmp_path / "st", "--with_text_encoder")
    assert {"LICENSE", "NOTICE.txt", "README.md"} <= {path.name for path in (folder / "text_encoder").iterdir()}
    run(*flags(text_data, on_the_hub, tmp_path / "again", *common), "--init_from", str(folder))
    copied = (tmp_path / "again" / "init_from.txt").read_text(encoding="utf-8").splitlines()
    assert {"copied   y_embedder.proj.weight", "copied   y_embedder.proj.bias"} <= set(copied)
    again = export("--resume", folder, "--out", tmp_path / "twice", "--with_text_encoder")
    for one in (folder, again):
        _, head, body = (one / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        assert yaml.safe_load(head)["base_model"] == [on_the_hub] and f"read by {on_the_hub} " in body and "夕焼け" in body
        assert f"text encoder {on_the_hub}" in headline(load_painter(one, device="cpu"), one)


def test_training_begins_with_it_and_does_not_go_on_with_it(trained, text_data, llm_folder, tmp_path):
    folder = export("--resume", trained, "--out", tmp_path / "st", "--with_text_encoder")
    more = ["--model", MODELS["text"], "--batch_size", 8, "--max_text_len", 24, "--epochs", 1]
    with pytest.raises(UserError, match="is a model for drawing, not a training checkpoint; .* --init_from"):
        run(*flags(text_data, llm_folder(), tmp_path / "new", *more, "--resume", folder))
    run(*flags(text_data, llm_folder(), tmp_path / "new", *more, "--init_from", folder))
    assert "copied" in (tmp_path / "new" / "init_from.txt").read_text(encoding="utf-8")


def test_the_card_says_what_the_checkpoint_says_and_leaves_the_rest_open(trained, tmp_path):
    (trained / "eval").mkdir()
    setting = {"weights": {"which": "1", "step": 4}, "pictures": 500, "img_size": 16, "sampling": {"cfg_scale": 2.0, "method": "heun", "steps": 50}}
    for name, step in (("ours", torch.load(trained / "checkpoint-last.pth", weights_only=True)["step"]), ("older", 1)):
        record = {"figures": {"fid": 12.5, "is": 3.25}, "setting": setting | {"weights": {"which": "1", "step": step}}, "made": {}}
        (trained / "eval" / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    folder = export("--resume", trained, "--out", tmp_path / "st", "--with_text_encoder", "--license", "mit")
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "mit" and yaml.safe_load(head)["pipeline_tag"] == "text-to-image"
    for word in (MODELS["text"], "16 x 16", "data (fill in)", "EMA 1, fp32", "| FID | 12.5 |", "24 tokens at most", "batches of 8", "load_painter"):
        assert word in body, word
    (results,) = (folder / ".eval_results").iterdir()
    found = yaml.safe_load(results.read_text(encoding="utf-8"))
    assert [(one["dataset"]["id"], one["dataset"]["task_id"], one["value"]) for one in found] == [("data", "FID", 12.5), ("data", "IS", 3.25)]


def test_figures_of_a_published_file_that_says_no_step_are_its_own(tmp_path):
    (tmp_path / "eval").mkdir()
    record = {"figures": {"fid": 3.5}, "setting": {"weights": {"which": "1", "step": None}}}
    (tmp_path / "eval" / "ours.json").write_text(json.dumps(record), encoding="utf-8")
    job, saved = SimpleNamespace(lora=None, weights="1"), SimpleNamespace(progress=Progress(0))
    assert card.records_of(job, saved, tmp_path / "checkpoint-last.pth") == {"ours": record}


def test_what_cannot_be_exported_is_one_line(trained, llm_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    st = export("--resume", trained, "--out", tmp_path / "st", "--with_text_encoder")
    other = tmp_path / "other"
    shutil.copytree(llm_folder("bert"), other)
    for argv, message in [
        (["--resume", trained, "--out", tmp_path / "new"], "the language model is the local folder .*; copy it along by --with_text_encoder"),
        (["--resume", trained, "--out", tmp_path / "full", "--with_text_encoder"], "is there already; name a new folder"),
        (["--resume", tmp_path / "nothing", "--out", tmp_path / "new"], "no such file or folder"),
        (["--resume", trained, "--out", tmp_path / "new", "--with_text_encoder", "--llm_model_name", other], "holds other weights"),
        (["--resume", trained, "--out", tmp_path / "new", "--dtype", "fp16"], "--dtype fp16: wanted one of fp32, bf16"),
        (["--resume", trained, "--out", "/proc/new", "--with_text_encoder"], "--out /proc/new cannot be written"),
        (["--resume", trained, "--out", ".", "--with_text_encoder"], "is there already"),
    ]:
        with pytest.raises((UserError, SystemExit)) as error:
            export(*argv)
        assert "fp16" in argv or re.search(message, str(error.value)), error.value
        assert not (tmp_path / "new").exists()
    moved = trained / "moved.pth"
    state = torch.load(trained / "checkpoint-last.pth", weights_only=True)
    torch.save(state | {"text": state["text"] | {"llm": "/home/alice/llm"}}, moved)
    for argv, message in [
        ([], "the local folder /home/alice/llm, which others do not have"),
        (["--with_text_encoder"], "the language model's folder /home/alice/llm is not there any more; say where it is by --llm_model_name"),
        (["--with_text_encoder", "--llm_model_name", other], "holds other weights"),
    ]:
        with pytest.raises(UserError, match=message):
            export("--resume", moved, "--out", tmp_path / "new", *argv)
    found = export("--resume", moved, "--out", tmp_path / "new", "--with_text_encoder", "--llm_model_name", llm_folder())
    assert not any("alice" in path.read_text(encoding="utf-8") for path in (found / "README.md", found / "config.json"))
    (st / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="the exported model cannot be read"):
        load_painter(st)
    for content in ("{}", '{"format": "jit-t2i", "version": 1}'):
        (found / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="does not describe a model of this code"):
            load_painter(found)
    assert not checkpoint.is_exported(tmp_path)


def test_push_uploads_the_folder_to_the_hub(trained, tmp_path, monkeypatch):
    """To a server of our own that answers as the hub does for files that are not large."""
    import huggingface_hub
    import huggingface_hub.constants

    commits, created = [], []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer({"id": "me/model", "sha": "0" * 40, "siblings": [], "private": False, "tags": []})

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.endswith("/repos/create"):
                created.append(json.loads(body))
                self.answer({"url": "https://huggingface.co/me/model", "name": "me/model"})
            elif "/preupload/" in self.path:
                self.answer({"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]})
            elif "/commit/" not in self.path:  # the card's head is looked at
                self.answer({"errors": [], "warnings": []})
            else:
                commits.extend(json.loads(line) for line in body.splitlines())
                self.answer({"commitUrl": "https://huggingface.co/me/model/commit/0", "commitOid": "0" * 40, "success": True})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_x"))
    folder = export("--resume", trained, "--out", tmp_path / "st", "--with_text_encoder")
    assert program.push(folder, "me/model").endswith("/me/model")
    server.shutdown()
    sent = {one["value"]["path"] for one in commits if one["key"] == "file"}
    assert created[0]["name"] == "model" and {"README.md", "config.json", "model.safetensors", "text_encoder/config.json"} <= sent
