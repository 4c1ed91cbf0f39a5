#!/usr/bin/env bash
# The run of b16_256_text.sh under Slurm, on two nodes of eight GPUs: one torchrun a node, which meet at the first node.
#
#   DATA=my_data OUT=output/b16_text sbatch recipes/slurm.sh [more flags]
#
# Five minutes before its time is over Slurm sends SIGUSR1: the run finishes its step, saves, and this job is queued again by itself. Where a node dies
# Slurm queues the job again too (--requeue). Either way it goes on where it was saved. OUT has to be on a disk that all nodes share.
# The partition, the account and the time are your cluster's: give them to sbatch, or change the lines below. docs/multi_node.md says more.
#
# Cost, computed: an effective batch of 1024 = 64 x 16 GPUs; half of the hours of b16_256_text.sh, if sixteen GPUs are twice as fast as eight.
#SBATCH --job-name=jit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

DATA=${DATA:-my_data}
OUT=${OUT:-output/b16_text}
GPUS=${GPUS:-8}  # of a node

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 OMP_NUM_THREADS=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # head would close the pipe on a long list
again=
trap 'again=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1  # to what srun started, on all nodes

srun --kill-on-bad-exit=0 torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$GPUS" --numa-binding=node \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:29500" \
    --max-restarts=3 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 main_jit.py \
    --model JiT-B/16-Text --img_size 256 --noise_scale 1.0 \
    --llm_model_name llm-jp/llm-jp-3-3.7b \
    --batch_size 64 --blr 5e-5 --epochs 600 --warmup_epochs 5 \
    --cfg 2.9 --interval_min 0.1 --interval_max 1.0 \
    --save_freq_steps 1000 --keep_last 3 \
    --data_path "$DATA" --output_dir "$OUT" --resume "$OUT" --online_eval "$@" &

code=0
wait $! || code=$?
if [ -n "$again" ]; then
    wait $! || true  # the signal ended the first wait
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
