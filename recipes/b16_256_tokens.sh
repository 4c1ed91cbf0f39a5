#!/usr/bin/env bash
# JiT-B/16 on captioned pictures of 256 x 256 pixels, reading every token of a caption: for captions that name more than one thing.
#
#   DATA=my_data OUT=output/b16_tokens GPUS=8 bash recipes/b16_256_tokens.sh [more flags]      (these are the defaults)
#
# recipes/jit_tokens_from_classes.sh begins with the published class weights instead.
# Effective batch 1024 = 128 x 8 GPUs; learning rate 2e-4 = blr x 1024 / 256, constant after five epochs of warm-up.
# With fewer GPUs add --accum_iter so that the product stays 1024: GPUS=4 bash recipes/b16_256_tokens.sh --accum_iter 2
# The noise scale is 2, where the paper has 1 at 256 pixels: on drawn scenes (benchmarks/README.md) networks of tokens learned sooner to read with louder
# noise. Nobody has measured it on photographs; --noise_scale 1 is the paper's.
# A caption of 40 tokens takes 246 KB in the text cache with llm-jp-3-3.7b, 41 KB with llm-jp-3-150m; docs/text.md says when to do without the cache.
# The same command again resumes. Flags at the end are added to the command, and a flag given twice counts the second time.
#
# Cost, computed but for the first line (benchmarks/README.md, a training step on a GPU; 2026-11-28, compiled):
#   measured        1,630 pictures/s on one H100 at batch 128, 19.1 GB at the peak: 13 hours per million pictures on eight if they scale
#   forward         56 GFLOP per picture: 256 patches, and 77 tokens from block 4 on
#   training        three times as much: 169 GFLOP per picture
#   per million pictures of data   0.17 EFLOP per epoch, 102 EFLOP for 600 epochs
#   memory          2.7 GB per GPU for weights, two EMAs and AdamW in float32 (20 bytes x 132.8M parameters), gradients 0.5 GB,
#                   activations 0.24 GB per picture, not compiled: 31 GB at 128 (tensors that autograd keeps under bf16 autocast, counted without a GPU)
set -euo pipefail

DATA=${DATA:-my_data}
OUT=${OUT:-output/b16_tokens}
GPUS=${GPUS:-8}

torchrun --nproc_per_node="$GPUS" --nnodes=1 --node_rank=0 main_jit.py \
    --model JiT-B/16-Tokens --img_size 256 --noise_scale 2.0 \
    --llm_model_name llm-jp/llm-jp-3-3.7b \
    --batch_size 128 --blr 5e-5 --epochs 600 --warmup_epochs 5 \
    --cfg 2.9 --interval_min 0.1 --interval_max 1.0 \
    --data_path "$DATA" --output_dir "$OUT" --resume "$OUT" "$@"
