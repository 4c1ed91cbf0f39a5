#!/usr/bin/env bash
# MMJiT-S/16 on captioned pictures of 256 x 256 pixels, on one card of 24 GB.
#
#   DATA=my_data OUT=output/mmjit_s16 GPUS=1 bash recipes/mmjit_s16_256_text.sh [more flags]      (these are the defaults)
#
# Effective batch 256 = 64 x 1 GPU x 4 parts; learning rate 4e-4, constant after two epochs of warm-up. The noise scale is 2, as MiniT2I has it at 512
# pixels: without a time input the network reads the noise level from the picture. The encoder is ModernBERT of 130M parameters
# (sbintuitions/modernbert-ja-130m); its states of a caption of 100 tokens take 102 KB in the text cache.
# The same command again resumes. Flags at the end are added to the command, and a flag given twice counts the second time.
#
# Cost, computed but for the first line (benchmarks/README.md, a training step on a GPU; 2026-11-26, eager):
#   measured        538 pictures/s on one H100 at batch 64, 10.6 GB at the peak: 103 hours; so small a network waits for the CPU to start kernels
#   forward         28 GFLOP per picture: 256 patches and 256 text tokens
#   training        three times as much: 85 GFLOP per picture
#   per million pictures of data   0.085 EFLOP per epoch, 17 EFLOP for 200 epochs
#   memory          0.9 GB for weights, two EMAs and AdamW in float32 (20 bytes x 45.3M parameters), gradients 0.2 GB,
#                   activations 0.18 GB per picture: 12 GB at 64 (tensors that autograd keeps under bf16 autocast, counted without a GPU)
set -euo pipefail

DATA=${DATA:-my_data}
OUT=${OUT:-output/mmjit_s16}
GPUS=${GPUS:-1}

torchrun --nproc_per_node="$GPUS" --nnodes=1 --node_rank=0 main_jit.py \
    --model MMJiT-S/16 --img_size 256 --noise_scale 2 \
    --llm_model_name sbintuitions/modernbert-ja-130m \
    --batch_size 64 --accum_iter 4 --lr 4e-4 --epochs 200 --warmup_epochs 2 \
    --sampling_method euler --num_sampling_steps 100 --cfg 2.5 \
    --data_path "$DATA" --output_dir "$OUT" --resume "$OUT" "$@"
