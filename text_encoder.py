"""Captions to features of a frozen language model: caption -> tokens -> hidden states of one depth -> their mean, or the states themselves.

The encoder is a plain object outside every module, so no `apply`, `train()`, DDP, optimizer, EMA or checkpoint reaches the LLM.
Right padding with real attention masks keeps a causal LM's states of the real tokens free of the padding, whatever its length.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from config import TextConfig
from util import hub
from util.errors import UserError
from util.parallel import has_bf16, to_device

PROBE = "猫が窓辺で眠っている写真。A cat, 2匹の犬と富士山。"  # its token ids are the tokenizer's fingerprint
A_BATCH = 64  # captions encoded together
MORE_ON_GPU = 8  # times as many, where they are short: a GPU waits for the CPU that starts its kernels
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of features of the same language model, made in the same way, pooled or not, as far as both say it."""
    both = [name for name in ("architecture", "layer", "tokenizer", "text_norm", "width") if name in one and name in other]
    return same_model(one, other) and all(one[name] == other[name] for name in both)


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether both name one language model: by its revision, or by that of the model that it was copied from (`named`).

    Where revisions cannot be compared (a release says none; a commit of the hub and the hash of a folder), the last part of the name decides.
    """
    pairs = list(product(*([said, hub.named_of(said)] for said in (one, other))))
    revisions = [(a.get("revision"), b.get("revision")) for a, b in pairs]
    compared = [a == b for a, b in revisions if a and b and hub.is_local(a) == hub.is_local(b)]
    return any(compared or [Path(a.get("llm", "")).name == Path(b.get("llm", "")).name for a, b in pairs])


def usual_dtype(device: torch.device) -> str:
    """What the LLM runs in where nothing else says it."""
    return "bf16" if has_bf16(device) else "fp32"


def normalize(caption: str) -> str:
    """Unicode NFKC and nothing else: the caption cleaners of English pipelines delete every kanji."""
    return unicodedata.normalize("NFKC", caption)


def rms_normalized(states: Tensor) -> Tensor:
    """Each token's state at length sqrt(width), so that no token (the first one's is often a hundred times longer) outweighs the others."""
    return F.rms_norm(states, states.shape[-1:], eps=1e-12)


def states_of_layer(hidden: Sequence[Tensor], last: Tensor, layer: str) -> Tensor:
    """One state a token, float32, from those of all layers.

    "last" has passed the model's own final norm and stays as it is. The others are normalised token by token: "-2" and "middle"
    are the next to last and the middle block's states, "mean" is the average over all blocks (arXiv:2506.08210: the last layer
    of a causal LLM is the weakest choice for pictures, the average of normalised layers the strongest).
    Args: hidden: embeddings and each block's output, (B, L, width); last: (B, L, width).  Returns: (B, L, width).
    """
    if layer == "last":
        return last.float()
    blocks = [*hidden[1:-1], last]
    if layer == "mean":
        return sum(rms_normalized(states.float()) for states in blocks) / len(blocks)
    return rms_normalized((hidden[-2] if layer == "-2" else blocks[max(len(blocks) // 2 - 1, 0)]).float())


def in_batches(lengths: Sequence[int], limit: int, fewest: int, most: int) -> Iterator[list[int]]:
    """Numbers of captions in batches of like length, the longest first, so that memory fails at once.

    Each is of `most` captions, or of as many as take the room of `fewest` of `limit` tokens, at which they are cut.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(fewest, min(most, fewest * limit // max(1, lengths[order[0]])))
        yield order[:count]
        order = order[count:]


class TextEncoder:
    """A frozen LLM and its tokenizer.  encode(captions) -> (B, width) float32 on its device: the mean over the tokens, BOS included."""

    def __init__(self, llm: torch.nn.Module, tokenizer, config: TextConfig, device: torch.device | str = "cpu"):
        if getattr(llm.config, "is_encoder_decoder", False):
            llm = llm.get_encoder()
        llm = getattr(llm, "text_model", llm)  # of CLIP and its kind
        self.llm = llm.to(device).eval().requires_grad_(False)
        self.llm.config.use_cache = False  # keys and values of texts that nobody continues
        self.tokenizer, self.config, self.device = tokenizer, config, torch.device(device)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        if tokenizer.pad_token_id is None:  # any token does, since padding is masked
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token or tokenizer.cls_token or tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise UserError(f"--llm_model_name {config.llm}: the tokenizer has no padding token and no other special token to pad with")
        ends = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id)  # GPT-2's kind has one token for these and for what is unknown
        self.unknown = None if tokenizer.unk_token_id in ends else tokenizer.unk_token_id
        self.null = self.encode([""]).cpu()  # (1, width): the null condition of guidance
        self.width = self.null.shape[1]
        self.parameters = sum(p.numel() for p in self.llm.parameters())

    def token_ids(self, captions: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Ids of each caption, special tokens included, cut at `max_length` (model_max_length of llm-jp is 1e30, no bound at all)."""
        if not captions:
            return []
        texts = [normalize(caption) for caption in captions]
        cut = {"truncation": True, "max_length": max_length} if max_length else {}
        return self.tokenizer(texts, return_token_type_ids=False, return_attention_mask=False, **cut)["input_ids"]

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, each (B, L) with L <= max_text_len; every row has at least one valid token."""
        rows = [torch.tensor(ids or [self._start_token()]) for ids in self.token_ids(captions, self.config.max_text_len)]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)

    def _start_token(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UserError(f"--llm_model_name {self.config.llm}: the tokenizer has no BOS, CLS or EOS token, so the empty caption has no features")

    @torch.inference_mode()
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) -> (B, L, width) float32 on the encoder's device."""
        layer = self.config.layer
        with torch.autocast(self.device.type, enabled=False):
            out = self.llm(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), output_hidden_states=layer != "last")
        return states_of_layer(out.hidden_states if layer != "last" else (), out.last_hidden_state, layer)

    @torch.inference_mode()
    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """Mean over valid tokens: (B, L, width), (B, L) -> (B, width)."""
        mask = mask.to(self.device)
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """(B, width) float32 on the encoder's device."""
        ids, mask = (to_device(tokens, self.device) for tokens in self.tokenize(captions))
        return self.pooled(self.states(ids, mask), mask)

    def encode_tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, L, width) float32 and mask (B, L) bool, on the encoder's device; L is the longest caption's."""
        ids, mask = (to_device(tokens, self.device) for tokens in self.tokenize(captions))
        return self.states(ids, mask), mask.bool()

    def encode_all(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Features as they are stored, on the CPU, a function of `captions` alone, to the bit on one kind of device.

        Returns: `features`, float16, pooled (N, width), or those of all valid tokens in a row, (tokens, width), with their
        `offsets` (N + 1,); `lengths` (N,), tokens before the cut; `unknown` (N,), whether a character is unknown to the tokenizer.
        Raises: UserError naming a caption whose features are not finite, or too large for float16.
        """
        lengths = torch.tensor([len(ids) for ids in self.token_ids(captions)], dtype=torch.long)
        most = A_BATCH * (MORE_ON_GPU if self.device.type == "cuda" else 1)
        rows: list[Tensor] = [torch.empty(0)] * len(captions)
        unknown = torch.zeros(len(captions), dtype=torch.bool)
        for chosen in in_batches(lengths.tolist(), self.config.max_text_len, A_BATCH, most):
            ids, mask = self.tokenize([captions[i] for i in chosen])
            if self.unknown is not None:
                unknown[chosen] = ((ids == self.unknown) & (mask == 1)).any(1)
            states = self.states(ids, mask)
            if self.config.pooling == "mean":
                states, mask = self.pooled(states, mask)[:, None], mask[:, :1]
            found = states.half().cpu()
            finite = (found.isfinite().all(-1) | (mask == 0)).all(1)
            if not finite.all():
                caption = captions[chosen[finite.int().argmin()]]
                raise UserError(f"--llm_model_name {self.config.llm}: features of the caption {caption!r} are not finite, or beyond float16's 65504")
            for i, row, count in zip(chosen, found, mask.sum(1).tolist()):
                rows[i] = row[:count]
        arrays = {"features": torch.cat([torch.empty(0, self.width, dtype=torch.float16), *rows]), "lengths": lengths, "unknown": unknown}
        if self.config.pooling == "tokens":
            arrays["offsets"] = torch.tensor([0, *map(len, rows)]).cumsum(0)
        return arrays


class LanguageModel:
    """A frozen LLM by name.  Its configuration and tokenizer are read and checked at once, its weights by `load`.

    Raises: UserError, in one line, where there is no such model or it cannot do what is asked.
    """

    def __init__(self, config: TextConfig):
        from transformers import AutoConfig, AutoTokenizer
        from transformers.models.auto.tokenization_auto import get_tokenizer_config

        hub.quiet()
        self.config, name = config, config.llm
        hub.check_name("--llm_model_name", name, "llm-jp/llm-jp-3-150m")
        with hub.in_one_line("--llm_model_name", name):
            self.architecture = AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
            self.tokenizer = AutoTokenizer.from_pretrained(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
            puts_bos = get_tokenizer_config(name, revision=config.revision).get("add_bos_token")
        longest = getattr(self.architecture.get_text_config(), "max_position_embeddings", None)
        if longest is not None:
            self.check_length(longest)
        self.probe = self.tokenizer(PROBE)["input_ids"]
        if puts_bos and self.tokenizer.bos_token_id is not None and self.probe[0] != self.tokenizer.bos_token_id:
            raise UserError(
                f"--llm_model_name {name}: its tokenizer_config.json says add_bos_token, but the text starts with token {self.probe[0]} instead of "
                f"{self.tokenizer.bos_token} ({self.tokenizer.bos_token_id}); in a copy of the folder, give tokenizer.json a post_processor that puts it there"
            )

    def check_length(self, longest: int) -> None:
        """Raises: UserError where more tokens are asked for."""
        if self.config.max_text_len > longest:
            raise UserError(f"--max_text_len {self.config.max_text_len} is more than {self.config.llm} can read; wanted {longest} at most")

    def describe(self) -> dict[str, str | int]:
        """What features depend on, as plain data for the store's manifest and the checkpoint."""
        config = self.config
        return {
            "llm": config.llm,
            "revision": hub.revision_of(config.llm, config.revision),
            "architecture": self.architecture.model_type,
            "max_text_len": config.max_text_len,
            "layer": config.layer,
            "pooling": config.pooling,
            "normalization": "NFKC",
            "dtype": config.dtype,
            "tokenizer": hashlib.sha256(repr(self.probe).encode()).hexdigest()[:16],
            "transformers": version("transformers"),
        }

    def load(self, device: torch.device) -> TextEncoder:
        """The encoder, its weights read.  Raises: UserError where they do not fill the model."""
        from transformers import AutoModel, AutoModelForTextEncoding
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

        config, architecture = self.config, self.architecture
        alone = getattr(architecture, "is_encoder_decoder", False) and architecture.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
        kind = AutoModelForTextEncoding if alone else AutoModel  # T5's kind come without their decoder
        options = {"is_encoder_decoder": False} if alone else {}  # T5Gemma's wants to be told
        options["dtype"] = DTYPES[usual_dtype(device) if config.dtype == "auto" else config.dtype]
        with hub.in_one_line("--llm_model_name", config.llm):
            llm, report = kind.from_pretrained(
                config.llm, revision=config.revision, output_loading_info=True, trust_remote_code=config.trust_remote_code, **options
            )
        missing = [key for key in report["missing_keys"] if "pooler" not in key]  # BERT's pooler is not used here
        if missing:
            raise UserError(f"--llm_model_name {config.llm}: {len(missing)} weights are missing from its files, first {missing[0]}")
        if (places := places_of(llm)) is not None:
            self.check_length(places)
        return TextEncoder(llm, self.tokenizer, config, device)


def places_of(llm: torch.nn.Module) -> int | None:
    """How many tokens a model of RoBERTa's kind can read: it counts places from behind the padding's.  None for the other kinds."""
    for name, module in llm.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    return None
