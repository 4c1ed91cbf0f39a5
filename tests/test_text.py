"""The states of captions' tokens: packed as they travel, padded as networks read them, dropped like any other y."""

import pytest
import torch
from test_models import Devices
from torch.nn.utils.rnn import pad_sequence

from conditioning import drop_conditions, expand_null
from util.text import PackedText, Text

CPU = torch.device("cpu")


def captions_of(*lengths, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(length, 5).half() for length in lengths]


def pack(captions, padded_to=6):
    lengths = torch.tensor([len(states) for states in captions], dtype=torch.long)
    return PackedText(torch.cat([torch.empty(0, 5, dtype=torch.float16), *captions]), lengths, padded_to)


def assert_same(found, wanted):
    assert torch.equal(found.mask, wanted.mask) and torch.equal(found.states, wanted.states)


@pytest.mark.parametrize("lengths", [(3, 1, 6, 2), (6, 6), (1,), (0, 3, 0, 2, 0), (3, 0), (0, 3)])
def test_packed_text_is_padded_exactly(lengths):
    captions = captions_of(*lengths)
    text = pack(captions).to(CPU)
    padded = pad_sequence([*captions, torch.empty(6, 5)], batch_first=True)[:-1]  # the last one for the length
    assert torch.equal(text.states, padded.float()) and text.states.dtype == torch.float32
    assert torch.equal(text.mask, torch.arange(6) < torch.tensor(lengths)[:, None]) and text.device == CPU and len(text) == len(lengths)


def test_captions_without_a_token_are_the_null_and_no_captions_are_none():
    assert_same(pack(captions_of(0, 0)).to(CPU), Text.null(6, 5).expand(2))
    nothing = pack([]).to(CPU)
    assert len(nothing) == 0 and nothing.states.shape == (0, 6, 5) and nothing.mask.shape == (0, 6)


def test_padding_is_the_same_whatever_else_the_batch_holds():
    captions = captions_of(3, 1, 6)
    together = pack(captions).to(CPU)
    for i, states in enumerate(captions):
        assert_same(pack([states]).to(CPU), together[i : i + 1])


def test_all_of_the_padding_is_made_on_the_device():
    packed = pack(captions_of(3, 0, 2))
    with Devices() as devices:
        packed.to("meta")
    assert devices.found == {"meta"}


@pytest.mark.parametrize("rows", [[2, 0, 2], [1], [], slice(1, 3), slice(None, None, 2), slice(3, 3), slice(-2, None)])
def test_rows_are_chosen_alike_before_and_after_padding(rows):
    packed = pack(captions_of(3, 0, 6, 2))
    chosen = packed[rows]
    assert_same(chosen.to(CPU), packed.to(CPU)[rows])
    assert len(chosen) == len(chosen.lengths) and len(chosen.states) == chosen.lengths.sum() and chosen.states.dtype == torch.float16


def test_without_is_the_null_in_place_of_rows_and_one_null_becomes_many():
    text = pack(captions_of(3, 1, 6)).to(CPU)
    kept = text.without(torch.tensor([False, True, False]))
    assert torch.equal(kept.mask[[0, 2]], text.mask[[0, 2]]) and not kept.mask[1].any() and torch.equal(kept.states, text.states)
    null = Text.null(6, 5)
    assert len(null) == 1 and not null.mask.any() and not null.states.any() and null.mask.dtype == torch.bool
    assert_same(expand_null(null, 3), null[[0, 0, 0]])
    assert_same(text.to("cpu"), text)


def test_dropped_rows_are_the_null_whatever_y_is():
    dropped, y = torch.arange(20) % 3 == 0, pack(captions_of(*[4] * 20)).to(CPU)
    pooled = drop_conditions(torch.ones(20, 3), torch.zeros(1, 3), dropped)
    labels = drop_conditions(torch.ones(20, dtype=torch.long), torch.tensor([9]), dropped)
    tokens = drop_conditions(y, Text.null(6, 5), dropped)
    assert torch.equal((pooled == 0).all(1), dropped) and torch.equal((pooled == 1).all(1), ~dropped) and torch.equal(labels == 9, dropped)
    assert torch.equal(~tokens.mask.any(1), dropped) and torch.equal(tokens.mask[~dropped], y.mask[~dropped]) and torch.equal(tokens.states, y.states)
    assert not drop_conditions(y, Text.null(6, 5), torch.ones(20, dtype=torch.bool)).mask.any()
    assert_same(drop_conditions(y, Text.null(6, 5), torch.zeros(20, dtype=torch.bool)), y)
