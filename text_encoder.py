"""Captions to features of a frozen language model: caption -> tokens -> last hidden state -> masked mean.

The encoder is a plain object outside every module, so no `apply`, `train()`, DDP, optimizer, EMA or checkpoint reaches the LLM.
Right padding with real attention masks keeps a causal LM's states of the real tokens free of the padding, whatever its length.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from util import distributed as dist
from util.errors import UserError

PROBE = "猫が窓辺で眠っている写真。A cat, 2匹の犬と富士山。"  # its token ids are the tokenizer's fingerprint


def normalize(caption: str) -> str:
    """Unicode NFKC and nothing else: the caption cleaners of English pipelines delete every kanji."""
    return unicodedata.normalize("NFKC", caption)


class TextEncoder:
    """A frozen LLM and its tokenizer.

    encode(captions) -> (B, width) float32 on the CPU: the mean of the last hidden state over the tokens, BOS included.
    """

    def __init__(self, llm: torch.nn.Module, tokenizer, max_len: int, name: str = "", device: torch.device | str = "cpu"):
        if getattr(llm.config, "is_encoder_decoder", False):
            llm = llm.get_encoder()
        llm = getattr(llm, "text_model", llm)  # of CLIP and its kind
        self.llm = llm.to(device).eval().requires_grad_(False)
        self.llm.config.use_cache = False  # keys and values of texts that nobody continues
        self.tokenizer, self.max_len, self.name, self.device = tokenizer, max_len, name, torch.device(device)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        if tokenizer.pad_token_id is None:  # any token does, since padding is masked
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token or tokenizer.cls_token or tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise UserError(f"--llm_model_name {name}: the tokenizer has no padding token and no other special token to pad with")
        self.unknown = 0  # captions read so far with a character that the tokenizer does not know
        self.null = self.encode([""])  # (1, width): the null condition of guidance
        self.width = self.null.shape[1]

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, each (B, L) with L <= max_len; every row has at least one valid token."""
        batch = self.tokenizer(
            [normalize(caption) for caption in captions],
            padding="longest",
            truncation=True,
            max_length=self.max_len,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        ids, mask = batch["input_ids"].long(), batch["attention_mask"].long()
        if ids.shape[1] == 0:  # nothing but empty captions, and a tokenizer that adds no BOS
            ids, mask = ids.new_zeros(len(captions), 1), mask.new_zeros(len(captions), 1)
        empty = mask.sum(1) == 0
        if empty.any():
            ids[empty, 0], mask[empty, 0] = self._start_token(), 1
        return ids, mask

    def _start_token(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UserError(f"--llm_model_name {self.name}: the tokenizer has no BOS, CLS or EOS token, so the empty caption has no features")

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> Tensor:
        ids, mask = self.tokenize(captions)
        self.unknown += int(((ids == self.tokenizer.unk_token_id) & (mask == 1)).any(1).sum()) if self.tokenizer.unk_token_id is not None else 0
        ids, mask = ids.to(self.device), mask.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            hidden = self.llm(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        features = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if not features.isfinite().all():
            row = int((~features.isfinite().all(1)).nonzero()[0])
            raise UserError(f"--llm_model_name {self.name}: features of the caption {captions[row]!r} are not finite")
        return features.cpu()

    def encode_all(self, captions: list[str], batch_size: int = 64) -> Tensor:
        """(len(captions), width), encoded by all ranks together, each its share.  Collective.  Progress on rank 0."""
        order = sorted(range(len(captions)), key=lambda i: -len(captions[i]))  # like lengths together, the longest first: memory fails at once
        mine = order[dist.rank() :: dist.world_size()]
        features = torch.empty(len(mine), self.width)
        starts = tqdm(range(0, len(mine), batch_size), desc="captions", disable=not dist.is_main() or len(mine) < 20 * batch_size, mininterval=2)
        for start in starts:
            chosen = [captions[i] for i in mine[start : start + batch_size]]
            features[start : start + len(chosen)] = self.encode(chosen)
        rows, gathered = dist.gather_rows(torch.tensor(mine, dtype=torch.long)), dist.gather_rows(features)
        table = torch.empty_like(gathered)
        table[rows] = gathered
        return table

    def describe(self) -> dict[str, str | int]:
        """What features depend on, as plain data for the checkpoint."""
        config = self.llm.config
        ids = self.tokenizer(PROBE, return_token_type_ids=False)["input_ids"]
        return {
            "llm": self.name,
            "revision": getattr(config, "_commit_hash", None) or "",
            "architecture": config.model_type,
            "width": self.width,
            "max_text_len": self.max_len,
            "layer": "last",
            "pooling": "mean",
            "normalization": "NFKC",
            "tokenizer": hashlib.sha256(repr(ids).encode()).hexdigest()[:16],
        }


def load_text_encoder(name: str, max_len: int, device: torch.device, revision: str | None = None) -> TextEncoder:
    """A Hugging Face folder or hub name (at `revision`, if given) to an encoder: bf16 on a GPU, float32 on a CPU.

    Raises: UserError, in one line, where there is no such model or its weights do not fill it.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(f"--llm_model_name {name}: no such folder, and not a hub name like llm-jp/llm-jp-3-150m")
    try:
        longest = getattr(AutoConfig.from_pretrained(name, revision=revision).get_text_config(), "max_position_embeddings", None)
        if longest is not None and max_len > longest:
            raise UserError(f"--max_text_len {max_len} is more than {name} can read; wanted {longest} at most")
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        llm, report = AutoModel.from_pretrained(name, revision=revision, dtype=dtype, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # no such model, a cut file, a package that is missing: each its own exception
        raise UserError(f"--llm_model_name {name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    missing = [key for key in report["missing_keys"] if "pooler" not in key]  # BERT's pooler is not used here
    if missing:
        raise UserError(f"--llm_model_name {name}: {len(missing)} weights are missing from its files, first {missing[0]}")
    return TextEncoder(llm, tokenizer, max_len, name, device)


@dataclass(frozen=True)
class FeatureNorm:
    """Features to mean 0 and variance 1 in each dimension.

    Mean-pooled LLM states share most of their length, so captions differ by little until it is taken out.
    """

    mean: Tensor  # (1, width)
    std: Tensor  # (1, width)

    @classmethod
    def of(cls, features: Tensor) -> "FeatureNorm":
        """From the features of the training captions, (N, width).  Dimensions that do not vary keep their scale."""
        std = features.std(0, correction=0, keepdim=True)
        return cls(features.mean(0, keepdim=True), torch.where(std > 1e-6, std, 1.0))


class CaptionTable:
    """Features of a fixed set of captions in host memory, each distinct caption encoded once.  Collective to build."""

    def __init__(self, encoder: TextEncoder, captions: Iterable[str]):
        distinct = list(dict.fromkeys(captions))
        self.row = {caption: i for i, caption in enumerate(distinct)}
        self.features = encoder.encode_all(distinct)  # (N, width)
        self.null = encoder.null.clone()  # (1, width)

    def standardize(self, norm: FeatureNorm) -> None:
        """Once, here, rather than for every batch."""
        for features in (self.features, self.null):
            features.sub_(norm.mean).div_(norm.std)

    def __call__(self, captions: Sequence[str]) -> Tensor:  # -> (B, width)
        return self.features[[self.row[caption] for caption in captions]]
