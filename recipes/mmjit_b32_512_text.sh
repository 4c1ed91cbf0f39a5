#!/usr/bin/env bash
# MMJiT-B/32 on densely captioned pictures of 512 x 512 pixels: stage 1 of MiniT2I's recipe, for Japanese. recipes/two_stages.sh has both stages.
#
#   DATA=my_data OUT=output/mmjit_b32 GPUS=8 bash recipes/mmjit_b32_512_text.sh [more flags]      (these are the defaults)
#
# Effective batch 1024 = 64 x 8 GPUs x 2 parts; learning rate 4e-4, constant after 5 epochs of warm-up; noise scale 2; EMAs of 0.99995 and 0.9999.
# With fewer GPUs raise --accum_iter so that the product stays 1024. 256 epochs of a million pictures are the recipe's 250,000 steps; for ten million
# pictures give --epochs 26 --warmup_epochs 0.5. Captions of 150 tokens take 230 KB each in the text cache, so the encoder, ModernBERT of 310M parameters
# (sbintuitions/modernbert-ja-310m), runs in every step. llm-jp-3-3.7b would take 0.96 TFLOP for the same caption, twice what the network does, and larger
# encoders than FLAN-T5's 340M parameters added almost nothing for MiniT2I's authors. For some hundred thousand captions make a text cache: add
# --text_cache disk. Captions are dropped at .1 and read up to 256 tokens by default. MiniT2I draws with cfg 2.5 to look at, with 5 to 6 for GenEval.
# The same command again resumes. Flags at the end are added to the command, and a flag given twice counts the second time.
#
# Cost, computed but for the first line (benchmarks/README.md, a training step on a GPU; 2026-11-26, eager):
#   measured        295 pictures/s on one H100 at batch 64, 32.6 GB at the peak, without the encoder: 30 hours on eight if they scale
#   forward         144 GFLOP per picture: 256 patches and 256 text tokens
#   training        three times as much: 0.43 TFLOP per picture, and 0.07 TFLOP for a caption of 150 tokens in the encoder
#   250,000 steps   128 EFLOP
#   time            15 hours on eight H100, computed for compiled steps (docs/running.md), without the encoder,
#                   which nobody has measured. MiniT2I's authors report three days for this network on eight H100: plan for more
#   memory          5.1 GB per GPU for weights, two EMAs and AdamW in float32 (20 bytes x 253.1M parameters), gradients 1.0 GB,
#                   activations 0.51 GB per picture: 33 GB at 64 (tensors that autograd keeps under bf16 autocast, counted without a GPU)
set -euo pipefail

DATA=${DATA:-my_data}
OUT=${OUT:-output/mmjit_b32}
GPUS=${GPUS:-8}

torchrun --nproc_per_node="$GPUS" --nnodes=1 --node_rank=0 main_jit.py \
    --model MMJiT-B/32 --img_size 512 --noise_scale 2 \
    --llm_model_name sbintuitions/modernbert-ja-310m --text_cache off \
    --batch_size 64 --accum_iter 2 --lr 4e-4 --epochs 256 --warmup_epochs 5 --ema_decay1 0.99995 --ema_decay2 0.9999 \
    --sampling_method euler --num_sampling_steps 100 --cfg 2.5 \
    --data_path "$DATA" --output_dir "$OUT" --resume "$OUT" "$@"
