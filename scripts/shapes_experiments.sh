#!/usr/bin/env bash
# The runs of docs/shapes.md, on two CPU processes, a few minutes each; each ends with the scores on held-out prompts before and after.
#
#   bash scripts/shapes_experiments.sh EXPERIMENT SEED [flags of the training script]
#
#   paper_form         FLUX, the paper's own form on single objects: constant noise, random 60 % of the steps, 4 updates an iteration
#   long               FLUX, the quickstart's recipe for 300 iterations
#   wan                Wan with guidance: form and motion of clips
#   skyreels           SkyReels-I2V with guidance: motion of clips, and fidelity to their given first frames
#
# PROCESSES=1 runs on one process: the same numbers up to rounding.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
cd "$repository"
export OMP_NUM_THREADS=1

experiment=${1:?name an experiment} seed=${2:?give a seed}
shift 2
run="runs/shapes/${experiment}_$seed"
prompts=runs/shapes/prompts
early_noise=(--num_generations 16 --best_of_n 8 --updates_per_iteration 1 --noise_level 2 --sde_window 0 4 --timestep_fraction 1
    --learning_rate 2e-4 --ema_decay 0.97)
clips=(--num_frames 9 --shift 3 --updates_per_iteration 1 --sde_window 0 4 --timestep_fraction 1)

family=flux train=train.txt heldout=heldout.txt embed=() evaluated=(shapes_strict shapes clip=shapes/models/clip aesthetic) images=24
case $experiment in
paper_form)
    mkdir -p "$prompts"
    for split in train heldout; do grep -v " and " "shapes/prompts/$split.txt" >"$prompts/single_$split.txt"; done
    train=../../$prompts/single_train.txt heldout=../../$prompts/single_heldout.txt images=90
    flags=(--rewards shapes shapes_strict --num_generations 12 --updates_per_iteration 4 --noise_level 0.7 --timestep_fraction 0.6 --clip_range 1e-4
        --learning_rate 1e-4 --ema_decay 0.98 --iterations 150)
    ;;
long) flags=(--rewards shapes shapes_strict "${early_noise[@]}" --iterations 300) ;;
wan)
    family=wan train=video_train.txt heldout=video_heldout.txt evaluated=(motion visual shapes_strict shapes) images=8
    flags=(--rewards visual motion "${clips[@]}" "${early_noise[@]}" --guidance_scale 2 --iterations 40)
    ;;
skyreels)
    family=skyreels train=i2v_train.jsonl heldout=i2v_heldout.jsonl evaluated=(motion fidelity visual shapes_strict) images=8
    embed=(--height 32 --width 32)
    flags=(--rewards motion fidelity "${clips[@]}" "${early_noise[@]}" --guidance_scale 2 --learning_rate 3e-4 --iterations 40)
    ;;
*) fail "unknown experiment '$experiment': see the head of $0" ;;
esac

launch=(attend python scripts/launch.py --standalone --nproc_per_node "${PROCESSES:-2}")
model=shapes/models/$family cache=runs/embeddings/${family}_shapes_$(basename "${train%.*}")
common=(--seed "$seed" --prompts_per_iteration 8 --sampling_steps 8 --lr_warmup_steps 5 --zero_stage 1
    --height 32 --width 32 --rollout_batch_size 64 --micro_batch_size 64 --checkpoint_every 100 --sample_every 100)
attend python "preprocess/embed_$family.py" --model "$model" --prompts "shapes/prompts/$train" --output_dir "$cache" "${embed[@]}"
"${launch[@]}" "train_grpo_$family.py" --model "$model" --embeddings "$cache" --output_dir "$run" "${common[@]}" "${flags[@]}" "$@"
"${launch[@]}" evaluate.py --model "$model" --checkpoints trained="$run/export" --prompts "shapes/prompts/$heldout" \
    --rewards "${evaluated[@]}" --num_seeds 3 --images_per_prompt "$images" --batch_size 64 --output_dir "$run/evaluation"
