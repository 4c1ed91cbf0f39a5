"""A small CLIP made on the spot, for where no model hub can be reached: a SigLIP as an ordinary Hugging Face folder, for --clip_model.

`python -m demo.tiny_clip --out DIR` trains it on the demo's digits in all colours, held-out pairs included: it judges what JiT draws of
pairs that JiT never saw. Each picture has to find its pair's caption, in any wording, among those of all 80 pairs.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor, logging

from datasets.demo import COLOURS, colour_ink, digit_captions, load_ink
from demo.tiny_llm import train_tokenizer

LONGEST = 16  # tokens of a caption


def build_siglip(vocabulary: int, img_size: int, width: int = 96, depth: int = 2, patch: int = 8) -> SiglipModel:
    shared = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth, "num_attention_heads": max(1, width // 32)}
    text = {"vocab_size": vocabulary, "max_position_embeddings": LONGEST, "projection_size": width, "pad_token_id": 4, "bos_token_id": 1, "eos_token_id": 2}
    return SiglipModel(SiglipConfig(text_config=shared | text, vision_config=shared | {"image_size": img_size, "patch_size": patch}))


def build_processor(tokenizer: PreTrainedTokenizerFast, img_size: int) -> SiglipProcessor:
    return SiglipProcessor(SiglipImageProcessor(size={"height": img_size, "width": img_size}), tokenizer)


def features(output) -> torch.Tensor:
    return F.normalize(output.pooler_output, dim=-1)


def train(model: SiglipModel, processor: SiglipProcessor, size: int, steps: int, lr: float = 1e-3, batch: int = 128) -> float:
    """Returns: the share of pictures that find their pair's caption, over the last 20 steps."""
    inks, digits = load_ink(size)
    colours, pairs = list(COLOURS), [(colour, digit) for colour in COLOURS for digit in range(10)]
    pictures = np.stack([[np.asarray(colour_ink(ink, colour)) for ink in inks] for colour in colours])  # (8, 1797, H, W, 3)
    pictures = torch.from_numpy(pictures).permute(0, 1, 4, 2, 3)
    tokens = processor(text=[text for pair in pairs for text in digit_captions(*pair)], padding="max_length", max_length=LONGEST, return_tensors="pt")
    wordings = len(digit_captions(*pairs[0]))
    optimizer, generator, right = torch.optim.AdamW(model.parameters(), lr=lr), torch.Generator().manual_seed(0), []
    for step in (bar := tqdm(range(steps), desc="CLIP", mininterval=2)):
        colour, ink = (torch.randint(count, (batch,), generator=generator) for count in (len(colours), len(inks)))
        chosen = torch.arange(len(pairs)) * wordings + torch.randint(wordings, (len(pairs),), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        image = features(model.get_image_features(pixel_values=pictures[colour, ink].float() / 127.5 - 1))
        text = features(model.get_text_features(**{name: rows[chosen] for name, rows in tokens.items()}))
        logits, pair = 20 * image @ text.T, colour * 10 + torch.from_numpy(digits)[ink]
        loss = F.cross_entropy(logits, pair)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        right.append((logits.argmax(1) == pair).float().mean())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return torch.stack(right[-20:]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--size", type=int, default=32, help="width and height of the pictures")
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.manual_seed(0)
    logging.set_verbosity_error()
    tokenizer = train_tokenizer([text for colour in COLOURS for digit in range(10) for text in digit_captions(colour, digit)])
    processor = build_processor(tokenizer, args.size)
    model = build_siglip(len(tokenizer), args.size)
    share = train(model, processor, args.size, args.steps)
    logging.disable_progress_bar()
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"CLIP: {size:.1f}M parameters, {share:.1%} of its training pictures find their caption, in {os.path.relpath(args.out)}")


if __name__ == "__main__":
    main()
