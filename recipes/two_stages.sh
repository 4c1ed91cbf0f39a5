#!/usr/bin/env bash
# MiniT2I's two stages for Japanese, MMJiT-B/32 at 512 x 512 pixels: many recaptioned pictures, then a hundred thousand clean pairs.
#
#   STAGE1=recaptioned DATA=clean OUT=output/two_stages GPUS=8 bash recipes/two_stages.sh [more flags]      (these are the defaults)
#
# Stage 1 (STAGE1): 250,000 steps on as many densely captioned pictures as there are. docs/data.md lists Japanese data; BLIP3o (English, 36 million, in tar
# files) could be translated. Most have brief captions: stage 1 wants them written anew, at some 100 tokens.
# Stage 2 (DATA): 40,000 steps on 120,000 clean pairs at a tenth of the rate, from stage 1's EMA 1. MiniT2I took BLIP3o-60k, DALL-E 3 and
# ShareGPT-4o pictures (English; no such set in Japanese is known here, so translate, or take commoncatalog-cc-by-ext of docs/data.md); GenEval was .826 after both stages,
# .529 after the first alone, .408 after the second alone. On drawn scenes a first stage with 30 % wrong captions did harm (benchmarks/README.md): look
# for wrong captions before anything else.
# Epochs are those of a million pictures in stage 1 and of 120,000 in stage 2; change them in the script for other numbers, not by a flag, which both
# stages take. Stage 2 begins where stage 1 has ended; a script that was killed goes on in the stage that it was in.
# The same command again resumes. Flags at the end are added to the command, and a flag given twice counts the second time.
#
# Cost, computed but for the first line (benchmarks/README.md, a training step on a GPU; 2026-11-26, eager):
#   measured        295 pictures/s on one H100, without the encoder: 30 hours on eight for stage 1 and 5 for stage 2, if they scale
#   training        0.43 TFLOP per picture, and 0.07 TFLOP for a caption of 150 tokens in the encoder
#   stage 1         128 EFLOP, 15 hours on eight H100, computed for compiled steps (docs/running.md) without the encoder, which nobody has
#                   measured; stage 2: 21 EFLOP, 2.4 hours. MiniT2I's authors report three days on eight H100: plan for more
#   memory          as recipes/mmjit_b32_512_text.sh
set -euo pipefail

STAGE1=${STAGE1:-recaptioned}
DATA=${DATA:-clean}
OUT=${OUT:-output/two_stages}
GPUS=${GPUS:-8}

stage() {
    torchrun --nproc_per_node="$GPUS" --nnodes=1 --node_rank=0 main_jit.py \
        --model MMJiT-B/32 --img_size 512 --noise_scale 2 --llm_model_name sbintuitions/modernbert-ja-310m --text_cache off \
        --batch_size 64 --accum_iter 2 --ema_decay1 0.99995 --ema_decay2 0.9999 --sampling_method euler --num_sampling_steps 100 --cfg 2.5 "$@"
}

stage --data_path "$STAGE1" --lr 4e-4 --epochs 256 --warmup_epochs 5 --output_dir "$OUT-stage1" --resume "$OUT-stage1" "$@"
stage --data_path "$DATA" --lr 4e-5 --epochs 341 --warmup_epochs 8 --output_dir "$OUT" --resume "$OUT" --init_from "$OUT-stage1" "$@"
