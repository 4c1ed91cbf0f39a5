"""Prepared data: shards, their index, the order of blocks, and who makes them."""

import errno
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, child, ended, load_encoder, open_text, write_text_data
from PIL import Image
from test_training import assert_same_training, flags, run, weights

import prepare_data
from benchmarks.ray_nodes import hashes as sha_of_shards
from datasets import pieces
from datasets.prepared import FACTS, INDEX, PreparedPictures
from datasets.shards import ShardWriter, shard_name
from datasets.source import hold_out
from datasets.stream import BlockShuffle, StreamSampler, View
from flags import parse_prepare
from text_encoder import LanguageModel
from util.errors import UserError
from util.feature_store import FeatureStore


def prepare(data: Path, out: Path, *more) -> Path:
    prepare_data.prepare(parse_prepare(["--data_path", str(data), "--out", str(out), "--img_size", "16", "--num_workers", "0", *map(str, more)]))
    return out


def hashes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.tar"))}


@pytest.fixture
def large_data(tmp_path):
    """Eleven pictures that are cropped; two of them are the same file."""
    data = write_text_data(tmp_path / "large", count=11, size=16)
    rng = np.random.default_rng(1)
    for i, path in enumerate(sorted((data / "images").iterdir())):
        Image.fromarray(rng.integers(0, 256, (24 + i, 40, 3), dtype=np.uint8)).save(path)
    shutil.copy(data / "images" / "0.png", data / "images" / "5.png")
    return data


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_a_shard_holds_the_squares_that_training_would_cut(large_data, tmp_path, image_format):
    made, plain = (
        PreparedPictures(prepare(large_data, tmp_path / "out", "--shard_pictures", 4, "--image_format", image_format), View(16)),
        open_text(large_data),
    )
    assert len(made) == len(plain) == 11 and [*made.captions] == [*plain.captions] and made.first.tolist() == plain.first.tolist()
    for i in range(11):
        off = (made.picture(i).float() - plain.picture(i).float()).abs()
        assert off.max() == 0 if image_format != "jpeg" else 0 < off.mean() < 8
    assert len({made.paths[i] for i in range(11)}) == 11 and made.paths[5].endswith(f"shard-000001.tar, byte {made.read.places[5]['offset']}")
    with tarfile.open(tmp_path / "out" / shard_name(2)) as tar:
        assert [name.split(".")[0] for name in tar.getnames()] == ["00000000", "00000000", "00000001", "00000001", "00000002", "00000002"]
        assert tar.extractfile("00000000.txt").read().decode() == plain.captions[plain.first[8]]


def test_prepared_data_are_tar_shards_for_others_too(large_data, tmp_path):
    out = prepare(large_data, tmp_path / "out", "--shard_pictures", 4, "--image_format", "png")
    (tmp_path / "tars").mkdir()
    for path in out.glob("*.tar"):
        shutil.copy(path, tmp_path / "tars")
    others, ours = open_text(tmp_path / "tars"), open_text(out)
    assert type(ours) is PreparedPictures and [*others.captions] == [*ours.captions]
    assert all(torch.equal(others.picture(i), ours.picture(i)) for i in range(11))


def test_what_is_broken_too_small_or_there_twice_is_left_out(large_data, tmp_path):
    (large_data / "images" / "3.png").write_bytes(b"no picture")
    out = prepare(large_data, tmp_path / "kept", "--shard_pictures", 4, "--min_size", 25)
    facts = json.loads((out / INDEX / FACTS).read_text())
    assert (facts["pictures"], facts["left_out"], facts["duplicates"]) == (8, 3, 0)  # 0 and its twin 5 are 24 high
    out = prepare(large_data, tmp_path / "dropped", "--shard_pictures", 4, "--duplicates", "drop")
    facts = json.loads((out / INDEX / FACTS).read_text())
    assert (facts["pictures"], facts["captions"], facts["left_out"], facts["duplicates"]) == (9, 9, 1, 1)
    plain, made = open_text(large_data), PreparedPictures(out, View(16))
    kept = [i for i in range(11) if Path(plain.paths[i]).name not in ("3.png", "5.png")]
    assert [*made.captions] == [plain.captions[plain.first[i]] for i in kept]


def test_what_is_broken_is_listed_or_ends_the_run(large_data, tmp_path, capsys):
    (large_data / "images" / "3.png").write_bytes(b"no picture")
    out = prepare(large_data, tmp_path / "skip", "--shard_pictures", 4)
    assert re.search(r"\nwarning: 1 of 11 samples cannot be used and are left out; .*bad_images.txt lists them, the first is .*3.png", capsys.readouterr().out)
    assert "3.png: cannot identify" in (out / "bad_images.txt").read_text()
    with pytest.raises(UserError, match=r"broken picture .*3.png: cannot identify.*; to skip broken pictures give --bad_images skip"):
        prepare(large_data, tmp_path / "error", "--bad_images", "error")
    assert sorted(path.name for path in (tmp_path / "error").iterdir()) == []


@pytest.mark.parametrize("error, said", [(OSError(errno.EIO, "Input/output error"), "Input/output error"), (MemoryError(), "no memory left")])
def test_a_disk_that_fails_says_nothing_of_a_picture(error, said, large_data, tmp_path, monkeypatch):
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) if path.name != "3.png" else (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=f"3.png cannot be read now .*{said}.*; run the command again: finished work is kept"):
        prepare(large_data, tmp_path / "out", "--shard_pictures", 3)
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == [shard_name(0)]
    monkeypatch.undo()
    assert len(PreparedPictures(prepare(large_data, tmp_path / "out", "--shard_pictures", 3), View(16))) == 11


def test_where_no_picture_is_left_the_error_says_why(large_data, llm_folder, tmp_path):
    (large_data / "images" / "3.png").write_bytes(b"no picture")
    for more in ([], ["--llm_model_name", llm_folder()]):
        out = tmp_path / f"out{len(more)}"
        with pytest.raises(UserError) as error:
            prepare(large_data, out, "--shard_pictures", 4, "--min_size", 99, *more)
        assert f"--out {out}: no picture is left; 1 cannot be used (bad_images.txt there lists them), 10 are smaller than --min_size 99." in str(error.value)
        assert not (out / INDEX).exists() and "3.png" in (out / "bad_images.txt").read_text()


def test_what_is_broken_is_told_in_the_same_words_by_whoever_makes_or_reads_a_shard(large_data, tmp_path):
    (large_data / "images" / "3.png").write_bytes(b"no picture")
    out = prepare(large_data, tmp_path / "out")
    assert (out / "bad_images.txt").read_text().endswith("3.png: cannot identify image file (shard-000000.tar)\n")
    data = open_text(out)
    place = data.read.places[2]
    with open(out / shard_name(0), "r+b") as file:
        file.seek(place["offset"])
        file.write(bytes(place["size"]))
    assert data.readable(2)[2] == [f"{data.paths[2]}: UnidentifiedImageError: cannot identify image file"]


def test_shards_within_their_own_source_are_refused_before_anything_is_made(large_data, tmp_path):
    (tmp_path / "link").symlink_to(large_data)
    for out in (large_data, large_data / "shards", tmp_path / "link" / "a" / "b"):
        with pytest.raises(UserError, match=r"--out .* lies in --data_path .*; name a folder outside of it"):
            prepare(large_data, out)
    assert sorted(path.name for path in large_data.iterdir()) == ["captions", "images"]


def test_shards_without_their_index_are_no_data_and_prepared_data_no_source(large_data, tmp_path):
    out = prepare(large_data, tmp_path / "out", "--shard_pictures", 4)
    for more in ([], ["--data_format", "shards"]):
        with pytest.raises(UserError, match="--data_path .*out is prepared already; give the data that it was made of"):
            prepare(out, tmp_path / "again", *more)
    shutil.rmtree(out / INDEX)
    (out / shard_name(1)).unlink()
    for opened in (lambda: open_text(out), lambda: open_text(out / shard_name(0)), lambda: prepare(out, tmp_path / "again")):
        with pytest.raises(
            UserError,
            match=r"shard-000000.tar was made by prepare_data.py; give its folder as --data_path, and if that has no index/ yet, run the prepare_data.py command again first",
        ):
            opened()
    assert len(open_text(prepare(large_data, out, "--shard_pictures", 4))) == 11


def test_samples_of_a_tar_that_cannot_be_used_count_as_broken(large_data, tmp_path):
    png = prepare(large_data, tmp_path / "png", "--image_format", "png")
    (tmp_path / "tars").mkdir()
    whole = (png / shard_name(0)).read_bytes()
    (tmp_path / "tars" / "a.tar").write_bytes(whole[: len(whole) // 2])  # the last sample is cut
    with pytest.raises(UserError, match="broken picture .*a.tar"):
        prepare(tmp_path / "tars", tmp_path / "error", "--bad_images", "error")
    facts = json.loads((prepare(tmp_path / "tars", tmp_path / "out") / INDEX / FACTS).read_text())
    assert facts["left_out"] == 1 and facts["pictures"] > 2


def test_rows_of_a_table_that_cannot_be_used_are_counted_once(large_data, tmp_path):
    rows = [{"image": f"images/{i}.png", "text": f"赤い{i}"} for i in range(11)] * 20 + [{"image": "images/none.png", "text": "赤い"}]
    (large_data / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = prepare(large_data / "rows.jsonl", tmp_path / "out", "--shard_pictures", 80)
    facts = json.loads((out / INDEX / FACTS).read_text())
    assert (facts["pictures"], facts["left_out"], len(facts["shards"])) == (220, 1, 3) and len((out / "bad_images.txt").read_text().splitlines()) == 1


def test_shards_that_another_command_made_meanwhile_are_compared_too(large_data, tmp_path, monkeypatch):
    def also(job, *rest, make=prepare_data.by_processes):
        prepare(large_data, tmp_path / "out", "--shard_pictures", 4, "--img_size", 8)
        return make(job, *rest)

    monkeypatch.setitem(prepare_data.ENGINES, "ray", also)
    with pytest.raises(UserError, match=r"was made with .*'img_size': 8.* and this is .*'img_size': 16"):
        prepare(large_data, tmp_path / "out", "--shard_pictures", 4, "--engine", "ray")


def test_shards_that_were_made_of_other_data_are_refused(large_data, tmp_path):
    out = prepare(large_data, tmp_path / "out", "--shard_pictures", 4)
    other = shutil.copytree(large_data, tmp_path / "other")
    assert hashes(prepare(other, out, "--shard_pictures", 4)) == hashes(out)  # the same data elsewhere
    with pytest.raises(UserError, match=r"shard-000000.tar was made of other data \(4 rows from 0 on, \w+; --data_path .*; name another --out"):
        prepare(large_data, out, "--shard_pictures", 5)
    shutil.copy(other / "images" / "1.png", other / "images" / "00.png")
    (other / "captions" / "00.txt").write_text("赤い1", encoding="utf-8")
    with pytest.raises(UserError, match="was made of other data"):
        prepare(other, out, "--shard_pictures", 4)
    tars = tmp_path / "tars"
    tars.mkdir()
    shutil.copy(out / shard_name(1), tars / "b.tar")
    made = prepare(tars, tmp_path / "of_tars")
    shutil.copy(out / shard_name(0), tars / "a.tar")  # takes the number that b.tar had
    with pytest.raises(UserError, match=r"was made of other data \(b.tar, [\d,]+ bytes; .* has a.tar"):
        prepare(tars, made)


def test_whoever_makes_a_shard_makes_the_same_bytes_and_none_is_made_again(large_data, tmp_path, monkeypatch):
    one = hashes(prepare(large_data, tmp_path / "one", "--shard_pictures", 3))
    assert hashes(prepare(large_data, tmp_path / "two", "--shard_pictures", 3, "--num_workers", 2)) == one and len(one) == 4
    for task in range(3):  # of a Slurm array; the last one finds everything there
        for name, value in {"TASK_ID": 5 + task, "TASK_MIN": 5, "TASK_COUNT": 3}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_{name}", str(value))
        prepare(large_data, tmp_path / "array", "--shard_pictures", 3)
        assert (tmp_path / "array" / INDEX).exists() == (task == 2)
    assert hashes(tmp_path / "array") == one
    for task, last in ((5, 9), (9, 9)):  # --array=5,6,9: the tasks of some that failed
        for name, value in {"TASK_ID": task, "TASK_MAX": last}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_{name}", str(value))
        with pytest.raises(UserError, match=r"not evenly spaced, so shards would be missing; submit the whole array again \(--array=0-2\)"):
            prepare(large_data, tmp_path / "gaps", "--shard_pictures", 3)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    (tmp_path / "one" / shard_name(1)).unlink()
    monkeypatch.setattr(pieces, "prepare_shard", lambda out, number, *rest, make=pieces.prepare_shard: number == 1 and make(out, number, *rest))
    assert hashes(prepare(large_data, tmp_path / "one", "--shard_pictures", 3)) == one


def test_tar_shards_become_as_many(large_data, tmp_path):
    png = prepare(large_data, tmp_path / "png", "--shard_pictures", 4, "--image_format", "png")
    (tmp_path / "tars").mkdir()
    for path in png.glob("*.tar"):
        shutil.copy(path, tmp_path / "tars")
    again = prepare(tmp_path / "tars", tmp_path / "again", "--image_format", "png")
    assert hashes(again) == hashes(png)


def test_what_cannot_be_used_is_told_in_one_line(large_data, tmp_path):
    out = prepare(large_data, tmp_path / "out", "--shard_pictures", 4)
    with pytest.raises(UserError, match=r"was made with .*'img_size': 16.* and this is .*'img_size': 32"):
        prepare(large_data, out, "--shard_pictures", 4, "--img_size", 32)
    with pytest.raises(UserError, match="was prepared at 16 pixels, and --img_size is 32; prepare it again at that size"):
        open_text(out, size=32)
    with pytest.raises(UserError, match="its index cannot be read"):
        open_text(large_data, format="shards")
    with pytest.raises(UserError, match="--data_path .* is not there"):
        prepare(tmp_path / "nowhere", tmp_path / "x")
    with pytest.raises(UserError, match="--caption_column x has no effect on .*, which is read as shards; give it to prepare_data.py"):
        open_text(out, caption_column="x")
    (out / INDEX / "places").write_bytes(b"")
    with pytest.raises(UserError, match="its index cannot be read"):
        open_text(out)
    (out / shard_name(0)).with_suffix(".safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="shard-000000.safetensors cannot be read .*; remove it and shard-000000.tar, and prepare them again"):
        prepare(large_data, out, "--shard_pictures", 4)


def test_a_shard_is_whole_or_not_there(large_data, tmp_path, monkeypatch):
    from datasets import shards

    monkeypatch.setattr(shards.ShardWriter, "facts", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cannot be written .*No space left"):
        prepare(large_data, tmp_path / "out")
    assert not [*(tmp_path / "out").glob("shard-*.tar")]
    monkeypatch.undo()
    half = tmp_path / "out" / ".shard-000000.tar.part.host.1.tmp"  # of a process that was killed
    half.write_bytes(b"half")
    os.utime(half, (time.time() - 3600,) * 2)
    prepare(large_data, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", INDEX, "shard-000000.safetensors", "shard-000000.tar"]


def two_cores() -> None:
    os.sched_getaffinity = lambda _: range(2)


def test_a_process_that_dies_ends_the_preparation_in_one_line(large_data, tmp_path, capfd):
    def work():
        signal.alarm(30)  # or it would wait for ever
        two_cores()
        ShardWriter.square = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        prepare(large_data, tmp_path / "out", "--shard_pictures", 4, "--num_workers", 2)

    assert ended(child(work)) == 1
    assert "a process died; if memory ran out, lower --num_workers" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_that_make_shards_end_at_once_with_the_one_that_they_work_for(number, large_data, tmp_path):
    reading, writing = os.pipe()

    def work():
        two_cores()
        ShardWriter.square = lambda *_: os.write(writing, b"x") and time.sleep(60)
        prepare(large_data, tmp_path / "out", "--shard_pictures", 4, "--num_workers", 2)

    pid = child(work)
    os.close(writing)
    assert os.read(reading, 1) + os.read(reading, 1) == b"xx"  # both are at work
    os.kill(pid, number)
    assert ended(pid) == (70 if number == signal.SIGINT else -number)
    assert select.select([reading], [], [], 20)[0] and os.read(reading, 1) == b""  # nobody is left who could write
    os.close(reading)


def test_a_run_trains_on_prepared_pictures_and_resumes_in_the_middle(text_data, llm_folder, tmp_path, monkeypatch):
    from test_survival import StopAfter

    out = prepare(text_data, tmp_path / "shards", "--shard_pictures", 3, "--image_format", "png")
    monkeypatch.setattr(BlockShuffle, "BLOCK", 2)
    monkeypatch.setattr(BlockShuffle, "WINDOW", 2)
    common = ["--batch_size", 2, "--epochs", 2, "--text_cache", "off"]
    run(*flags(out, llm_folder(), tmp_path / "whole", *common))
    with monkeypatch.context() as patch:
        StopAfter(patch, 3)
        run(*flags(out, llm_folder(), tmp_path / "parts", *common))
    run(*flags(out, llm_folder(), tmp_path / "parts", *common, "--resume", tmp_path / "parts"))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert a["step"] == b["step"] == 8 and all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())


# --- captions' features beside the pictures


@pytest.fixture
def told_data(large_data):
    """Pictures with one to three captions, some the same."""
    for i, path in enumerate(sorted((large_data / "captions").iterdir())):
        path.write_text("\n".join(f"{i % 4} 番の写真、{'とても' * k}赤い" for k in range(1 + i % 3)), encoding="utf-8")
    return large_data


def test_features_lie_beside_their_pictures_in_the_order_of_the_captions(told_data, llm_folder, tmp_path):
    llm = llm_folder()
    encoder = load_encoder(llm, layer="mean")
    for name, more in (("all", []), ("distinct", ["--duplicates", "drop"])):
        dataset = open_text(prepare(told_data, tmp_path / name, "--llm_model_name", llm, "--shard_pictures", 4, *more))
        beside, captions = dataset.beside, [*dataset.captions]
        features, rows = FeatureStore(beside.folder, beside.names, beside.counts), beside[np.arange(len(captions))]
        assert len(captions) == len(beside) == (21 if name == "all" else 20) and beside.size == 21 and len(beside.names) == 3
        torch.testing.assert_close(features(rows), torch.cat([encoder.encode([caption]) for caption in captions]), atol=2e-3, rtol=2e-3)
        assert features.lengths(rows).tolist() == [len(ids) for ids in encoder.token_ids(captions)]
        torch.testing.assert_close(beside.statistics["mean"][0], features(rows).mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(beside.statistics["std"][0], features(rows).std(0, correction=0), atol=1e-5, rtol=1e-4)


def test_a_shard_that_is_made_again_gets_its_features_again(told_data, llm_folder, tmp_path):
    llm, picture = llm_folder(), told_data / "images" / "1.png"
    good = picture.read_bytes()
    picture.write_bytes(b"no picture")
    out = prepare(told_data, tmp_path / "out", "--shard_pictures", 6, "--llm_model_name", llm)
    picture.write_bytes(good)
    (out / shard_name(0)).unlink()
    dataset = open_text(prepare(told_data, out, "--shard_pictures", 6, "--llm_model_name", llm))
    features, captions = FeatureStore(dataset.beside.folder, dataset.beside.names), [*dataset.captions]
    wanted = load_encoder(llm, layer="mean").encode(captions)
    torch.testing.assert_close(features(dataset.beside[np.arange(len(captions))]), wanted, atol=2e-3, rtol=2e-3)


def test_features_of_other_captions_are_not_taken_for_a_shards_own(large_data, llm_folder, tmp_path):
    more = ["--shard_pictures", 4, "--llm_model_name", llm_folder()]
    out = prepare(large_data, tmp_path / "out", *more)
    one, other = (out / "text_cache" / shard_name(number).replace(".tar", ".safetensors") for number in range(2))
    shutil.copy(other, one)  # as many
    with pytest.raises(UserError, match=r"shard-000000.safetensors does not hold the features of the captions in shard-000000.tar; delete it"):
        prepare(large_data, out, *more)
    one.unlink()
    assert len(open_text(prepare(large_data, out, *more)).beside) == 11


def test_features_are_added_to_shards_that_are_there_and_made_once(told_data, llm_folder, tmp_path, monkeypatch):
    out, llm = prepare(told_data, tmp_path / "out", "--shard_pictures", 4), llm_folder()
    before = hashes(out)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "square", None)  # no picture is read again
        prepare(told_data, out, "--shard_pictures", 4, "--llm_model_name", llm)
    stored = {path.name: path.read_bytes() for path in (out / "text_cache").iterdir()}
    assert hashes(out) == before and len(stored) == 3 + 1 + 1  # shards, prompts, manifest
    for task in range(2):  # of a Slurm array
        for name, value in {"TASK_ID": task, "TASK_COUNT": 2}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_{name}", str(value))
        prepare(told_data, tmp_path / "array", "--shard_pictures", 4, "--llm_model_name", llm, "--num_workers", 2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "array" / "text_cache").iterdir()} == stored
    monkeypatch.setattr(LanguageModel, "load", None)  # the language model is not read again
    prepare(told_data, out, "--shard_pictures", 4, "--llm_model_name", llm)
    with pytest.raises(
        UserError,
        match="--out .*text_cache: its features were made with layer 'mean', but this run needs 'last'; give --llm_layer mean, or name another folder",
    ):
        prepare(told_data, out, "--shard_pictures", 4, "--llm_model_name", llm, "--llm_layer", "last")
    with pytest.raises(UserError, match="--max_text_len/llm_layer has no effect without --llm_model_name"):
        prepare(told_data, out, "--max_text_len", 5, "--llm_layer", "last")
    with pytest.raises(UserError, match="--llm_model_name"):
        prepare(told_data, tmp_path / "none", "--llm_model_name", tmp_path / "nowhere")
    assert not (tmp_path / "none" / shard_name(0)).exists()


def test_a_run_reads_features_beside_its_pictures_without_the_language_model(told_data, llm_folder, tmp_path, monkeypatch):
    llm = llm_folder()
    out = prepare(told_data, tmp_path / "shards", "--shard_pictures", 4, "--image_format", "png", "--llm_model_name", llm)
    asked = tmp_path / "asked.txt"
    asked.write_text("だれも見たことのない写真\n", encoding="utf-8")
    common = ["--batch_size", 2, "--epochs", 2, "--text_norm", "rms"]
    run(*flags(out, llm, tmp_path / "looked_up", *common, "--text_cache_dir", tmp_path / "store"))
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "load", None)
        run(*flags(out, llm, tmp_path / "beside", *common))
        run(*flags(out, llm, tmp_path / "standardized", *common[:-2]))
    assert_same_training(weights(tmp_path / "looked_up"), weights(tmp_path / "beside"), exact=False)
    noted = open_text(out).beside.statistics
    assert torch.equal(weights(tmp_path / "standardized")["text"]["mean"], noted["mean"])
    drawn = ["--evaluate_gen", "--resume", str(tmp_path / "standardized"), "--num_images", "4", "--inception_weights", "none", "--save_images"]
    for captions in ([], ["--eval_captions", str(asked)]):
        run("--data_path", str(out), *drawn, *captions)


def test_every_picture_is_shown_once_an_epoch_in_blocks(monkeypatch):
    monkeypatch.setattr(BlockShuffle, "BLOCK", 8)
    monkeypatch.setattr(BlockShuffle, "WINDOW", 4)
    for size in (5, 8, 64, 203):
        held_out = torch.tensor([3, 100, 57, 4])[: size // 50]
        order = BlockShuffle(size, held_out, seed=3)
        trained = len(order)
        sampler = StreamSampler(order, 1, range(3 * trained), 0, 1)
        shown = [index for index, _ in sampler]
        for epoch in range(3):
            assert sorted(shown[epoch * trained : (epoch + 1) * trained]) == sorted(set(range(size)) - set(held_out.tolist()))
        if size == 203:
            assert len({tuple(shown[epoch * trained : (epoch + 1) * trained]) for epoch in range(3)}) == 3
            window = shown[:32]
            blocks = {(index - int((held_out < index).sum())) // 8 for index in window}
            assert len(blocks) == 4 and window != sorted(window)  # four blocks, among each other
    ranks = [[index for index, _ in StreamSampler(BlockShuffle(203, held_out, 3), 5, range(10), rank, 2)] for rank in range(2)]
    assert [index for batch in range(10) for rank in range(2) for index in ranks[rank][batch * 5 : batch * 5 + 5]] == shown[:100]


def test_what_is_held_out_of_blocks_is_never_trained_on():
    class Many:
        in_blocks = True

        def __len__(self):
            return 1_000_000

    order, held_out = hold_out(Many(), 64, seed=0)
    assert len(held_out) == len(set(held_out.tolist())) == 64 and len(order) == 1_000_000 - 64 and held_out.max() < 1_000_000
    assert torch.equal(held_out, hold_out(Many(), 64, seed=0)[1]) and not torch.equal(held_out, hold_out(Many(), 64, seed=1)[1])
    first = order.some(0, 0, 65536)
    assert len(set(first)) == len(first) == 65536 and not set(first) & set(held_out.tolist())


@pytest.mark.slow
def test_ray_makes_the_same_shards(told_data, llm_folder, tmp_path):
    for engine in ("processes", "ray"):
        prepare(told_data, tmp_path / engine, "--shard_pictures", 4, "--llm_model_name", llm_folder(), "--engine", engine)
    one, other = (sha_of_shards(tmp_path / engine) for engine in ("processes", "ray"))
    assert len(one) == 10 and one == other  # pictures, and the features beside them


@pytest.mark.long
def test_a_ray_cluster_that_loses_a_node_makes_the_same_shards(told_data, llm_folder, tmp_path):
    line = ["--data_path", str(told_data), "--out", str(tmp_path / "out"), "--img_size", "16", "--shard_pictures", "1", "--llm_model_name", str(llm_folder())]
    done = subprocess.run([sys.executable, "-m", "benchmarks.ray_nodes", *line], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + "".join(path.read_text()[-2000:] for path in (tmp_path / "out").glob("*.txt"))
    assert "shards: 11, with features: 11; the same to the byte: True" in done.stdout
