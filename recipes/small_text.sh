#!/usr/bin/env bash
# JiT-S/8 on a few hundred captioned pictures of 64 x 64 pixels, in one process, on one GPU or on a CPU.
#
#   DATA=my_data OUT=output/small bash recipes/small_text.sh [more flags]      (these are the defaults)
#
# Effective batch 64; learning rate 5e-4, constant after 20 epochs of warm-up.
# The same command again resumes. Flags at the end are added to the command, and a flag given twice counts the second time.
#
# Cost, computed, not measured:
#   forward         3.8 GFLOP per picture. The paper has no such size: 2 x parameters x tokens (64 in four blocks, 96 in
#                   eight) is 3.62, attention 0.14, the rest 0.04
#   training        three times as much: 11.4 GFLOP per picture
#   per million pictures of data   0.011 EFLOP per epoch, 11.4 EFLOP for 1000 epochs
#   for 500 pictures               0.0057 EFLOP for 1000 epochs
#   time            500 pictures, 1000 epochs: one minute on an H100 at 10 % of 989 TFLOP/s (bf16, dense). Assumed: so small
#                   a network leaves most of the card idle; starting, loading and saving come on top. 13 hours on two CPU
#                   cores, if they reach 125 GFLOP/s as in the training step of JiT-S/16 in benchmarks/README.md
#   memory          0.7 GB for weights, two EMAs and AdamW in float32 (20 bytes x 32.8M parameters);
#                   gradients (0.1 GB) and activations come on top
set -euo pipefail

DATA=${DATA:-my_data}
OUT=${OUT:-output/small}

python main_jit.py --model JiT-S/8-Text --img_size 64 --llm_model_name llm-jp/llm-jp-3-150m \
    --batch_size 64 --lr 5e-4 --epochs 1000 --warmup_epochs 20 --save_last_freq 50 \
    --data_path "$DATA" --output_dir "$OUT" --resume "$OUT" "$@"
