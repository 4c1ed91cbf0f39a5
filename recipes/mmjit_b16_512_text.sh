#!/usr/bin/env bash
# MMJiT-B/16 on densely captioned pictures of 512 x 512 pixels: stage 1 of MiniT2I's recipe, for Japanese. recipes/two_stages.sh has both stages.
#
#   DATA=my_data OUT=output/mmjit_b16 GPUS=8 bash recipes/mmjit_b16_512_text.sh [more flags]      (these are the defaults)
#
# Effective batch 1024 = 32 x 8 GPUs x 4 parts; learning rate 4e-4, constant after 5 epochs of warm-up; noise scale 2; EMAs of 0.99995 and 0.9999.
# With fewer GPUs raise --accum_iter so that the product stays 1024. 256 epochs of a million pictures are the recipe's 250,000 steps; for ten million
# pictures give --epochs 26 --warmup_epochs 0.5. Captions of 150 tokens take 230 KB each in the text cache, so the encoder, ModernBERT of 310M parameters
# (sbintuitions/modernbert-ja-310m), runs in every step. llm-jp-3-3.7b would take 0.96 TFLOP for the same caption, nearly as much as the network, and larger
# encoders than FLAN-T5's 340M parameters added almost nothing for MiniT2I's authors. For some hundred thousand captions make a text cache: add
# --text_cache disk. Captions are dropped at .1 and read up to 256 tokens by default. MiniT2I draws with cfg 2.5 to look at, with 5 to 6 for GenEval.
# The same command again resumes. Flags at the end are added to the command, and a flag given twice counts the second time.
#
# Cost, computed but for the first line (benchmarks/README.md, a training step on a GPU; 2026-11-28, compiled):
#   measured        249 pictures/s on one H100 at batch 32, 27.9 GB at the peak, without the encoder: 36 hours on eight if they scale
#   forward         400 GFLOP per picture: 1024 patches and 256 text tokens
#   training        three times as much: 1.20 TFLOP per picture, and 0.07 TFLOP for a caption of 150 tokens in the encoder
#   250,000 steps   326 EFLOP
#   memory          5.0 GB per GPU for weights, two EMAs and AdamW in float32 (20 bytes x 251.0M parameters), gradients 1.0 GB,
#                   activations 1.26 GB per picture, not compiled: 40 GB at 32 (tensors that autograd keeps under bf16 autocast, counted without a GPU).
#                   On 141-GB cards --batch_size 64 --accum_iter 2 make the same batch
set -euo pipefail

DATA=${DATA:-my_data}
OUT=${OUT:-output/mmjit_b16}
GPUS=${GPUS:-8}

torchrun --nproc_per_node="$GPUS" --nnodes=1 --node_rank=0 main_jit.py \
    --model MMJiT-B/16 --img_size 512 --noise_scale 2 \
    --llm_model_name sbintuitions/modernbert-ja-310m --text_cache off \
    --batch_size 32 --accum_iter 4 --lr 4e-4 --epochs 256 --warmup_epochs 5 --ema_decay1 0.99995 --ema_decay2 0.9999 \
    --sampling_method euler --num_sampling_steps 100 --cfg 2.5 \
    --data_path "$DATA" --output_dir "$OUT" --resume "$OUT" "$@"
