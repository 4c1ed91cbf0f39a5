"""Figures: equal to torch-fidelity's and to closed forms, the same however they are computed, and never of another setting than they say."""

import json
import pickle
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import CAPTIONS, ROOT, in_ranks, load_encoder, open_text, tiny_features, wake, write_text_data
from PIL import Image
from test_training import flags, run, scalars
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

import engine_jit
import flags as command_line
import prepare_ref
from config import Data, DiffusionConfig, Eval, SamplerConfig
from datasets.stream import PackedStrings
from evaluation.evaluator import Evaluator, call_out_initial, evaluate
from evaluation.measures import Alignment, Frechet, Subjects
from evaluation.plan import Networks, Request, plan
from evaluation.records import Record, describe, short
from evaluation.references import is_kept, make_reference
from models_jit import build_model
from sampling import Painter
from util import checkpoint, extractors, metrics, reference
from util import distributed as dist
from util.ema import Ema
from util.errors import UserError

CPU = torch.device("cpu")


class Tiny(FeatureExtractorBase):
    """conftest's tiny features as a network of torch-fidelity."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return "16", "logits_unbiased"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return {"isc": "logits_unbiased", "fid": "16", "prc": "16"}[metric]

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return None

    def forward(self, x):
        found = dict(zip(self.get_provided_features_list(), tiny_features(x)))
        return tuple(found[name] for name in self.features_list)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def random_pictures(count, seed, size=16):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def reference_of(pictures, extractor):
    moments = metrics.Moments()
    moments.add(extractor(pictures)[0])
    values, _ = moments.statistics()
    return reference.Reference(values, ROOT / "ref.npz", "0" * 64, {})


def test_fid_is_precision_and_recall_equal_torch_fidelity():
    torch_fidelity.register_feature_extractor("tiny", Tiny)
    drawn, real = random_pictures(96, 0), (random_pictures(80, 1).float() * 0.8).to(torch.uint8)
    common = {"input1": Rows(drawn), "input2": Rows(real), "cuda": False, "feature_extractor": "tiny", "cache": False, "verbose": False, "save_cpu_ram": True}
    wanted = torch_fidelity.calculate_metrics(isc=True, fid=True, prc=True, **common)
    moments = [metrics.Moments() for _ in range(2)]
    for rows, moment in zip((drawn, real), moments):
        for part in rows.split(40):
            moment.add(tiny_features(part)[0])
    fid = metrics.frechet_distance(*(moment.statistics()[0] for moment in moments))
    assert fid == pytest.approx(wanted["frechet_inception_distance"], rel=1e-5)
    assert metrics.inception_score(tiny_features(drawn)[1]) == pytest.approx(wanted["inception_score_mean"], rel=1e-6)
    assert metrics.frechet_distance(moments[0].statistics()[0], moments[0].statistics()[0]) == pytest.approx(0, abs=1e-6)
    assert metrics.precision_recall(tiny_features(drawn)[0], tiny_features(real)[0]) == (wanted["precision"], wanted["recall"])
    assert 0 < wanted["precision"] < 1


def test_frechet_distance_of_gaussians_in_closed_form():
    a = {"mu": np.zeros(3), "sigma": np.diag([1.0, 4.0, 9.0])}
    b = {"mu": np.array([1.0, 2.0, 2.0]), "sigma": np.diag([4.0, 4.0, 1.0])}
    assert metrics.frechet_distance(a, b) == pytest.approx(9 + 1 + 0 + 4)  # |mu|^2 + sum (s_a - s_b)^2


@pytest.mark.slow
def test_a_whole_evaluation_equals_torch_fidelity_on_the_pictures_it_keeps(text_data, llm_folder, clip_folder, inception_file, tmp_path, capsys):
    """Inception's graph from a weights file, nothing fetched; reference, figures, record, TensorBoard."""
    (text_data / "images" / "1.png").unlink()
    Image.effect_noise((40, 30), 80).convert("RGB").save(text_data / "images" / "1.webp")  # cropped and made smaller
    out, weights = tmp_path / "out", ["--inception_weights", str(inception_file)]
    argv = flags(text_data, llm_folder(), out, "--batch_size", 4)
    run(*argv, "--epochs", "1")
    run(*argv, *weights, "--resume", str(out), "--evaluate_gen", "--save_images", "--clip_model", str(clip_folder()), "--num_images", "12")
    printed = capsys.readouterr().out
    (path,) = (out / "eval").glob("*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    for i in range(8):
        picture = open_text(text_data, 16).picture(i)
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "real" / f"{i}.png")
    folders = {"input1": str(path.with_suffix("")), "input2": str(tmp_path / "real")}
    wanted = torch_fidelity.calculate_metrics(
        **folders, cuda=False, isc=True, fid=True, feature_extractor_weights_path=str(inception_file), cache=False, verbose=False, save_cpu_ram=True
    )
    assert record["figures"]["fid"] == pytest.approx(wanted["frechet_inception_distance"], rel=1e-3)
    assert record["figures"]["is"] - 1 == pytest.approx(wanted["inception_score_mean"] - 1, rel=1e-3)  # untrained pictures look alike: it is near 1

    shown = [json.loads(line) for line in (path.with_suffix("") / "pictures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(shown) == 12 and all((path.with_suffix("") / row["file"]).is_file() and row["shows"] in CAPTIONS for row in shown)
    kept = reference.read(text_data / "fid_stats_16.npz")
    assert metrics.frechet_distance(kept.values, kept.values) < 1e-3  # the data against itself
    assert kept.facts["n"] == kept.facts["files"] == 8 and kept.facts["img_size"] == 16
    assert "not the published file of inception-v3-compat" in printed and f"FID-12 {record['figures']['fid']:.3f}" in printed
    setting = record["setting"]
    assert setting["fid"]["reference_sha256"] == kept.sha256 and setting["fid"]["extractor"] == kept.facts["extractor"]
    assert setting["weights"]["step"] == 2 and setting["seed"] == 0 and setting["libraries"]["torch-fidelity"].startswith("0.4")
    assert setting["sampling"] == {"method": "heun", "steps": 2, "cfg_scale": 2.0, "cfg_interval": [0.0, 1.0], "time_shift": 1.0}
    assert record["made"]["checkpoint"] == str(out / "checkpoint-last.pth") and set(record["made"]["seconds"]) == {"drawing", "features", "rest"}
    assert scalars(out, "FID-12/16px_ema1_cfg2_0-1_heun2") == [pytest.approx(record["figures"]["fid"], rel=1e-6)]
    assert scalars(out, "R-precision-12/16px_ema1_cfg2_0-1_heun2") is not None


def make_painter(batch_size):
    torch.manual_seed(0)
    net = wake(build_model("JiT-Pico/8", input_size=16, num_classes=4)).eval()
    return Painter(net, torch.tensor([4]), 16, DiffusionConfig(), SamplerConfig("heun", 4, 2.0), batch_size, CPU, seed=3)


def test_pictures_and_figures_do_not_depend_on_batch_size_or_ranks(tiny_extractor, clip_folder, tmp_path):
    clip = extractors.load_clip(str(clip_folder()), CPU)
    ref = reference_of(random_pictures(200, 5), tiny_extractor)
    labels = torch.arange(24) % 4
    subjects = Subjects(labels, captions=[CAPTIONS[i % len(CAPTIONS)] for i in range(24)])

    def figures(batch_size):
        return evaluate(make_painter(batch_size), lambda y: y, subjects, [Frechet("fid", tiny_extractor, ref), Alignment(clip, 0)])[0]

    def pictures(batch_size):
        return torch.cat([make_painter(batch_size).paint(part, labels[part]) for part in torch.arange(24)[: 16 * batch_size].split(batch_size)])

    whole, wanted = pictures(24), figures(24)
    assert set(wanted) == {"fid", "is", "clip_score", "r_precision"} and whole.std() > 0.1
    for size in (1, 7):
        torch.testing.assert_close(found := pictures(size), whole[: len(found)], rtol=0, atol=1e-4)
        assert figures(size) == pytest.approx(wanted, rel=1e-3, abs=1e-3)  # a random CLIP's score is about 0 of 100
    in_ranks(2, lambda: (tmp_path / "two.json").write_text(json.dumps(figures(7))))
    assert json.loads((tmp_path / "two.json").read_text()) == pytest.approx(wanted, rel=1e-3, abs=1e-3)


def test_start_noise_follows_from_seed_and_number_alone(monkeypatch):
    noises = {}

    def remember(net, noise, *_):
        noises[len(noise)] = noise
        return noise

    monkeypatch.setattr("sampling.sample", remember)
    for size in (1, 7, 64):
        list(make_painter(size).draw(lambda numbers: torch.zeros(len(numbers), dtype=torch.long), size, ""))
    assert torch.equal(noises[1], noises[64][:1]) and torch.equal(noises[7], noises[64][:7])


def test_memory_grows_by_the_logits_alone(tiny_extractor):
    measure = Frechet("fid", tiny_extractor, None)
    measure.begin(Subjects(torch.arange(0)))

    def held():
        return sum(tensor.untyped_storage().nbytes() for tensor in [measure.moments.sum, measure.moments.outer, *measure.logits.rows])

    measure.add([0, 1], random_pictures(2, 0))
    before = held()
    measure.add(list(range(2, 102)), random_pictures(100, 1))
    assert held() - before == 100 * 10 * 4  # float32 logits


def test_pictures_are_measured_as_the_png_that_would_be_kept(tmp_path, tiny_extractor):
    seen = {}
    probe = SimpleNamespace(begin=lambda s: None, add=lambda n, p: seen.update(zip(n, p)), figures=lambda: {})
    evaluate(make_painter(4), lambda y: y, Subjects(torch.arange(6) % 4), [probe], tmp_path)
    for i, picture in seen.items():
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{i:06d}.png")), picture.permute(1, 2, 0).numpy())


# --- reference statistics


def written(path, extractor="tiny", img_size=16, **changed):
    facts = {"extractor": extractor, "img_size": img_size, "crop": reference.CROP, "n": 3, "files": 3, "data": "d"} | changed
    reference.write(path, {"mu": np.arange(3.0), "sigma": np.eye(3)}, facts)
    return path


def test_reference_statistics_round_trip_and_are_checked(tmp_path):
    found = reference.read(written(tmp_path / "a.npz"))
    assert np.array_equal(found.values["mu"], np.arange(3.0)) and found.facts["n"] == 3
    reference.check(found, "tiny", 3, 16)
    for wanted, message in [
        (("other", 3, 16), "made with extractor tiny, this run has other"),
        (("tiny", 3, 32), r"made with img_size 16, this run has 32; make one by prepare_ref.py --img_size 32"),
        (("tiny", 2048, 16), "holds 3 features a picture, and the network gives 2048"),
    ]:
        with pytest.raises(UserError, match=message):
            reference.check(found, *wanted)
    with pytest.raises(UserError, match="made with crop other"):
        reference.check(reference.read(written(tmp_path / "b.npz", crop="other")), "tiny", 3, 16)


def test_published_statistics_are_taken_as_they_are(tmp_path):
    np.savez(tmp_path / "jit.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3))
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=np.eye(2), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    for name in ("jit.npz", "adm.npz"):
        found = reference.read(tmp_path / name)
        reference.check(found, "anything", 3, 256)
        assert found.facts == {} and found.values["mu"].dtype == np.float64
        assert metrics.frechet_distance(found.values, {"mu": np.ones(3), "sigma": np.eye(3)}) == pytest.approx(3)


class Hostile:
    def __reduce__(self):
        return (open, (f"{self.place}/ran", "w"))

    def __init__(self, place):
        self.place = place


def test_files_that_are_no_statistics_are_one_line_and_run_nothing(tmp_path):
    np.savez(tmp_path / "mean.npz", mean=np.zeros(1))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "nan.npz", mu=np.array([np.nan]), sigma=np.eye(1))
    np.savez(tmp_path / "object.npz", mu=np.array([Hostile(tmp_path)], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "text.npz", mu=np.array(["a"]), sigma=np.eye(1))
    np.savez(tmp_path / "data.npz", mu=np.zeros(1), sigma=np.eye(1), data=np.zeros(5), n=np.zeros(2))
    assert reference.read(tmp_path / "data.npz").facts == {}  # arrays of another meaning
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Hostile(tmp_path)))
    (tmp_path / "cut.npz").write_bytes(written(tmp_path / "whole.npz").read_bytes()[:200])
    for name, message in [
        ("mean", "wanted the arrays mu and sigma, found mean"),
        ("shape", r"mu is \(3,\) and sigma \(2, 2\)"),
        ("nan", "not all of its numbers are finite"),
        ("text", "not readable as reference statistics"),
        ("object", "not readable as reference statistics"),
        ("pickle", "not readable as reference statistics"),
        ("cut", "not readable as reference statistics"),
        ("nothing", "no such file"),
    ]:
        with pytest.raises(UserError, match=f"--fid_stats .*{name}.npz.*{message}") as error:
            reference.read(tmp_path / f"{name}.npz")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_the_datas_own_statistics_are_kept_and_made_anew_when_the_data_changes(text_data, tiny_extractor, tmp_path, capsys, monkeypatch):
    path = tmp_path / "stats.npz"

    def get(extractor=tiny_extractor, size=16, root=str(text_data)):
        dataset = open_text(root, size, missing="skip")
        if not is_kept(path, dataset, root, extractor):
            make_reference(dataset, root, extractor, path, num_workers=0)
        return reference.read(path)

    first = get()
    pictures = torch.stack([open_text(text_data, 16).picture(i) for i in range(8)])
    np.testing.assert_allclose(first.values["sigma"], np.cov(tiny_features(pictures)[0].double().numpy(), rowvar=False), rtol=1e-4, atol=1e-6)
    monkeypatch.chdir(tmp_path)
    for root in (str(text_data), f"{text_data}/", "data", "./data", "data/"):  # however it is spelled
        assert get(root=root).sha256 == first.sha256
    assert capsys.readouterr().out.count("made once") == 1
    (text_data / "images" / "7.png").rename(text_data / "images" / "70.png")
    (text_data / "captions" / "7.txt").rename(text_data / "captions" / "70.txt")
    assert get().facts["data"] != first.facts["data"]
    assert get(size=8).facts["img_size"] == 8
    assert get(replace(tiny_extractor, identity="other")).facts["extractor"] == "other"
    path.write_bytes(b"cut")
    assert get().facts["n"] == 8
    np.savez(path, mu=np.zeros(16), sigma=np.eye(16))
    with pytest.raises(UserError, match="does not say which pictures it was made from; to use it give --fid_stats"):
        get()


def test_broken_pictures_are_left_out_of_the_statistics_but_not_many(tmp_path, tiny_extractor, capsys):
    data = write_text_data(tmp_path / "data", 100)
    (data / "images" / "7.png").write_bytes(b"broken")
    path = tmp_path / "s.npz"
    make_reference(open_text(data, 16), str(data), tiny_extractor, path, 0)
    made = reference.read(path)
    assert made.facts["n"] == 99 and made.facts["files"] == 100 and "1 broken pictures are left out" in capsys.readouterr().out
    (data / "images" / "8.png").write_bytes(b"broken")
    path.unlink()
    with pytest.raises(UserError, match="2 of 100 pictures below .* cannot be read, over 1 %"):
        make_reference(open_text(data, 16), str(data), tiny_extractor, path, 0)
    assert not path.exists()
    with pytest.raises(UserError, match="cannot be written"):
        make_reference(open_text(data, 16), str(data), tiny_extractor, data / "images" / "1.png" / "s.npz", 0)


def test_two_jobs_write_one_file_of_statistics_without_harm(tmp_path, monkeypatch):
    path, save, inner = tmp_path / "s.npz", np.savez, []

    def interrupted(file, **arrays):
        if not inner:  # another job, with another process number, comes and goes while this one writes
            inner.append(1)
            with monkeypatch.context() as other:
                other.setattr("os.getpid", lambda: -1)
                written(path, n=4)
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", interrupted)
    assert reference.read(written(path)).facts["n"] == 3 and [file.name for file in tmp_path.iterdir()] == ["s.npz"]


def test_where_the_datas_own_statistics_are_kept(text_data, tiny_extractor, tmp_path, monkeypatch):
    dataset, out = open_text(text_data, 16), tmp_path / "out"
    request = Request(Eval(), Networks(inception=tiny_extractor), None, PackedStrings(()))

    def found():
        kept = plan(request, Data(path=str(text_data)), dataset, out).kept["fid"]
        return kept.path, kept.there

    assert found() == (text_data / "fid_stats_16.npz", False)
    make_reference(dataset, str(text_data), tiny_extractor, text_data / "fid_stats_16.npz", 0)
    monkeypatch.setattr("os.access", lambda *_: False)  # read-only data
    assert found() == (text_data / "fid_stats_16.npz", True)
    (text_data / "fid_stats_16.npz").unlink()
    assert found() == (out / "fid_stats_16.npz", False)
    make_reference(dataset, str(text_data), tiny_extractor, out / "fid_stats_16.npz", 0)
    assert found() == (out / "fid_stats_16.npz", True)


def test_prepare_ref_makes_the_statistics_of_either_kind_of_data(text_data, class_data, tmp_path, tiny_extractor, monkeypatch):
    monkeypatch.setattr(extractors, "load_fidelity", lambda *_: tiny_extractor)
    common = ["--img_size", "16", "--device", "cpu", "--num_workers", "0"]
    for data, count in ((text_data, 8), (class_data, 12)):
        prepare_ref.main(["--data_path", str(data), *common, "--out", str(tmp_path / "fid_stats" / "x.npz")])
        assert reference.read(tmp_path / "fid_stats" / "x.npz").facts["n"] == count
    for argv, message in [(["--out", "x.pt"], "wanted a file name that ends in .npz"), (["--out", "x.npz", "--img_size", "0"], "--img_size 0")]:
        with pytest.raises(UserError, match=message):
            command_line.parse_reference(["--data_path", str(text_data), *common, *argv])


# --- networks


def test_weights_are_looked_for_before_anything_else(text_data, llm_folder, inception_file, tmp_path, monkeypatch, capsys):
    argv = flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 4, "--epochs", 1)
    run(*argv, "--online_eval")  # goes on without figures, as it says
    printed = capsys.readouterr().out
    place = extractors.INCEPTION.place
    assert f"FID and IS are left out: no Inception weights; download {extractors.INCEPTION.url} to {place}, or name the file by --inception_weights" in printed
    assert printed.index("left out") < printed.index("text cache") and not (tmp_path / "out" / "eval").exists()
    run(*argv, "--online_eval", "--save_images", "--num_images", "3", "--epochs", "2", "--resume", str(tmp_path / "out"))  # the pictures alone
    assert len([*(tmp_path / "out" / "eval").glob("*/*.png")]) == 3
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:  # costs what was to be written, not the run
        for name in ("save_pictures", "write_record"):
            patch.setattr(f"evaluation.evaluator.{name}", lambda *args, **more: (_ for _ in ()).throw(full))
        capsys.readouterr()
        run(*argv, "--online_eval", "--save_images", "--num_images", "3", "--epochs", "3", "--resume", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert printed.count("cannot be written ([Errno 28] No space left on device)") == 2 and printed.index("no figures  [EMA 1 at step") < printed.index(
        ".json cannot be written"
    )
    assert checkpoint.load(tmp_path / "out" / checkpoint.LAST)["epoch"] == 2

    argv = flags("/no/data", "no/llm", tmp_path / "out", "--resume", tmp_path / "out")
    hostile = tmp_path / "hostile.pth"
    hostile.write_bytes(pickle.dumps(Hostile(tmp_path), protocol=2))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(inception_file.read_bytes()[:1000])
    for extra, message in [
        (["--evaluate_gen"], "--evaluate_gen has nothing to measure"),
        (["--sweep", "--cfg", "1,2"], f"--sweep chooses by FID: no Inception weights; download {extractors.INCEPTION.url}"),
        (["--evaluate_gen", "--fid_stats", "x.npz"], "--fid_stats is for FID: no Inception weights"),
        (["--sweep", "--cfg", "1,2", "--inception_weights", "none"], "--sweep chooses by FID: --inception_weights none"),
        (["--evaluate_gen", "--precision_recall"], "--precision_recall: no VGG16 weights; download https://.*vgg16.*--vgg16_weights"),
        (["--evaluate_gen", "--inception_weights", "/nothing.pth"], "--inception_weights /nothing.pth: no such file"),
        (["--evaluate_gen", "--inception_weights", str(hostile)], "not the weights of inception-v3-compat"),
        (["--evaluate_gen", "--inception_weights", str(tmp_path / "other.pth")], "not the weights of inception-v3-compat"),
        (["--evaluate_gen", "--inception_weights", str(tmp_path / "cut.pth")], "not the weights of inception-v3-compat"),
        (["--evaluate_gen", "--fd_dinov2", "/nothing"], "--fd_dinov2 /nothing: no such folder"),
        (["--evaluate_gen", "--fd_dinov2", str(llm_folder())], "--fd_dinov2 .* is a llama; wanted a DINOv2"),
        (["--evaluate_gen", "--clip_model", "no such"], "--clip_model no such: no such folder"),
        (["--evaluate_gen", "--clip_model", str(llm_folder())], "--clip_model .* is a llama; wanted a CLIP or SigLIP"),
    ]:
        saved = ["--llm_model_name", str(llm_folder())]
        with pytest.raises(UserError, match=message) as error:
            run(*argv, *saved, *extra)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_precision_recall_and_fd_dinov2_from_local_weights(text_data, llm_folder, tmp_path, monkeypatch):
    """The whole road through VGG16's and DINOv2's graphs."""
    llm = llm_folder()
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)  # seconds, for 138M weights that are loaded over
    from torchvision.models import vgg16
    from transformers import Dinov2Config, Dinov2Model

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    vgg = {}
    for name, shape in shapes.items():  # each channel is its own multiple of the mean, so that the file is small
        row = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
        vgg[name] = (3 * row / shape[1:].numel()).expand(shape) if len(shape) > 1 else 0.2 * row - 0.1
    torch.save(vgg, tmp_path / "vgg.pth")
    dinov2 = wake(Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56)), std=0.1).eval()
    dinov2.save_pretrained(tmp_path / "dinov2")
    out = tmp_path / "out"
    for i in range(8):  # noise of several strengths about grey, as an untrained network draws it
        noise = torch.randn(16, 16, 3, generator=generator) * (2 + 3 * i) + 120 + 2 * i
        Image.fromarray(noise.clamp(0, 255).to(torch.uint8).numpy()).save(text_data / "images" / f"{i}.png")
    argv = flags(text_data, llm, out, "--batch_size", 4)
    run(*argv, "--epochs", "1")
    extra = ["--precision_recall", "--vgg16_weights", str(tmp_path / "vgg.pth"), "--fd_dinov2", str(tmp_path / "dinov2")]
    run(*argv, *extra, "--resume", str(out), "--evaluate_gen", "--save_images", "--num_images", "5")
    (path,) = (out / "eval").glob("*.json")
    figures = json.loads(path.read_text())["figures"]
    drawn = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in sorted(path.with_suffix("").glob("*.png"))]).permute(0, 3, 1, 2)
    real = torch.stack([open_text(text_data, 16).picture(i) for i in range(8)])

    wanted = torch_fidelity.calculate_metrics(
        input1=Rows(drawn), input2=Rows(real[[0, 1, 3, 4, 6]]), cuda=False, prc=True, feature_extractor_weights_path=str(tmp_path / "vgg.pth"), cache=False, verbose=False,
        save_cpu_ram=True,
    )  # fmt: skip
    assert (figures["precision"], figures["recall"]) == (wanted["precision"], wanted["recall"])
    assert 0 < figures["precision"] < 1 or 0 < figures["recall"] < 1

    def tokens(pictures):
        channels = [Image.fromarray(channel.numpy()).resize((224, 224), Image.BICUBIC) for picture in pictures.float() for channel in picture]
        shown = torch.from_numpy(np.stack(channels)).view(-1, 3, 224, 224).permute(0, 2, 3, 1)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            return dinov2(((shown / 255 - mean) / std).permute(0, 3, 1, 2)).last_hidden_state[:, 0].double().numpy()

    a, b = ({"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)} for rows in map(tokens, (drawn, real)))
    assert figures["fd_dinov2"] == pytest.approx(metrics.frechet_distance(a, b), rel=1e-3)
    assert (text_data / "fd_dinov2_stats_16.npz").is_file()


# --- text alignment


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_clip_score_is_100_times_the_cosine_that_transformers_gives(kind, clip_folder):
    from transformers import AutoModel, AutoProcessor

    pictures = random_pictures(5, 2, size=24)
    captions = [*CAPTIONS[:4], "とても長い説明" * 30]
    measure = Alignment(extractors.load_clip(str(clip_folder(kind)), CPU), seed=0)
    measure.begin(Subjects(torch.arange(5), captions=captions))
    measure.add([3, 1], pictures[[3, 1]])
    measure.add([0, 2, 4], pictures[[0, 2, 4]])

    model, processor = AutoModel.from_pretrained(clip_folder(kind)).eval(), AutoProcessor.from_pretrained(clip_folder(kind))
    longest = model.config.text_config.max_position_embeddings
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    inputs = processor(text=captions, images=images, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs)
    cosine = torch.nn.functional.normalize(found.image_embeds, dim=-1) @ torch.nn.functional.normalize(found.text_embeds, dim=-1).T
    figures = measure.figures()
    assert figures["clip_score"] == pytest.approx(100 * cosine.diagonal().mean().item(), abs=1e-3)
    assert figures["r_precision"] == pytest.approx((cosine.argmax(1) == torch.arange(5)).float().mean().item())


class Pointing:
    """A CLIP in closed form: caption k is axis k, a picture's first level says which axis it points along."""

    identity = "pointing"

    def of_captions(self, captions):
        return torch.eye(300)[[int(caption) for caption in captions]]

    def of_pictures(self, pictures):
        return torch.eye(300)[pictures[:, 0, 0, 0].long()] * 0.8


def test_r_precision_and_clip_score_in_closed_form():
    captions = [str(i % 250) for i in range(500)]  # 250 different ones, each twice
    pictures = torch.zeros(500, 3, 1, 1, dtype=torch.uint8)
    pictures[:, 0, 0, 0] = torch.arange(500) % 250
    pictures[:100, 0, 0, 0] = 255  # a hundred show what no caption says
    measure = Alignment(Pointing(), seed=0)
    subjects = Subjects(torch.arange(500), captions=captions)
    for _ in range(2):  # a second evaluation starts afresh
        measure.begin(subjects)
        for part in torch.arange(500).split(64):
            measure.add(part.tolist(), pictures[part])
        assert measure.figures() == {"clip_score": pytest.approx(80 * 0.8), "r_precision": 0.8}
    assert measure.facts(subjects)["clip_score"]["captions_besides_the_own"] == 99
    chosen = (measure.own[:, None] + torch.arange(100)) % 250
    assert all(len(set(row)) == 100 for row in chosen.tolist())  # itself and 99 others

    few = Subjects(torch.arange(3), captions=["1", "2", "2"])
    measure.begin(few)
    measure.add([0, 1, 2], torch.tensor([1, 2, 1], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 1, 1))
    assert measure.figures()["r_precision"] == pytest.approx(2 / 3) and measure.facts(few)["clip_score"]["captions_besides_the_own"] == 1


def test_a_clip_that_cannot_be_had_is_left_out_in_one_line(capsys):
    assert extractors.load_clip("no-such/clip", CPU) is None
    printed = capsys.readouterr().out
    assert printed.startswith("CLIP score and R-precision are left out: --clip_model no-such/clip cannot be loaded") and printed.count("\n") == 1


def test_a_clip_folder_that_is_not_whole_is_one_line(clip_folder, tmp_path):
    for part in ("tokenizer.json", "processor_config.json"):
        folder = tmp_path / part
        shutil.copytree(clip_folder(), folder)
        (folder / part).unlink()
        try:
            assert extractors.load_clip(str(folder), CPU) is None  # a file that is missing is a CLIP that cannot be had
        except UserError as error:
            assert f"--clip_model {folder} cannot be loaded" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("load", [extractors.load_dinov2, extractors.load_clip, lambda name, _: load_encoder(name)])
def test_a_model_folder_runs_no_code_of_its_own(load, clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "model"
    shutil.copytree(clip_folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError):
        load(str(folder), CPU)
    assert not (tmp_path / "ran").exists()


def test_captions_of_ones_own_are_drawn_and_known(text_data, llm_folder, clip_folder, tmp_path):
    """--eval_captions, a file or a folder, beside the data or without any."""
    out = tmp_path / "out"
    argv = flags(text_data, llm_folder(), out, "--batch_size", 4)
    (tmp_path / "asked.txt").write_text("新しい猫\n\n赤い三\n", encoding="utf-8")
    asked = ["--eval_captions", str(tmp_path / "asked.txt"), "--clip_model", str(clip_folder())]
    run(*argv, "--epochs", "1", "--online_eval", *asked)
    mean = torch.load(out / "checkpoint-last.pth", weights_only=True)["text"]["mean"]
    run(*argv, "--epochs", "1", "--output_dir", str(tmp_path / "plain"))
    assert torch.equal(mean, torch.load(tmp_path / "plain" / "checkpoint-last.pth", weights_only=True)["text"]["mean"])  # the training captions' alone

    (tmp_path / "folder" / "captions").mkdir(parents=True)
    (tmp_path / "folder" / "captions" / "a.txt").write_text("新しい猫\n赤い三\n", encoding="utf-8")
    shown = []
    for i, data in enumerate((text_data, "/no/data")):
        place = tmp_path / f"eval{i}"
        where = ["--data_path", str(data), "--output_dir", str(place), "--resume", str(out), "--evaluate_gen", "--save_images"]
        run(*argv, *where, *asked[2:], "--eval_captions", str(tmp_path / ("asked.txt" if i else "folder")))
        (lines,) = (place / "eval").glob("*/pictures.jsonl")
        shown.append([json.loads(line)["shows"] for line in lines.read_text(encoding="utf-8").splitlines()])
        pictures = [np.asarray(Image.open(lines.parent / f"{k:06d}.png")) for k in range(6)]
        assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 0
    assert shown == [["新しい猫", "赤い三"] * 3] * 2
    (tmp_path / "empty.txt").write_text("\n")
    for path, message in [
        ("empty.txt", "holds no line of text"),
        ("nothing", "cannot be read as UTF-8"),
        ("out", "no .txt with a line of text in this folder"),
    ]:
        with pytest.raises(UserError, match=f"--eval_captions .*{path}.*{message}"):
            run(*argv, "--resume", str(out), "--evaluate_gen", *asked[2:], "--eval_captions", str(tmp_path / path))


# --- sweeps, records, averages


def test_a_sweep_tabulates_plots_chooses_the_best_and_goes_on_where_it_stopped(class_data, tmp_path, tiny_extractor, monkeypatch, capsys):
    monkeypatch.setattr(extractors, "load_fidelity", lambda *_: tiny_extractor)
    out = tmp_path / "out"
    common = ["--model", "JiT-Pico/8", "--img_size", "16", "--class_num", "3", "--device", "cpu", "--num_workers", "0", "--num_sampling_steps", "2"]
    common += ["--data_path", str(class_data), "--output_dir", str(out)]
    run(*common, "--epochs", "2", "--warmup_epochs", "0", "--batch_size", "4", "--lr", "1e-2")
    sweep = [*common, "--resume", str(out), "--sweep", "--sweep_images", "9", "--num_images", "24"]
    run(*sweep, "--cfg", "1:2:0.5", "--eval_ema", "2", "--interval", "0-1")  # a part of what follows, as if that had been killed
    before = {path.name: path.stat().st_mtime_ns for path in (out / "eval").glob("*.json")}
    capsys.readouterr()
    run(*sweep, "--cfg", "1:2:0.5", "--eval_ema", "2,raw", "--interval", "0-1,0.3-0.9")
    printed = capsys.readouterr().out
    assert printed.count("as measured before") in (3, 4) and all((out / "eval" / name).stat().st_mtime_ns == at for name, at in before.items())
    rows = [line for line in (out / "eval" / "sweep_step6_9.md").read_text().splitlines() if line.startswith(("| 2", "| raw"))]
    assert len(rows) == 2 * (3 + 2)  # without guidance there is no interval
    fids = [float(row.split("|")[4].split()[0]) for row in rows]
    assert [i for i, row in enumerate(rows) if "**best**" in row] == [min(range(10), key=fids.__getitem__)]
    assert Image.open(out / "eval" / "sweep_step6_9.png").width > 500
    weights, cfg, interval = (part.strip() for part in rows[min(range(10), key=fids.__getitem__)].split("|")[1:4])
    best = f"step6_16px_{weights if weights == 'raw' else f'ema{weights}'}_cfg{cfg}_{interval}_heun2_24_"
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        run(*sweep, "--cfg", "1,2", "--resume", str(tmp_path / "new"), "--output_dir", str(tmp_path / "new"))
    assert list((out / "eval").glob(f"{best}*.json")) and "FID-24" in printed.split("table and plot")[1]
    assert tiny_extractor.network.places == ["cpu:0", "cpu"] * 3  # for the statistics, and once a sweep


def test_two_ranks_sweep_and_evaluate_as_one_process_does(text_data, llm_folder, clip_folder, tiny_extractor, tmp_path, monkeypatch):
    """All measures; statistics made on two ranks; evaluations within training too."""
    monkeypatch.setattr(extractors, "load_fidelity", lambda *_: tiny_extractor)

    def figures(out):
        found = [json.loads(path.read_text()) for path in (out / "eval").glob("*.json")]
        return {Record({}, record["setting"]).name: record["figures"] for record in found}

    def work(out):
        argv = flags(text_data, llm_folder(), out, "--resume", out, "--precision_recall", "--clip_model", clip_folder(), "--num_images", 14)
        run(*argv, "--epochs", "1", "--batch_size", str(4 // dist.world_size()), "--online_eval")
        run(*argv, "--sweep", "--cfg", "1,3", "--sweep_images", "9", "--save_images")

    llm_folder(), clip_folder()  # before the processes part
    in_ranks(2, lambda: work(tmp_path / "two"))
    kept = reference.read(text_data / "fid_stats_16.npz")
    (text_data / "fid_stats_16.npz").unlink()
    work(tmp_path / "one")
    np.testing.assert_allclose(reference.read(text_data / "fid_stats_16.npz").values["sigma"], kept.values["sigma"], rtol=1e-6, atol=1e-12)
    one, two = (sorted(figures(tmp_path / name).items()) for name in ("one", "two"))
    assert len(one) == len(two) == 4 and set(one[0][1]) == {"fid", "is", "clip_score", "r_precision", "precision", "recall"}
    for (_, a), (_, b) in zip(one, two):  # the names differ by the hash of weights, equal but for rounding
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)
    assert len(list((tmp_path / "two" / "eval").glob("*/*.png"))) == 14


def test_a_record_says_what_it_depends_on_and_nothing_else_changes_its_name():
    setting = {
        "model": "JiT-B/16", "weights": {"which": "1", "decay": 0.9999, "step": 60000, "sha256": "w"}, "img_size": 256, "seed": 0, "pictures": 10000,
        "sampling": {"method": "heun", "steps": 50, "cfg_scale": 2.9, "cfg_interval": [0.1, 1.0], "time_shift": 1.0},
        "fid": {"reference": "in256.npz", "reference_sha256": "0123456789"}, "clip_score": {"captions_besides_the_own": 99},
    }  # fmt: skip
    record = Record({"fid": 4.3714, "is": 275.123, "clip_score": 23.456, "r_precision": 0.8714}, setting)
    assert record.line() == (
        "FID-10k 4.371  IS-10k 275.12  CLIP score-10k 23.46 (100 x cosine)  R-precision-10k 0.871 (of 100)  "
        "[EMA 1 at step 60000, cfg 2.9 in 0.1-1, heun 50, seed 0, reference in256.npz (sha256 01234567)]"
    )
    assert list(record.scalars()) == [f"{name}-10k/256px_ema1_cfg2.9_0.1-1_heun50" for name in ("FID", "IS", "CLIP score", "R-precision")]
    assert record.name.startswith("step60000_256px_ema1_cfg2.9_0.1-1_heun50_10k_")
    assert Record({}, setting, {"processes": 8}).name == record.name and Record({}, setting | {"seed": 1}).name != record.name
    assert short(50000) == "50k" and short(8192) == "8192"


def test_other_weights_have_another_hash():
    net = build_model("JiT-Pico/8", input_size=16, num_classes=4)
    first = checkpoint.digest(net.state_dict())
    assert checkpoint.digest(net.state_dict()) == first
    with torch.no_grad():
        net.final_layer.linear.bias[0] += 1e-6
    assert checkpoint.digest(net.state_dict()) != first


def test_averages_that_are_still_initial_are_called_out(capsys):
    net = torch.nn.Linear(1, 1)
    slow, fast, warm = Ema(net, 0.9999, warmup=False), Ema(net, 0.9996, warmup=False), Ema(net, 0.9999)
    assert slow.initial_share(6000) == pytest.approx(0.9999**6000) and fast.initial_share(6000) == pytest.approx(0.9996**6000)
    assert warm.initial_share(100) == 0 and warm.initial_share(0) == 1
    with torch.no_grad():
        net.weight.fill_(1.0)
        for ema in (slow, warm):
            ema.average["weight"].fill_(0.0)
            for n in range(10):
                ema.update(list(net.parameters()), n)
            assert ema.average["weight"].item() == pytest.approx(1 - ema.initial_share(10), abs=1e-4)
    state = SimpleNamespace(emas=[slow, fast], step=6000)
    call_out_initial(state, "1")
    assert capsys.readouterr().out == "warning: EMA 1 is 55% initial weights at step 6,000; use --eval_ema raw\n"
    state.step = 0  # a published file, which does not say
    call_out_initial(state, "1")
    assert capsys.readouterr().out == "" and "step" not in describe("1", 0, SamplerConfig(), 0)
    state.step = 12000
    call_out_initial(state, "1")
    assert "30% initial weights at step 12,000; use --eval_ema raw or 2" in capsys.readouterr().out
    for which in ("2", "raw"):
        call_out_initial(state, which)
    assert capsys.readouterr().out == ""


def test_evaluation_leaves_weights_optimizer_and_random_states_bit_identical(text_data, llm_folder, clip_folder, tiny_extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(extractors, "load_fidelity", lambda *_: tiny_extractor)
    snapshots = []

    def snapshot(state):
        parts = [state.net.state_dict(), *(ema.average for ema in state.emas), *state.optimizer.state.values()]
        tensors = [value.clone() for part in parts for value in part.values()] + [torch.get_rng_state()]
        return tensors, random.getstate(), repr(np.random.get_state())

    evaluator = Evaluator.__call__

    def watched(self, *args):
        snapshots.append(snapshot(self.state))
        record = evaluator(self, *args)
        snapshots.append(snapshot(self.state))
        return record

    monkeypatch.setattr(Evaluator, "__call__", watched)
    extra = ["--online_eval", "--eval_freq", 1, "--clip_model", clip_folder(), "--precision_recall", "--num_images", 16]
    run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 4, "--epochs", 2, *extra))
    assert len(snapshots) == 4
    for before, after in zip(snapshots[::2], snapshots[1::2]):
        assert len(before[0]) > 100 and all(torch.equal(a, b) for a, b in zip(before[0], after[0])) and before[1:] == after[1:]
    assert len(scalars(tmp_path / "out", "FID-16/16px_ema1_cfg2_0-1_heun2")) == 2
    for tag in ("train_loss", "lr", "grad_norm", "images_per_second", "text_gap/grad_norm"):
        assert scalars(tmp_path / "out", tag), tag


def test_networks_are_on_the_device_while_they_measure_and_in_host_memory_while_training(
    text_data, llm_folder, clip_folder, tiny_extractor, tmp_path, monkeypatch
):
    inception, clip, training, measuring = tiny_extractor.network.places, [], [], []
    load_clip, take_step = extractors.load_clip, engine_jit.take_step

    def watched(*args):
        found = load_clip(*args)
        found.network.to = lambda place: clip.append(place if place == "cpu" else "device")
        return found

    monkeypatch.setattr(extractors, "load_fidelity", lambda *_: tiny_extractor)
    monkeypatch.setattr(extractors, "load_clip", watched)
    monkeypatch.setattr(engine_jit, "take_step", lambda *args: training.append((inception[-1], *clip[-1:])) or take_step(*args))
    monkeypatch.setattr(type(tiny_extractor.network), "forward", lambda _, pictures: measuring.append(inception[-1]) or tiny_features(pictures))
    online = ["--online_eval", "--eval_freq", 1, "--num_images", 4, "--clip_model", clip_folder()]
    run(*flags(text_data, llm_folder(), tmp_path / "out", "--batch_size", 4, "--epochs", 2, *online))
    assert training == [("cpu",)] * 2 + [("cpu", "cpu")] * 2 and set(measuring) == {"cpu:0"}
    assert inception == ["cpu:0", "cpu"] * 3 and clip == ["device", "cpu"] * 2  # the statistics, then an evaluation an epoch


def test_the_decay_that_a_record_names_is_the_checkpoints(text_data, llm_folder, tiny_extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(extractors, "load_fidelity", lambda *_: tiny_extractor)
    out = tmp_path / "out"
    argv = flags(text_data, llm_folder(), out, "--batch_size", 4)
    run(*argv, "--epochs", "1", "--ema_decay2", "0.5", "--no_ema_warmup")
    records = {}
    for which in ("2", "raw"):
        run(*argv, "--resume", str(out), "--evaluate_gen", "--eval_ema", which)
        (path,) = (out / "eval").glob(f"*_{which if which == 'raw' else 'ema2'}_*.json")
        records[which] = json.loads(path.read_text())
    assert records["2"]["setting"]["weights"]["decay"] == 0.5 and records["raw"]["setting"]["weights"]["decay"] is None
    assert records["2"]["setting"]["weights"]["sha256"] != records["raw"]["setting"]["weights"]["sha256"]
