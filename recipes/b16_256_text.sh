#!/usr/bin/env bash
# JiT-B/16 on captioned pictures of 256 x 256 pixels, each caption read as one vector: the smallest cost.
#
#   DATA=my_data OUT=output/b16_text GPUS=8 bash recipes/b16_256_text.sh [more flags]      (these are the defaults)
#
# Effective batch 1024 = 128 x 8 GPUs; learning rate 2e-4 = blr x 1024 / 256, constant after five epochs of warm-up.
# With fewer GPUs add --accum_iter so that the product stays 1024: GPUS=4 bash recipes/b16_256_text.sh --accum_iter 2
# The same command again resumes. Flags at the end are added to the command, and a flag given twice counts the second time.
#
# Cost, computed but for the first line (benchmarks/README.md, a training step on a GPU; 2026-11-26, eager):
#   measured        712 pictures/s on one H100 at batch 128, 26.2 GB at the peak: 29 hours on eight if they scale
#   forward         50 GFLOP per picture (the paper's 25 "Gflops" count a multiply-add as one operation)
#   training        three times as much: 150 GFLOP per picture
#   per million pictures of data   0.15 EFLOP per epoch, 90 EFLOP for 600 epochs
#   time            13 hours per million pictures on eight H100, computed for compiled steps (docs/running.md), which nobody has measured
#   evaluations     --online_eval draws 50,000 pictures 15 times, 187 passes of the network each: 7.0 EFLOP,
#                   1 hour more at the computed speed
#   memory          2.7 GB per GPU for weights, two EMAs and AdamW in float32 (20 bytes x 132.7M parameters);
#                   gradients (0.5 GB) and activations come on top
set -euo pipefail

DATA=${DATA:-my_data}
OUT=${OUT:-output/b16_text}
GPUS=${GPUS:-8}

torchrun --nproc_per_node="$GPUS" --nnodes=1 --node_rank=0 main_jit.py \
    --model JiT-B/16-Text --img_size 256 --noise_scale 1.0 \
    --llm_model_name llm-jp/llm-jp-3-3.7b \
    --batch_size 128 --blr 5e-5 --epochs 600 --warmup_epochs 5 \
    --cfg 2.9 --interval_min 0.1 --interval_max 1.0 \
    --data_path "$DATA" --output_dir "$OUT" --resume "$OUT" --online_eval "$@"
