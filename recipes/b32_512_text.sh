#!/usr/bin/env bash
# JiT-B/32 on captioned pictures of 512 x 512 pixels: four times the pixels of B/16 at nearly the same cost.
# The noise grows with the size of the picture: --noise_scale 2.0.
#
#   DATA=my_data OUT=output/b32 GPUS=8 bash recipes/b32_512_text.sh [more flags]      (these are the defaults)
#
# Effective batch 1024 = 128 x 8 GPUs; learning rate 2e-4 = blr x 1024 / 256, constant after five epochs of warm-up.
# With fewer GPUs add --accum_iter so that the product stays 1024: GPUS=4 bash recipes/b32_512_text.sh --accum_iter 2
# The same command again resumes. Flags at the end are added to the command, and a flag given twice counts the second time.
#
# Cost, computed, not measured:
#   forward         52 GFLOP per picture (the paper's 26 "Gflops" count a multiply-add as one operation)
#   training        three times as much: 156 GFLOP per picture
#   per million pictures of data   0.16 EFLOP per epoch, 94 EFLOP for 600 epochs
#   time            14 hours per million pictures on eight H100, computed for compiled steps (docs/running.md), which nobody has measured
#   evaluations     --online_eval draws 50,000 pictures 15 times, 187 passes of the network each: 7.3 EFLOP,
#                   1.1 hours more at the computed speed
#   memory          2.7 GB per GPU for weights, two EMAs and AdamW in float32 (20 bytes x 134.8M parameters);
#                   gradients (0.5 GB) and activations come on top
set -euo pipefail

DATA=${DATA:-my_data}
OUT=${OUT:-output/b32}
GPUS=${GPUS:-8}

torchrun --nproc_per_node="$GPUS" --nnodes=1 --node_rank=0 main_jit.py \
    --model JiT-B/32-Text --img_size 512 --noise_scale 2.0 \
    --llm_model_name llm-jp/llm-jp-3-3.7b \
    --batch_size 128 --blr 5e-5 --epochs 600 --warmup_epochs 5 \
    --cfg 2.9 --interval_min 0.1 --interval_max 1.0 \
    --data_path "$DATA" --output_dir "$OUT" --resume "$OUT" --online_eval "$@"
