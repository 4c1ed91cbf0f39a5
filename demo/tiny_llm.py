"""A small causal LM made on the spot, for where no model hub can be reached: an ordinary Hugging Face folder like llm-jp-3's.

`python -m demo.tiny_llm --data_path DIR --out DIR` trains it on the captions of a data set. The tokenizer is a Unigram model with
byte fallback, llm-jp-3's special tokens under its ids, and a BOS put before every text; the model is a LlamaForCausalLM.
`--text FILE` trains on the lines of a file instead. With `--words FILE` the tokens are its lines and single characters, so that a new phrase is made
of known tokens.
"""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

from config import Data
from datasets.source import open_captioned
from datasets.stream import View
from datasets.text_image import read_captions

SPECIAL = ["<unk>", "<s>", "</s>", "<MASK|LLM-jp>", "<PAD|LLM-jp>", "<CLS|LLM-jp>", "<SEP|LLM-jp>", "<EOD|LLM-jp>"]


def repeated_strings(texts: list[str], longest: int) -> dict[str, int]:
    """All characters, and the longest strings that occur twice: those that each text, read from left to right, can be cut into.

    Returns: how often each occurs in `texts`; none is longer than `longest` characters.
    """
    found = Counter("".join(texts))
    taken = set(found)
    for n in range(2, longest + 1):
        longer = Counter(text[i : i + n] for text in texts for i in range(len(text) - n + 1) if text[i : i + n - 1] in found)
        found.update({piece: count for piece, count in longer.items() if count > 1})
    for text in texts:
        while text:
            piece = next(text[:n] for n in range(longest, 0, -1) if text[:n] in found)
            taken.add(piece)
            text = text[len(piece) :]
    return {piece: found[piece] for piece in taken}


def word_counts(texts: list[str], words: Iterable[str]) -> dict[str, int]:
    """How often all characters, and those of the words that occur at all, do."""
    text = "\n".join(texts)
    found = {word: text.count(word) for word in words}
    return {**Counter("".join(texts)), **{word: count for word, count in found.items() if count}}


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2000, longest: int = 16, words: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Unigram of up to `vocab_size` tokens and 256 bytes, pieces of up to `longest` characters, or `words` and characters: no text meets <unk>.

    The set of texts decides all of it: UnigramTrainer walks hash maps, and its ids and scores are others in every process.
    """
    normalizer = normalizers.NFKC()
    texts, words = sorted({normalizer.normalize_str(text) for text in texts}), sorted({normalizer.normalize_str(word) for word in words})
    counts = word_counts(texts, words) if words else repeated_strings(texts, longest)
    chosen = sorted(counts, key=lambda piece: (len(piece) > 1, -counts[piece], piece))[: vocab_size - len(SPECIAL)]
    total = sum(map(len, texts))
    scores = {piece: math.log(counts[piece] / total) for piece in chosen}
    lowest = min(scores.values()) - 1
    vocabulary = dict.fromkeys(SPECIAL, 0.0) | {f"<0x{byte:02X}>": lowest for byte in range(256)} | scores
    tokenizer = Tokenizer(models.Unigram([*vocabulary.items()], unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<PAD|LLM-jp>")


def build_llama(tokenizer: PreTrainedTokenizerFast, width: int = 256, depth: int = 4) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    llm = LlamaForCausalLM(config)
    llm.get_input_embeddings().weight.data.mul_(1 / config.initializer_range)  # variance 1: what token it was stays visible in the state
    return llm


def train_llama(llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int, lr: float = 3e-4) -> float:
    """Next-token prediction on `texts`, batches of 64.  Returns: the mean loss of the last ten steps, nats per token."""
    optimizer = torch.optim.AdamW(llm.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in (bar := tqdm(range(steps), desc="language model", mininterval=2)):
        chosen = torch.randint(len(texts), (64,), generator=generator).tolist()
        batch = tokenizer([texts[i] + tokenizer.eos_token for i in chosen], padding=True, return_tensors="pt", return_token_type_ids=False).to(llm.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        loss = llm(**batch, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return torch.stack(losses[-10:]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_path", type=Path, help="folder with images/ and captions/")
    source.add_argument("--text", type=Path, help="a file with one text a line instead")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--longest", type=int, default=16, help="characters of the tokenizer's longest pieces")
    parser.add_argument("--words", type=Path, help="a file with one word a line: the tokenizer's pieces, besides single characters")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    if args.words and not args.words.is_file():
        sys.exit(f"error: no file {args.words}; --words wants one word a line")
    if args.text and not args.text.is_file():
        sys.exit(f"error: no file {args.text}; --text wants one text a line")
    if args.longest < 1:
        sys.exit(f"error: --longest {args.longest}; wanted at least 1")
    torch.manual_seed(0)
    texts = list(dict.fromkeys(read_captions(args.text))) if args.text else open_captioned(Data(path=str(args.data_path)), View(256)).distinct_captions()
    tokenizer = train_tokenizer(texts, longest=args.longest, words=read_captions(args.words) if args.words else ())
    llm = build_llama(tokenizer).to(args.device)
    loss = train_llama(llm, tokenizer, texts, args.steps)
    logging.disable_progress_bar()
    llm.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = sum(p.numel() for p in llm.parameters()) / 1e6
    print(f"language model: {size:.1f}M parameters, {len(tokenizer)} tokens, loss {loss:.2f} on {len(texts)} captions, in {os.path.relpath(args.out)}")


if __name__ == "__main__":
    main()
