#!/usr/bin/env bash
# The runs of docs/shapes.md, on two CPU processes, a few minutes each; each ends with the scores on held-out prompts before and after.
#
#   bash scripts/shapes_experiments.sh EXPERIMENT SEED [flags of train_grpo_flux.py]
#
#   paper_form         the paper's own form on single objects: constant noise, random 60 % of the steps, 4 updates an iteration
#   aesthetic          a taste that ignores the prompt, with the quickstart's sampler
#   aesthetic_binary   the same, as 0 or 1 around a threshold
#   long               the quickstart's recipe for 300 iterations
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
cd "$repository"
export OMP_NUM_THREADS=1

experiment=${1:?name an experiment} seed=${2:?give a seed}
shift 2
run="runs/shapes/${experiment}_$seed"
prompts=runs/shapes/prompts
mkdir -p "$prompts"
if [ "$experiment" = paper_form ]; then
    for split in train heldout; do grep -v " and " "shapes/prompts/$split.txt" >"$prompts/single_$split.txt"; done
    train=$prompts/single_train.txt heldout=$prompts/single_heldout.txt images=90 cache=runs/embeddings/flux_shapes_single
else
    train=shapes/prompts/train.txt heldout=shapes/prompts/heldout.txt images=24 cache=runs/embeddings/flux_shapes
fi

common=(--seed "$seed" --prompts_per_iteration 8 --sampling_steps 8 --lr_warmup_steps 5 --zero_stage 1
    --height 32 --width 32 --rollout_batch_size 64 --micro_batch_size 64 --checkpoint_every 100 --sample_every 100)
early_noise=(--num_generations 16 --best_of_n 8 --updates_per_iteration 1 --noise_level 2 --sde_window 0 4 --timestep_fraction 1
    --learning_rate 2e-4 --ema_decay 0.97)
case $experiment in
paper_form)
    flags=(--rewards shapes shapes_strict --num_generations 12 --updates_per_iteration 4 --noise_level 0.7 --timestep_fraction 0.6 --clip_range 1e-4
        --learning_rate 1e-4 --ema_decay 0.98 --iterations 150)
    ;;
aesthetic) flags=(--rewards aesthetic "${early_noise[@]}" --iterations 60) ;;
aesthetic_binary) flags=(--rewards aesthetic@0.6 "${early_noise[@]}" --iterations 60) ;;
long) flags=(--rewards shapes shapes_strict "${early_noise[@]}" --iterations 300) ;;
*) fail "unknown experiment '$experiment': see the head of $0" ;;
esac

python preprocess/embed_flux.py --model shapes/models/flux --prompts "$train" --output_dir "$cache"
torchrun --standalone --nproc_per_node 2 train_grpo_flux.py --model shapes/models/flux --embeddings "$cache" --output_dir "$run" \
    "${common[@]}" "${flags[@]}" "$@"
torchrun --standalone --nproc_per_node 2 evaluate.py --model shapes/models/flux --checkpoint "$run/export" --prompts "$heldout" \
    --rewards shapes_strict shapes clip=shapes/models/clip aesthetic --num_seeds 3 --images_per_prompt "$images" --batch_size 64 \
    --output_dir "$run/evaluation"
