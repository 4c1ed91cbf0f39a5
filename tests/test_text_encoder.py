"""The frozen LLM: features of one depth, whatever the padding, the batch or the kind of model, and what it refuses to load."""

import copy
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from contextlib import nullcontext

import pytest
import torch
from conftest import CAPTIONS, ROOT, byte_tokenizer, load_encoder

import text_encoder
from config import LAYERS, TextConfig
from demo.tiny_llm import SPECIAL, train_tokenizer
from text_encoder import LanguageModel, TextEncoder, alike, normalize
from util.errors import UserError

KINDS = ("llama", "gpt2", "bert", "clip")


def rms(states):
    return states / states.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_mean_of_the_layers_states_and_padding_changes_nothing(kind, layer, llm_folder):
    encoder = load_encoder(llm_folder(kind), layer=layer)
    together = encoder.encode(CAPTIONS)
    assert together.shape == (len(CAPTIONS), 32) and together.dtype == torch.float32
    for caption, features in zip(CAPTIONS, together):
        ids = encoder.tokenizer(normalize(caption))["input_ids"][:40]
        with torch.no_grad():
            out = encoder.llm(torch.tensor([ids]), output_hidden_states=True)
        _, first, last = [*out.hidden_states[:2], out.last_hidden_state]  # the models have two layers
        wanted = {"last": last, "-2": rms(first), "middle": rms(first), "mean": (rms(first) + rms(last)) / 2}[layer]
        torch.testing.assert_close(features, wanted[0].mean(0), rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("layer", LAYERS)
def test_the_layers_of_a_deeper_model(layer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2)).model
    encoder = TextEncoder(llm, byte_tokenizer(), TextConfig("deep", layer=layer))
    ids, _ = encoder.tokenize(CAPTIONS[:1])
    with torch.no_grad():
        blocks = llm(ids, output_hidden_states=True).hidden_states[1:]
    assert len(blocks) == 5
    wanted = {"last": blocks[4], "-2": rms(blocks[3]), "middle": rms(blocks[1]), "mean": sum(map(rms, blocks)) / 5}[layer]
    torch.testing.assert_close(encoder.encode(CAPTIONS[:1]), wanted.mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("bf16", 3e-2)])
def test_alone_in_a_batch_and_at_any_pad_length_the_features_are_the_same(kind, dtype, tolerance, llm_folder):
    """float32: to 1e-5 of their length; bf16, whose products are rounded to 1 in 256: to 3e-2."""
    encoder = load_encoder(llm_folder(kind), dtype=dtype)
    alone = torch.cat([encoder.encode([caption]) for caption in CAPTIONS])
    ids, mask = encoder.tokenize(CAPTIONS)
    wide = [torch.nn.functional.pad(tensor, (0, 30), value=value) for tensor, value in ((ids, encoder.tokenizer.pad_token_id), (mask, 0))]
    other = [torch.where(wide[1] == 1, wide[0], 7), wide[1]]  # another pad token
    for features in (encoder.encode(CAPTIONS), *(encoder.pooled(encoder.states(*padded), padded[1]) for padded in (wide, other))):
        assert ((features - alone).norm(dim=1) / alone.norm(dim=1)).max() < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_empty_prompt_has_finite_features_alone_and_in_a_batch(kind, llm_folder):
    encoder = load_encoder(llm_folder(kind))
    assert encoder.null.shape == (1, 32) and encoder.null.isfinite().all()
    torch.testing.assert_close(encoder.encode(["", CAPTIONS[1]])[:1], encoder.null, rtol=1e-4, atol=1e-5)


def test_bos_is_in_front_and_padding_on_the_right_with_the_tokenizers_own_token(llm_folder):
    encoder = load_encoder(llm_folder())
    ids, mask = encoder.tokenize(["三", CAPTIONS[1]])
    assert (ids[:, 0] == encoder.tokenizer.bos_token_id).all()
    assert encoder.tokenizer.pad_token == "<PAD|LLM-jp>" and (ids[mask == 0] == 4).all()
    assert (mask.diff(dim=1) <= 0).all() and mask[0].sum() < mask[1].sum()


def test_a_tokenizer_that_pads_left_is_set_right(llm_folder):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llm_folder(), padding_side="left", truncation_side="left")
    encoder = TextEncoder(AutoModel.from_pretrained(llm_folder()), tokenizer, TextConfig("left", 40, "last"))
    torch.testing.assert_close(encoder.encode(CAPTIONS), load_encoder(llm_folder()).encode(CAPTIONS), rtol=1e-4, atol=1e-5)


def test_kanji_reach_the_tokenizer_unharmed(llm_folder):
    encoder = load_encoder(llm_folder(), max_text_len=200)
    for caption in [*CAPTIONS, "鯨と鱈と鰯、㍿ＡＢＣ〜波ダッシュ", "https://example.jp/猫?x=1 #タグ @名前"]:
        ids, _ = encoder.tokenize([caption])
        read = encoder.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert read == unicodedata.normalize("NFKC", caption)
        assert [c for c in read if "一" <= c <= "鿿"] == [c for c in unicodedata.normalize("NFKC", caption) if "一" <= c <= "鿿"]


def test_the_tokenizer_made_here_is_the_same_in_every_process_and_keeps_to_its_sizes():
    code = f"from demo.tiny_llm import train_tokenizer; print(train_tokenizer({CAPTIONS * 2}, 100, 2).backend_tokenizer.to_str())"
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}
    other = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env | {"PYTHONHASHSEED": "1"}, encoding="utf-8")
    assert other == train_tokenizer(CAPTIONS[::-1], 100, 2).backend_tokenizer.to_str() + "\n"

    for texts, vocab_size, longest in ((CAPTIONS, 100, 2), (CAPTIONS, 30, 16), (["赤い三<s><0x41>", "赤い五<s><0x41>"], 40, 2)):
        tokenizer = train_tokenizer(texts, vocab_size, longest)
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        pieces = [piece for piece, _ in model["vocab"]]
        assert model["type"] == "Unigram" and model["byte_fallback"]
        assert pieces[:8] == SPECIAL and pieces[8:264] == [f"<0x{byte:02X}>" for byte in range(256)]
        assert len(set(pieces)) == len(pieces) <= vocab_size + 256 and max(map(len, pieces[264:])) <= longest
        for text in (*CAPTIONS, "鯨と鱈"):
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == 1 and 0 not in ids


def test_long_captions_are_cut_at_max_len(llm_folder):
    encoder = load_encoder(llm_folder(), max_text_len=5)
    ids, mask = encoder.tokenize(["富士山" * 50])
    assert ids.shape == (1, 5) and mask.all()


def test_the_llm_is_frozen_and_no_module(llm_folder):
    encoder = load_encoder(llm_folder())
    before = copy.deepcopy(encoder.llm.state_dict())
    features = encoder.encode(CAPTIONS)
    assert not isinstance(encoder, torch.nn.Module) and not encoder.llm.training and not features.requires_grad
    assert not any(p.requires_grad for p in encoder.llm.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.llm.state_dict().items())


def test_what_cannot_be_loaded_is_one_line_with_the_flag(tmp_path, llm_folder):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in llm_folder().iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    save_file({f"wrong.{name}": value for name, value in weights.items()}, broken / "model.safetensors", {"format": "pt"})
    (tmp_path / "empty").mkdir()
    for name in ("./no-such-folder", "no-such-name", str(tmp_path / "empty"), "llm-jp/llm-jp-3-typo", str(broken)):
        with pytest.raises(UserError, match="--llm_model_name") as error:
            load_encoder(name)
        assert "\n" not in str(error.value)


def test_characters_that_the_tokenizer_does_not_know_are_counted(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "赤": 3, "三": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]")
    llm = BertModel(BertConfig(vocab_size=5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    encoder = TextEncoder(llm, tokenizer, TextConfig("words"))
    assert encoder.encode_all(["赤三", "橙三", "紫", ""])["unknown"].tolist() == [False, True, True, False]


def test_a_token_that_begins_every_text_is_no_unknown_character(llm_folder):
    encoder = load_encoder(llm_folder("gpt2"))
    encoder.tokenizer.unk_token = encoder.tokenizer.bos_token  # as GPT-2's, GPT-NeoX's and OPT's
    again = TextEncoder(encoder.llm, encoder.tokenizer, encoder.config)
    assert again.tokenizer.unk_token_id == again.tokenizer.bos_token_id and not again.encode_all(["", "<EOD>赤"])["unknown"].any()


def test_t5gemma_comes_without_its_decoder(tmp_path):
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    tokenizer = train_tokenizer(CAPTIONS, vocab_size=120)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    whole = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=size, decoder=size, vocab_size=len(tokenizer))).eval()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    ids, mask = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        wanted = whole.model.encoder(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder.states(ids, mask), wanted)
    assert not any("decoder" in name for name, _ in encoder.llm.named_parameters())


def test_a_model_of_robertas_kind_reads_fewer_tokens_than_it_has_places(tmp_path):
    """It counts them from behind the padding's place."""
    from transformers import RobertaConfig, RobertaModel

    tokenizer = train_tokenizer(CAPTIONS, vocab_size=120)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaModel(RobertaConfig(**size, max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id)).save_pretrained(tmp_path)
    longest = 32 - tokenizer.pad_token_id - 1
    tokenizer.save_pretrained(tmp_path)
    assert load_encoder(tmp_path, max_text_len=longest).encode(["富士山" * 50]).isfinite().all()
    with pytest.raises(UserError, match=rf"--max_text_len {longest + 1} is more than .* wanted {longest} at most"):
        load_encoder(tmp_path, max_text_len=longest + 1)


def test_more_tokens_than_the_model_reads_are_refused(llm_folder):
    with pytest.raises(UserError, match=r"--max_text_len 300 .* wanted 256 at most"):
        load_encoder(llm_folder(), max_text_len=300)


def test_features_that_are_not_finite_or_too_large_name_their_caption(llm_folder):
    for largest, fits in ((float("nan"), False), (65_000, True), (66_000, False)):  # float16 ends at 65,504
        encoder = load_encoder(llm_folder(), layer="last")
        encoder.llm.norm.weight.data *= largest / encoder.encode(CAPTIONS[:1]).abs().max()  # a feature is its channel's weight times the rest
        with nullcontext() if fits else pytest.raises(UserError, match="caption '赤い三'"):
            encoder.encode_all(CAPTIONS[:1])


def test_what_is_stored_are_the_features_in_float16_with_lengths_before_the_cut(llm_folder, monkeypatch):
    encoder = load_encoder(llm_folder(), max_text_len=6)
    monkeypatch.setattr(text_encoder, "A_BATCH", 4)
    arrays = encoder.encode_all(CAPTIONS)
    torch.testing.assert_close(arrays["features"].float(), encoder.encode(CAPTIONS), rtol=1e-3, atol=1e-3)
    lengths = [len(encoder.tokenizer(normalize(caption))["input_ids"]) for caption in CAPTIONS]
    assert arrays["features"].dtype == torch.float16 and arrays["lengths"].tolist() == lengths and max(lengths) > 6 > min(lengths)


def test_batches_hold_more_captions_the_shorter_they_are_and_never_more_tokens_than_the_longest_would():
    lengths = [3, 900, 12, *[40] * 200, 77, 5, *[9] * 1000, 0]
    for most in (64, 512):
        batches = list(text_encoder.in_batches(lengths, 77, 64, most))
        assert sorted(sum(batches, [])) == list(range(len(lengths))) and batches[0][0] == 1
        assert all(len(batch) * min(77, lengths[batch[0]]) <= 64 * 77 and len(batch) <= most for batch in batches)
        assert [len(batch) for batch in batches][:-1] == ([64] * 18 if most == 64 else [64, 123, 123, 512])
        ordered = [lengths[i] for i in sum(batches, [])]
        assert ordered == sorted(lengths, reverse=True)


def test_token_features_are_those_of_the_valid_tokens_and_their_mean_is_the_pooled_one(llm_folder):
    pooled, tokens = (load_encoder(llm_folder(), max_text_len=6, layer="mean", pooling=pooling).encode_all(CAPTIONS) for pooling in ("mean", "tokens"))
    offsets = tokens["offsets"].tolist()
    assert offsets[-1] == len(tokens["features"]) == tokens["lengths"].clamp_max(6).sum()
    for i, features in enumerate(pooled["features"]):
        torch.testing.assert_close(tokens["features"][offsets[i] : offsets[i + 1]].float().mean(0), features.float(), rtol=2e-3, atol=2e-3)


def edited(folder, target, name, **values):
    """A copy of a model folder with values of one of its JSON files changed."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text()) | values
    (target / name).write_text(json.dumps(content))
    return target


def test_a_tokenizer_that_is_meant_to_put_a_bos_and_does_not_is_refused(llm_folder, tmp_path):
    says = edited(llm_folder(), tmp_path / "says", "tokenizer_config.json", add_bos_token=True)
    assert load_encoder(says).tokenize(["三"])[0][0, 0] == 1
    lacks = edited(says, tmp_path / "lacks", "tokenizer.json", post_processor=None)
    with pytest.raises(UserError, match=r"says add_bos_token, but .* instead of <s> \(1\)"):
        load_encoder(lacks)
    load_encoder(edited(lacks, tmp_path / "honest", "tokenizer_config.json", add_bos_token=False))


GENERATIONS = {  # the special tokens of llm-jp's tokenizers
    "v1": {"bos_token": "<s|LLM-jp>", "eos_token": "<EOD|LLM-jp>", "pad_token": "<pad|LLM-jp>", "unk_token": "<unk|LLM-jp>"},
    "v3": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD|LLM-jp>", "unk_token": "<unk>"},
    "v4": {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
    "no pad": {"bos_token": "<s>", "eos_token": "</s>"},
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_padding_is_the_tokenizers_own_token_by_generation(generation):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    special = GENERATIONS[generation]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*special.values(), "赤", "三"])}, unk_token=special.get("unk_token", "赤")))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    assert tokenizer.model_max_length > 1e29  # no bound, as in llm-jp
    llm = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    encoder = TextEncoder(llm, tokenizer, TextConfig(generation, max_text_len=3))
    ids, mask = encoder.tokenize(["赤", "赤三赤三", ""])
    pad = tokenizer.convert_tokens_to_ids(special.get("pad_token", "<s>"))
    assert ids.shape == (3, 3) and mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0]] and (ids[mask == 0] == pad).all()
    assert ids[2, 0] == tokenizer.bos_token_id and encoder.encode(["赤", ""]).isfinite().all()


def test_a_folder_is_known_by_its_content_and_a_hub_model_by_its_commit(llm_folder, tmp_path):
    moved = shutil.copytree(llm_folder(), tmp_path / "moved")
    a, b = (LanguageModel(TextConfig(str(folder))).describe() for folder in (llm_folder(), moved))
    assert a["revision"] == b["revision"] and a["revision"].startswith("sha256:") and a["tokenizer"] == b["tokenizer"]
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert LanguageModel(TextConfig(str(moved))).describe()["revision"] != a["revision"]

    repository, commit = os.path.join(os.environ["HF_HOME"], "hub", "models--llm-jp--tiny"), "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(llm_folder(), os.path.join(repository, "snapshots", commit))
    os.makedirs(os.path.join(repository, "refs"))
    with open(os.path.join(repository, "refs", "main"), "w") as file:
        file.write(commit)
    hub = LanguageModel(TextConfig("llm-jp/tiny", layer="last"))
    assert hub.describe()["revision"] == commit and hub.describe()["llm"] == "llm-jp/tiny"
    assert torch.equal(hub.load(torch.device("cpu")).null, load_encoder(llm_folder(), max_text_len=77).null)


@pytest.mark.parametrize(
    "more, same",
    [
        ({}, True),
        ({"revision": "def"}, False),
        ({"layer": "last"}, False),
        ({"revision": "sha256:0", "llm": "/models/b"}, True),  # a copy of the model
        ({"revision": "sha256:0", "llm": "/models/b-instruct"}, False),
        ({"revision": "sha256:0", "llm": "/models/b", "width": 16}, False),
        ({"revision": ""}, True),
        ({"revision": "", "llm": "b/c"}, False),
        ({"revision": "sha256:0", "llm": "/x/text_encoder", "named": {"llm": "a/b", "revision": "abc"}}, True),  # a copy that went along with a model
        ({"revision": "sha256:0", "llm": "/x/text_encoder", "named": {"llm": "a/b", "revision": "def"}}, False),
        ({"revision": "sha256:0", "llm": "/x/text_encoder", "named": {"llm": "b", "revision": "sha256:0"}}, True),
        ({"revision": "sha256:0", "llm": "/x/text_encoder", "named": {"llm": "a/c", "revision": ""}}, False),
    ],
)
def test_features_are_compared_by_what_both_sides_say(more, same):
    one = {"llm": "a/b", "revision": "abc", "architecture": "llama", "layer": "mean", "tokenizer": "t", "text_norm": "rms", "width": 8}
    assert alike(one, one | more) == same == alike(one | more, one)
    release = {"llm": "a/b", "revision": "", "layer": "mean", "text_norm": "rms", "width": 8}  # MiniT2I's says no more
    assert alike(release, one) and not alike(release | {"llm": "b/c"}, one)
    copy = release | {"revision": "sha256:0", "llm": "/x/text_encoder", "named": {"llm": "a/b", "revision": ""}}
    folder = {"revision": "sha256:1", "llm": "/models/b"}  # of the same name, and another model
    assert alike(copy, one) and alike(copy, copy) and not alike(copy, one | folder) and alike(copy, folder | {"revision": "sha256:0", "llm": "/models/c"})
