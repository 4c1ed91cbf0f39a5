#!/usr/bin/env bash
# JiT-B/16-Tokens on captioned pictures of 256 x 256 pixels, begun with the weights of the published class model.
#
#   FROM=jit_b16/checkpoint-last.pth DATA=my_data OUT=output/b16_from_classes GPUS=8 bash recipes/jit_tokens_from_classes.sh [more flags]
#   (these are the defaults)
#
# FROM is the checkpoint of JiT-B/16 that JiT's authors publish, or one of recipes/b16_256_class.sh. Its blocks, time and patches are copied; new are the
# text projection and the mask token, and the null label's vector goes into the time embedding (OUT/init_from.txt lists every tensor).
# On the demo's digits (benchmarks/README.md) class weights were worth half of the steps to a -Text model, and a quarter or more of those to a -Tokens
# model, which has to learn to read by attention. What they are worth here is open: watch text_gap/shuffled, and stop where it stays at zero.
# The noise scale is 1, which the class weights were trained with.
# 200 epochs, the paper's shorter training, where recipes/b16_256_tokens.sh has 600, and one epoch of warm-up: a choice, not a finding.
# The language model reads each caption once, so it may be large: 40 tokens of llm-jp-3-3.7b take 246 KB in the text cache. For more than some hundred thousand
# captions give --llm_model_name llm-jp/llm-jp-3-440m (82 KB); docs/text.md says when to do without the cache.
# Effective batch 1024 = 128 x 8 GPUs; learning rate 2e-4 = blr x 1024 / 256.
# With fewer GPUs add --accum_iter so that the product stays 1024: GPUS=4 bash recipes/jit_tokens_from_classes.sh --accum_iter 2
# The same command again resumes. Flags at the end are added to the command, and a flag given twice counts the second time.
#
# Cost, computed but for the first line (benchmarks/README.md, a training step on a GPU; 2026-11-28, compiled):
#   measured        1,630 pictures/s on one H100 at batch 128, 19.1 GB at the peak: 4.3 hours per million pictures on eight if they scale
#   forward         56 GFLOP per picture: 256 patches, and 77 tokens from block 4 on
#   training        three times as much: 169 GFLOP per picture
#   per million pictures of data   0.17 EFLOP per epoch, 34 EFLOP for 200 epochs
#   captions        254 GFLOP for 40 tokens in llm-jp-3-3.7b, once: 0.25 EFLOP for a million
#   memory          2.7 GB per GPU for weights, two EMAs and AdamW in float32 (20 bytes x 132.8M parameters), gradients 0.5 GB,
#                   activations 0.24 GB per picture, not compiled: 31 GB at 128 (tensors that autograd keeps under bf16 autocast, counted without a GPU)
set -euo pipefail

FROM=${FROM:-jit_b16/checkpoint-last.pth}
DATA=${DATA:-my_data}
OUT=${OUT:-output/b16_from_classes}
GPUS=${GPUS:-8}

torchrun --nproc_per_node="$GPUS" --nnodes=1 --node_rank=0 main_jit.py \
    --model JiT-B/16-Tokens --img_size 256 --noise_scale 1.0 --init_from "$FROM" \
    --llm_model_name llm-jp/llm-jp-3-3.7b \
    --batch_size 128 --blr 5e-5 --epochs 200 --warmup_epochs 1 \
    --cfg 2.9 --interval_min 0.1 --interval_max 1.0 \
    --data_path "$DATA" --output_dir "$OUT" --resume "$OUT" "$@"
