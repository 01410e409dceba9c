#!/usr/bin/env bash
# A sweep as a job array, an example to change: each task of it is a run of its own, which is resumed like any (scripts/slurm.sh).
#
#   MODEL=... EMBEDDINGS=... HPS=... CLIP=... sbatch --nodes=4 --gpus-per-node=8 scripts/slurm_sweep.sh
#
# --array=0-5%2 has two run at a time; --array=3 runs or resumes one of them.
#SBATCH --array=0-5
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@1800
set -euo pipefail

learning_rates=(5e-6 1e-5 2e-5)
seeds=(0 1)
learning_rate=${learning_rates[SLURM_ARRAY_TASK_ID % 3]}
seed=${seeds[SLURM_ARRAY_TASK_ID / 3]}

cd "$SLURM_SUBMIT_DIR"
exec bash scripts/slurm.sh scripts/train_flux.sh --learning_rate "$learning_rate" --seed "$seed" \
    --output_dir "runs/sweep/lr_${learning_rate}_seed_$seed" "$@"
