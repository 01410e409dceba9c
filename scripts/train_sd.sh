#!/usr/bin/env bash
# Stable Diffusion v1.4 at 512 px on 8 GPUs (one node). Needs the embedding cache of scripts/preprocess_sd.sh. Downloads, memory, time: docs/models.md.
#
#                         paper                            release    here
#   steps                 50                               50         50
#   noise level           0.3                              1.0        1.0 (DDIM's eta)
#   samples a prompt      12                                          12
#   prompts an iteration  32                                          32 (16 or more: with 8 its users saw no learning)
#   rewards               HPS-v2.1, CLIP (DFN5B H-14-378)  0.7 : 1.4  0.7 : 1.4; CLIP=models/DFN5B-CLIP-ViT-H-14-378 is the paper's
# For other rewards add --rewards NAME... --reward_weights X... at the end (docs/rewards.md);
# HPS and CLIP are not needed then.
#
#   MODEL=models/stable-diffusion-v1-4 EMBEDDINGS=runs/embeddings/sd HPS=models/HPS_v2.1_compressed.pt CLIP=models/clip-vit-large-patch14 bash scripts/train_sd.sh --output_dir runs/sd
#
# On fewer or smaller GPUs set GPUS, and add --lora_rank 32 --learning_rate 1e-4.
# SCRIPT=baselines/ddpo_sd.py and the like train by another method (baselines/README.md).
# GPUS is the number of processes on a node (8). On CPUs: DS_ACCELERATOR=cpu GPUS=2. Its process ID is the one to signal: it saves and stops.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

rewards=(--rewards "hpsv2=${HPS:-}" "clip=${CLIP:-}" --reward_weights 0.7 1.4)
! given --rewards "$@" || rewards=()
need MODEL EMBEDDINGS ${rewards:+HPS CLIP}
python "$repository/preprocess/check_model.py" "$MODEL" --family sd --use training
exec python "$repository/scripts/launch.py" "${rendezvous[@]}" --nproc_per_node "${GPUS:-8}" \
    "$repository/${SCRIPT:-train_grpo_sd.py}" --model "$MODEL" --embeddings "$EMBEDDINGS" \
    "${rewards[@]}" \
    --iterations 300 --prompts_per_iteration 32 --num_generations 12 --updates_per_iteration 1 \
    --height 512 --width 512 --sampling_steps 50 --noise_level 1.0 --guidance_scale 5 \
    --learning_rate 1e-5 --ema_decay 0.995 \
    --zero_stage 1 --rollout_batch_size 8 --micro_batch_size 8 --checkpoint_every 50 "$@"
