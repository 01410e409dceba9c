#!/usr/bin/env bash
# FLUX.1-dev on 32 GPUs (4 nodes of 8). Needs the embedding cache of scripts/preprocess_flux.sh. Downloads, memory, time: docs/models.md.
#
#                         paper                            release    here
#   steps                 25                               16         16
#   noise level           0.3                              0.3        0.3
#   samples a prompt      12                               12         12
#   prompts an iteration  32                                          32 (16 or more: with 8 its users saw no learning)
#   pixels                                                 720        720
#   rewards               HPS-v2.1, CLIP (DFN5B H-14-378)  0.7 : 1.4  0.7 : 1.4; CLIP=models/DFN5B-CLIP-ViT-H-14-378 is the paper's
# For other rewards add --rewards NAME... --reward_weights X... at the end (docs/rewards.md);
# HPS and CLIP are not needed then.
#
#   MODEL=models/FLUX.1-dev EMBEDDINGS=runs/embeddings/flux HPS=models/HPS_v2.1_compressed.pt CLIP=models/clip-vit-large-patch14 bash scripts/train_flux.sh --output_dir runs/flux
#
# On each of 4 nodes also set NNODES=4, NODE_RANK and MASTER_ADDR. On one node add --lora_rank 32 --learning_rate 1e-4.
# SCRIPT=baselines/ddpo_flux.py and the like train by another method (baselines/README.md).
# GPUS is the number of processes on a node (8). On CPUs: DS_ACCELERATOR=cpu GPUS=2. Its process ID is the one to signal: it saves and stops.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

rewards=(--rewards "hpsv2=${HPS:-}" "clip=${CLIP:-}" --reward_weights 0.7 1.4)
! given --rewards "$@" || rewards=()
need MODEL EMBEDDINGS ${rewards:+HPS CLIP}
python "$repository/preprocess/check_model.py" "$MODEL" --family flux --use training
exec python "$repository/scripts/launch.py" "${rendezvous[@]}" --nproc_per_node "${GPUS:-8}" \
    "$repository/${SCRIPT:-train_grpo_flux.py}" --model "$MODEL" --embeddings "$EMBEDDINGS" \
    "${rewards[@]}" \
    --iterations 300 --prompts_per_iteration 32 --num_generations 12 --updates_per_iteration 4 \
    --height 720 --width 720 --sampling_steps 16 --shift 3 --noise_level 0.3 --timestep_fraction 0.6 --embedded_guidance 3.5 \
    --learning_rate 1e-5 --clip_range 1e-4 --ema_decay 0.995 \
    --zero_stage 2 --gradient_checkpointing --rollout_batch_size 3 --micro_batch_size 3 --checkpoint_every 50 "$@"
