"""The frozen LLM: masked mean of its last states, whatever the padding, the batch or the kind of model."""

import copy
import unicodedata

import pytest
import torch
from conftest import CAPTIONS

from text_encoder import CaptionTable, FeatureNorm, TextEncoder, load_text_encoder, normalize
from util.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "clip"])
def test_features_are_the_masked_mean_and_padding_changes_nothing(kind, llm_folder):
    encoder = load_text_encoder(str(llm_folder(kind)), 40, CPU)
    together = encoder.encode(CAPTIONS)
    assert together.shape == (len(CAPTIONS), 32) and together.dtype == torch.float32
    for caption, features in zip(CAPTIONS, together):
        ids = encoder.tokenizer(normalize(caption))["input_ids"][:40]
        with torch.no_grad():
            alone = encoder.llm(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "clip"])
def test_empty_prompt_has_finite_features_alone_and_in_a_batch(kind, llm_folder):
    encoder = load_text_encoder(str(llm_folder(kind)), 40, CPU)
    assert encoder.null.shape == (1, 32) and encoder.null.isfinite().all()
    torch.testing.assert_close(encoder.encode(["", CAPTIONS[1]])[:1], encoder.null, rtol=1e-4, atol=1e-5)


def test_bos_is_in_front_and_padding_on_the_right_with_the_tokenizers_own_token(llm_folder):
    encoder = load_text_encoder(str(llm_folder()), 40, CPU)
    ids, mask = encoder.tokenize(["三", CAPTIONS[1]])
    assert (ids[:, 0] == encoder.tokenizer.bos_token_id).all()
    assert encoder.tokenizer.pad_token == "<PAD|LLM-jp>" and (ids[mask == 0] == 4).all()
    assert (mask.diff(dim=1) <= 0).all() and mask[0].sum() < mask[1].sum()


def test_a_tokenizer_that_pads_left_is_set_right(llm_folder):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llm_folder(), padding_side="left", truncation_side="left")
    encoder = TextEncoder(AutoModel.from_pretrained(llm_folder()), tokenizer, 40)
    torch.testing.assert_close(encoder.encode(CAPTIONS), load_text_encoder(str(llm_folder()), 40, CPU).encode(CAPTIONS), rtol=1e-4, atol=1e-5)


def test_kanji_reach_the_tokenizer_unharmed(llm_folder):
    encoder = load_text_encoder(str(llm_folder()), 200, CPU)
    for caption in [*CAPTIONS, "鯨と鱈と鰯、㍿ＡＢＣ〜波ダッシュ", "https://example.jp/猫?x=1 #タグ @名前"]:
        ids, _ = encoder.tokenize([caption])
        read = encoder.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert read == unicodedata.normalize("NFKC", caption)
        assert [c for c in read if "一" <= c <= "鿿"] == [c for c in unicodedata.normalize("NFKC", caption) if "一" <= c <= "鿿"]


def test_long_captions_are_cut_at_max_len(llm_folder):
    encoder = load_text_encoder(str(llm_folder()), 5, CPU)
    ids, mask = encoder.tokenize(["富士山" * 50])
    assert ids.shape == (1, 5) and mask.all()


def test_the_llm_is_frozen_and_no_module(llm_folder):
    encoder = load_text_encoder(str(llm_folder()), 40, CPU)
    before = copy.deepcopy(encoder.llm.state_dict())
    features = encoder.encode(CAPTIONS)
    assert not isinstance(encoder, torch.nn.Module) and not encoder.llm.training and not features.requires_grad
    assert not any(p.requires_grad for p in encoder.llm.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.llm.state_dict().items())


def test_each_distinct_caption_is_encoded_once(llm_folder):
    encoder = load_text_encoder(str(llm_folder()), 40, CPU)
    seen = []
    encode = encoder.encode
    encoder.encode = lambda captions: seen.extend(captions) or encode(captions)
    table = CaptionTable(encoder, CAPTIONS * 50)
    assert sorted(seen) == sorted(CAPTIONS)
    torch.testing.assert_close(table([CAPTIONS[3], CAPTIONS[0]]), encode(CAPTIONS)[[3, 0]], rtol=1e-4, atol=1e-5)
    assert torch.equal(table.null, encoder.null)


def test_standardized_features_have_mean_0_and_variance_1(llm_folder):
    table = CaptionTable(load_text_encoder(str(llm_folder()), 40, CPU), CAPTIONS)
    raw, raw_null = table(CAPTIONS), table.null.clone()
    norm = FeatureNorm.of(raw)
    table.standardize(norm)
    features = table(CAPTIONS)
    torch.testing.assert_close(features.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0, correction=0), torch.ones(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(table.null * norm.std + norm.mean, raw_null)
    single = CaptionTable(load_text_encoder(str(llm_folder()), 40, CPU), CAPTIONS[:1])
    single.standardize(FeatureNorm.of(single.features))
    assert torch.equal(single.features, torch.zeros(1, 32))  # no variance to divide by


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
            load_text_encoder(name, 40, CPU)
        assert "\n" not in str(error.value)


def test_characters_that_the_tokenizer_does_not_know_are_counted(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "赤": 3, "三": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]")
    llm = BertModel(BertConfig(vocab_size=5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    encoder = TextEncoder(llm, tokenizer, 40)
    encoder.encode(["赤三", "橙三", "紫", ""])
    assert encoder.unknown == 2


def test_more_tokens_than_the_model_reads_are_refused(llm_folder):
    with pytest.raises(UserError, match=r"--max_text_len 300 .* wanted 256 at most"):
        load_text_encoder(str(llm_folder()), 300, CPU)


def test_features_that_are_not_finite_name_their_caption(llm_folder):
    encoder = load_text_encoder(str(llm_folder()), 40, CPU)
    encoder.llm.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="赤い三"):
        encoder.encode(CAPTIONS)
