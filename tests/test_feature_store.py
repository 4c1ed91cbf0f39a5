"""The feature store on disk, and the conditions read from it: whole or not at all, the same bytes whatever happened, never stale."""

import json
import os
import pickle
import random
import resource
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, child, ended, in_ranks, load_encoder, write_text_data

import cache_text
import text_features
from conditioning import FeatureNorm
from config import TextConfig, TextSource
from flags import parse_cache
from text_encoder import LanguageModel, TextEncoder
from util import distributed as dist
from util import feature_store as disk
from util import files
from util.errors import UserError

CPU = torch.device("cpu")
MANY = [f"{caption} {i}" for i in range(6) for caption in CAPTIONS]  # 36 captions


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(disk, "SHARD_ROWS", 8)


def prepare(folder, llm, captions=MANY, prompts=("富士山",), cache="disk", norm="none", saved=None, lines=None, **config):
    lines = np.arange(len(captions)) if lines is None else lines
    source = TextSource(TextConfig(str(llm), **{"max_text_len": 40, "layer": "last", **config}), cache, str(folder) if cache == "disk" else None, norm)
    return text_features.prepare(source, text_features.Texts(captions, lines, prompts=list(prompts)), saved or {}, CPU)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_disk_memory_and_the_live_encoder_give_the_same_features(llm_folder, tmp_path):
    found = {cache: prepare(tmp_path / "store", llm_folder(), cache=cache) for cache in ("disk", "memory", "off")}
    lines = torch.tensor([3, 0, 35, 3])
    y = {cache: conditioning.y_of(lines) for cache, conditioning in found.items()}
    assert y["disk"].shape == (4, 32) and y["disk"].dtype == torch.float32 and torch.equal(y["disk"][0], y["disk"][3])
    assert torch.equal(y["disk"], y["memory"])
    torch.testing.assert_close(y["disk"], y["off"], rtol=1e-3, atol=1e-3)  # float16's rounding
    for name in ("null", "prompts"):
        a, b, c = (getattr(found[cache].y_of if name == "null" else found[cache], name) for cache in ("disk", "memory", "off"))
        assert torch.equal(a, b) and torch.allclose(a, c, rtol=1e-3, atol=1e-3), name
    encoder = LanguageModel(TextConfig(str(llm_folder()), 40, "last")).load(CPU)
    torch.testing.assert_close(found["disk"].y_of.null, encoder.null, rtol=1e-3, atol=1e-3)
    assert found["disk"].description == found["memory"].description == found["off"].description
    assert found["disk"].frozen == found["off"].frozen == encoder.parameters and found["disk"].width == 32


def test_captions_that_were_not_prepared_are_never_taken_for_others(llm_folder, tmp_path):
    conditions = prepare(tmp_path, llm_folder(), lines=np.array([1, 3])).y_of
    assert torch.equal(conditions(torch.tensor([3, 1]))[1], prepare(tmp_path, llm_folder()).y_of(torch.tensor([1]))[0])
    with pytest.raises(AssertionError, match="not prepared"):
        conditions(torch.tensor([1, 2]))


def test_each_distinct_caption_is_encoded_once_and_added_ones_alone(llm_folder, tmp_path, monkeypatch):
    seen = []
    encode_all = TextEncoder.encode_all
    monkeypatch.setattr(TextEncoder, "encode_all", lambda self, captions: seen.extend(captions) or encode_all(self, captions))
    prepare(tmp_path, llm_folder(), CAPTIONS * 50 + ["ハンカクとFULL"])  # the last one in NFKC is one of CAPTIONS
    assert len(seen) == len(set(seen)) == len(CAPTIONS) + 2  # the prompt and the empty caption
    before, seen[:] = contents(tmp_path), []
    y = prepare(tmp_path, llm_folder(), [*CAPTIONS, "新しい"], prompts=["富士山", "新しい指示"]).y_of(torch.tensor([6]))
    assert sorted(seen) == sorted(["新しい", "新しい指示"]) and before.items() <= contents(tmp_path).items()
    torch.testing.assert_close(y, LanguageModel(TextConfig(str(llm_folder()), 40, "last")).load(CPU).encode(["新しい"]), rtol=1e-3, atol=1e-3)


def test_with_a_complete_store_the_llm_is_not_loaded(llm_folder, tmp_path, monkeypatch, capsys):
    first = prepare(tmp_path, llm_folder(), norm="standardize")
    monkeypatch.setattr(LanguageModel, "load", lambda *args: pytest.fail("loaded"))
    again = prepare(tmp_path, llm_folder(), norm="standardize")
    assert "the LLM is not loaded" in capsys.readouterr().out
    lines = torch.arange(36)
    assert torch.equal(first.y_of(lines), again.y_of(lines)) and torch.equal(first.prompts, again.prompts)


def test_lengths_and_truncation_are_said_once_also_from_a_complete_store(llm_folder, tmp_path, capsys):
    for _ in range(2):
        prepare(tmp_path, llm_folder(), max_text_len=8)
        said = capsys.readouterr().out
        assert said.count("% are cut at --max_text_len 8\n") == said.count("warning: 83% of the captions are cut at --max_text_len 8; 22 would") == 1
    prepare(tmp_path, llm_folder(), max_text_len=8, lines=np.array([0]))  # a short one
    assert "warning" not in capsys.readouterr().out
    lengths = np.array([3, 8, 9, 16, 17, 40])
    assert (
        text_features.describe_lengths(lengths, 16)
        == "tokens a caption: 1-8 33.3%, 9-16 33.3%, 17-32 16.7%, 33-64 16.7%; longest 40; 33.33% are cut at --max_text_len 16"
    )


def test_every_field_of_the_manifest_protects(llm_folder, tmp_path):
    prepare(tmp_path, llm_folder())
    path = tmp_path / disk.MANIFEST
    manifest = json.loads(path.read_text())
    wanted = {"revision", "architecture", "max_text_len", "layer", "pooling", "normalization", "dtype", "tokenizer", "transformers"}
    fields = set(manifest) - {"llm", "stored", "width", "parameters"}  # those are no settings, or follow from them
    assert fields == wanted
    for field in fields:
        other = 39 if field == "max_text_len" else "bf16" if field == "dtype" else f"not {manifest[field]}"
        path.write_text(json.dumps(manifest | {field: other}))
        with pytest.raises(UserError) as error:
            prepare(tmp_path, llm_folder(), **({"dtype": "fp32"} if field == "dtype" else {}))
        message = str(error.value)
        assert f"made with {field} {other!r}" in message and repr(manifest[field]) in message and "\n" not in message
        assert "name another folder (delete this one to encode" in message and str(tmp_path) in message
        flag = {"max_text_len": "--max_text_len 39", "layer": f"--llm_layer {other}", "dtype": "--llm_dtype bf16"}.get(field)
        assert (f"give {flag}, or name" in message) if flag else "give" not in message
    path.write_text(json.dumps(manifest | {"llm": "its folder had another name"}))
    prepare(tmp_path, llm_folder())
    path.write_text(json.dumps(manifest | {"width": 33}))
    with pytest.raises(UserError, match="other settings"):  # its shards are of another manifest
        prepare(tmp_path, llm_folder())
    with pytest.raises(UserError, match="made with llm 'a/b'.*--llm_model_name a/b"):
        disk.check_manifest(tmp_path, {"llm": "a/b", "revision": "c"}, {"llm": "d/e", "revision": "c"})
    for content in ("", "{", "[]", "\x00"):
        path.write_text(content)
        with pytest.raises(UserError, match="--text_cache_dir"):
            prepare(tmp_path, llm_folder())


def test_the_type_of_the_llm_is_the_stores_unless_asked_otherwise(llm_folder, tmp_path):
    prepare(tmp_path, llm_folder(), dtype="bf16")
    assert prepare(tmp_path, llm_folder()).description["dtype"] == "bf16"
    with pytest.raises(UserError, match="--llm_dtype bf16"):
        prepare(tmp_path, llm_folder(), dtype="fp32")
    assert prepare(tmp_path, llm_folder(), cache="memory").description["dtype"] == "fp32"
    assert prepare(tmp_path, llm_folder(), cache="memory", saved={"dtype": "bf16"}).description["dtype"] == "bf16"


@pytest.mark.parametrize("moment", ["write", "fsync", "replace", "replaced"])
@pytest.mark.parametrize("shard", [0, 2])
def test_killed_at_any_moment_and_started_again_the_bytes_are_the_same(moment, shard, llm_folder, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepare(whole, llm_folder())
    assert len(contents(whole)) == 1 + 5  # 38 texts, 8 a shard

    def killed():
        """Dies in writing the manifest (the first file) or a shard; never by an exception that could be caught."""
        calls = []
        name = {"write": "fsync", "replaced": "replace"}.get(moment, moment)
        real = getattr(os, name)

        def deadly(*args):
            calls.append(1)
            if name == "replace" or args[0] > 2:  # each file has one replace and two fsyncs, its own and its folder's
                due = len(calls) > (shard if name == "replace" else 2 * shard)
                if due and moment == "write":
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                if due and moment == "replaced":
                    real(*args)
                if due:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(os, name, deadly)
        prepare(parts, llm_folder())

    assert ended(child(killed)) == -signal.SIGKILL
    left = contents(parts)
    shards = {name: content for name, content in left.items() if name.endswith(".safetensors")}
    assert len(shards) < 5 and shards.items() <= contents(whole).items()  # what is there is whole
    monkeypatch.setattr(files, "STALE", -1)  # as if ten minutes had passed
    prepare(parts, llm_folder())
    assert contents(parts) == contents(whole)


def test_killed_again_and_again_at_random_moments_it_comes_to_the_same_end(llm_folder, tmp_path, monkeypatch):
    whole, parts, kills = tmp_path / "whole", tmp_path / "parts", 0
    prepare(tmp_path / "first", llm_folder())  # with all that is imported at the first time
    start = time.perf_counter()
    prepare(whole, llm_folder())
    patience = time.perf_counter() - start
    for _ in range(8):
        pid = child(lambda: prepare(parts, llm_folder()))
        time.sleep(random.random() * patience)
        os.kill(pid, signal.SIGKILL)
        kills += ended(pid) == -signal.SIGKILL
    prepare(parts, llm_folder())
    assert kills and {name: content for name, content in contents(parts).items() if not name.endswith(".tmp")} == contents(whole)


def test_two_jobs_on_one_store_share_the_work_and_do_each_other_no_harm(llm_folder, tmp_path):
    prepare(tmp_path / "alone", llm_folder())
    pids = [child(lambda: prepare(tmp_path / "shared", llm_folder())) for _ in range(3)]
    assert [ended(pid) for pid in pids] == [0, 0, 0]
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_a_disk_that_is_full_is_an_error_and_leaves_nothing_half_valid(llm_folder, tmp_path, capfd, monkeypatch):
    def on_a_small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))  # the manifest fits, a shard does not
        prepare(tmp_path / "store", llm_folder())

    assert ended(child(on_a_small_disk)) == 1
    printed = capfd.readouterr().out
    assert "--text_cache_dir" in printed and "cannot be written to: File too large" in printed and "Make room, or name another folder" in printed
    assert [path.name for path in (tmp_path / "store").iterdir()] == [disk.MANIFEST]
    prepare(tmp_path / "store", llm_folder())  # with room again
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"features of 38 captions take 0.0 MB \(89 bytes each\), and 0.0 MB are free"):  # said before the first is encoded
        prepare(tmp_path / "other", llm_folder())


def test_a_folder_that_cannot_be_made_is_one_line_before_the_llm_is_loaded(llm_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModel, "load", lambda *args: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--text_cache_dir .*file/store cannot be written to"):
        prepare(tmp_path / "file" / "store", llm_folder())


def test_a_damaged_or_hostile_shard_is_named_and_never_run(llm_folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "went off"),))

    store = tmp_path / "store"
    prepare(store, llm_folder())
    path = next(store.glob("*.safetensors"))
    good = path.read_bytes()
    for bad in (good[:-1], good[:100], b"", b"\xff" * len(good), pickle.dumps(Bomb())):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=f"{path.name} is damaged .* delete it, and its captions are encoded anew"):
            prepare(store, llm_folder())
    assert not (tmp_path / "went off").exists()
    path.unlink()
    prepare(store, llm_folder())
    assert path.read_bytes() == good


def test_a_shard_of_other_settings_is_refused(llm_folder, tmp_path):
    prepare(tmp_path / "a", llm_folder())
    prepare(tmp_path / "b", llm_folder(), layer="mean")
    shard = next((tmp_path / "a").glob("*.safetensors"))
    (tmp_path / "b" / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match=f"{shard.name} was made with other settings"):
        prepare(tmp_path / "b", llm_folder(), layer="mean")


def test_half_written_files_of_dead_jobs_go_and_those_of_living_ones_stay(tmp_path):
    old, new = tmp_path / ".a.safetensors.host.1.tmp", tmp_path / ".b.safetensors.host.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 3600,) * 2)
    files.remove_stale(tmp_path)
    assert not old.exists() and new.exists()


def test_rows_are_found_by_key_and_travel_to_other_processes_by_name(llm_folder, tmp_path):
    prepare(tmp_path, llm_folder())
    store = disk.FeatureStore(tmp_path, disk.shard_names(tmp_path))
    keys = disk.keys_of(text_features.normalize(caption) for caption in MANY)
    rows = store.find(keys)
    assert sorted(rows.tolist()) == sorted(set(rows.tolist())) and store.find(disk.keys_of(["nowhere"])).tolist() == [-1]
    assert disk.first_of_each(np.concatenate([keys[3:5], keys])).tolist() == [0, 1, 2, 3, 4, *range(7, 38)]
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 1000 and torch.equal(copy(rows), store(rows))
    assert (disk.FeatureRows([]).find(keys) == -1).all()


def test_a_store_of_more_shards_than_may_be_open_reads_the_same(llm_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "SHARD_ROWS", 4)
    prepare(tmp_path, llm_folder())
    keys = disk.keys_of(text_features.normalize(caption) for caption in MANY)
    all_open = disk.FeatureStore(tmp_path, disk.shard_names(tmp_path))
    monkeypatch.setattr(disk, "MOST_OPEN", 2)
    few_open = disk.FeatureStore(tmp_path, disk.shard_names(tmp_path))
    rows = few_open.find(keys)[np.random.default_rng(0).permutation(len(keys))]
    assert torch.equal(few_open(rows), all_open(rows)) and np.array_equal(few_open.lengths(rows), all_open.lengths(rows))
    assert len(few_open.names) > 8 and few_open.shards.opened.cache_info().currsize == 2


def test_token_features_are_stored_without_padding(llm_folder, tmp_path):
    text_features.build_store(TextConfig(str(llm_folder()), 40, "last", pooling="tokens", dtype="fp32"), tmp_path, MANY, [], CPU)
    store = disk.FeatureStore(tmp_path, disk.shard_names(tmp_path))
    rows = store.find(disk.keys_of(text_features.normalize(caption) for caption in MANY))
    states, lengths = store.tokens(rows)
    encoder = LanguageModel(TextConfig(str(llm_folder()), 40, "last")).load(CPU)
    assert (
        lengths.tolist() == store.lengths(rows).tolist() and sum(len(shard["features"]) for shard in store.shards) == store.lengths(np.arange(len(store))).sum()
    )
    means = torch.stack([part.float().mean(0) for part in states.split(lengths.tolist())])
    torch.testing.assert_close(means, encoder.encode(MANY), rtol=2e-3, atol=2e-3)
    with pytest.raises(UserError, match="made with pooling 'tokens', but this run needs 'mean'"):
        prepare(tmp_path, llm_folder())


def test_standardized_features_have_mean_0_and_variance_1_over_the_training_captions(llm_folder, tmp_path):
    raw, conditioning = (prepare(tmp_path, llm_folder(), norm=norm) for norm in ("none", "standardize"))
    features = conditioning.y_of(torch.arange(36))
    torch.testing.assert_close(features.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0, correction=0), torch.ones(32), atol=1e-3, rtol=0)
    mean, std = conditioning.description["mean"], conditioning.description["std"]
    torch.testing.assert_close(conditioning.y_of.null * std + mean, raw.y_of.null, rtol=1e-4, atol=1e-5)
    saved = conditioning.description
    resumed = prepare(tmp_path, llm_folder(), [*MANY, "増えた"], norm="standardize", saved=saved)  # the checkpoint's statistics, not new ones
    assert torch.equal(resumed.y_of(torch.arange(36)), features) and torch.equal(resumed.description["mean"], mean)
    single = FeatureNorm.of([torch.ones(1, 32)], 32)
    assert torch.equal(single(torch.ones(1, 32)), torch.zeros(1, 32))  # no variance to divide by
    torch.manual_seed(0)
    rows = torch.randn(100, 3) * 2 + 1000
    norm = FeatureNorm.of(rows.split(7), 3)
    torch.testing.assert_close(norm.std, rows.double().std(0, correction=0, keepdim=True).float(), rtol=1e-5, atol=0)


def tokens_of(conditioning, lines, width=32):
    """Mask (B, L), and the states where there are tokens, (tokens, width)."""
    text = conditioning.y_of(torch.as_tensor(lines)).to(CPU)
    assert text.mask.shape == (len(lines), 40) and text.states.shape == (len(lines), 40, width) and text.states.dtype == torch.float32
    return text.mask, text.states[text.mask]


@pytest.mark.parametrize("norm", ["none", "rms", "standardize"])
def test_disk_memory_and_the_live_encoder_give_the_same_tokens(norm, llm_folder, tmp_path):
    found = {cache: prepare(tmp_path / "store", llm_folder(), cache=cache, norm=norm, pooling="tokens") for cache in ("disk", "memory", "off")}
    (mask, disk_states), (_, memory), (live_mask, live) = (tokens_of(conditioning, [3, 0, 35, 3]) for conditioning in found.values())
    assert torch.equal(disk_states, memory) and torch.equal(mask, live_mask) and torch.equal(mask[0], mask[3]) and len(set(mask.sum(1).tolist())) == 3
    scale = 2 * max(1.0, disk_states.abs().max().item()) * 2**-10  # float16's rounding, of the stored and of the normalised states
    assert (disk_states - live).abs().max() < scale and disk_states.std() > 0.1
    raw, valid = load_encoder(llm_folder()).encode_tokens([MANY[i] for i in (3, 0, 35, 3)])
    made = found["off"].description
    wanted = {"none": lambda: raw, "rms": lambda: raw / raw.square().mean(-1, keepdim=True).sqrt(), "standardize": lambda: (raw - made["mean"]) / made["std"]}
    torch.testing.assert_close(live, wanted[norm]()[valid], rtol=1e-4, atol=1e-4)
    prompts = [conditioning.prompts.to(CPU) for conditioning in found.values()]
    for conditioning, text in zip(found.values(), prompts):
        null = conditioning.y_of.null
        assert (
            not null.mask.any() and null.states.shape == (1, 40, 32) and torch.equal(text.states, prompts[0].states) and torch.equal(text.mask, prompts[0].mask)
        )
        assert conditioning.width == 32 and conditioning.frozen == found["disk"].frozen and conditioning.description["pooling"] == "tokens"


def test_standardized_tokens_have_mean_0_and_variance_1_over_those_of_the_training_captions(llm_folder, tmp_path):
    def with_norm(norm, captions=MANY, **more):
        return prepare(tmp_path, llm_folder(), captions, norm=norm, pooling="tokens", **more)

    conditioning = with_norm("standardize")
    mask, states = tokens_of(conditioning, range(36))
    assert len(states) == mask.sum() > 5 * 36
    torch.testing.assert_close(states.mean(0), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(states.std(0, correction=0), torch.ones(32), atol=2e-3, rtol=0)
    saved, raw = conditioning.description, tokens_of(with_norm("none"), range(36))[1]
    torch.testing.assert_close(saved["mean"][0], raw.mean(0), rtol=1e-4, atol=1e-4)
    some = tokens_of(with_norm("standardize", lines=np.arange(6)), range(6))[1]  # only lines 0 to 5 are trained on
    torch.testing.assert_close(some.mean(0), torch.zeros(32), atol=1e-3, rtol=0)

    longer = [*MANY, "増えた" * 5]
    resumed, anew = with_norm("standardize", longer, saved=saved), with_norm("standardize", longer)
    assert torch.equal(tokens_of(resumed, range(36))[1], states) and torch.equal(resumed.description["mean"], saved["mean"])
    assert not torch.equal(anew.description["mean"], saved["mean"]) and not torch.equal(tokens_of(anew, range(36))[1], states)


@pytest.mark.parametrize("captions", [MANY, MANY[:3]])  # of the few, one rank has all and the other none
@pytest.mark.parametrize("pooling", ["mean", "tokens"])
def test_two_ranks_hold_in_memory_what_one_process_holds(pooling, captions, llm_folder, tmp_path):
    llm = llm_folder()  # here, or both processes would make their own

    def held():
        raw, standardized = (prepare(None, llm, captions, cache="memory", norm=norm, pooling=pooling) for norm in ("none", "standardize"))
        parts = [*(raw.y_of(torch.tensor([line])) for line in range(len(captions))), raw.prompts]
        rows = parts if pooling == "mean" else [tensor for part in parts for tensor in (part.states, part.lengths)]
        return rows, standardized.description["mean"]

    in_ranks(2, lambda: torch.save(held(), tmp_path / f"{dist.rank()}.pt"))
    rows, mean = held()
    for rank in range(2):
        theirs, their_mean = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(rows, theirs, strict=True))
        torch.testing.assert_close(their_mean, mean, rtol=1e-5, atol=1e-6)  # summed up in another order


def test_features_of_another_making_than_the_checkpoints_are_refused():
    made = {"llm": "a/b", "revision": "sha256:1", "layer": "last", "dtype": "fp32", "tokenizer": "t", "transformers": "5.0"}
    text_features.check_saved({}, made)
    text_features.check_saved(made | {"llm": "moved", "transformers": "5.1"}, made)
    text_features.check_saved(made | {"revision": "0123"}, made)  # a hub's commit and a folder's hash cannot be compared
    for field in ("revision", "layer", "dtype", "tokenizer"):
        other = "sha256:2" if field == "revision" else "other"
        with pytest.raises(UserError, match=f"made with {field} {other}, this run's with {made[field]}"):
            text_features.check_saved(made | {field: other}, made)


def test_two_ranks_build_the_store_that_one_process_builds(llm_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(disk, "SHARD_ROWS", 1024)
    data = write_text_data(tmp_path / "data", 8)
    (data / "captions" / "0.txt").write_text("\n".join(f"{i} 番目の猫" for i in range(3000)), encoding="utf-8")
    flags = ["--data_path", str(data), "--llm_model_name", str(llm_folder()), "--device", "cpu"]

    def build(store):
        cache_text.build(parse_cache([*flags, "--text_cache_dir", str(store)]))

    in_ranks(2, lambda: build(tmp_path / "two"))
    assert "complete, 3017 texts" in capfd.readouterr().out
    build(tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(contents(tmp_path / "one")) == 1 + 3
