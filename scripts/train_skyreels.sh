#!/usr/bin/env bash
# SkyReels-V1-I2V image-to-video at 640 x 400 on 32 GPUs (4 nodes of 8). Needs the embedding cache of scripts/preprocess_skyreels.sh, of prompts that
# begin with "FPS-24, ". Downloads, memory, time: docs/models.md.
#
#                         paper  release  here
#   steps                        16       16 (its author advises more than 30)
#   noise level           0.3    0.3      0.3
#   samples a prompt      12     8        8
#   prompts an iteration  32              32 (16 or more: with 8 its users saw no learning)
#   frames                       53       53
#   VideoAlign            MQ              MQ
# VideoAlign is shown 6 frames a second instead of its own 2, 14 of 53 instead of 4, for steadier training: the paper says more without a number, and these are the
# release's 14 (it stores clips of 24 a second at 8). For other rewards add --rewards NAME... at the end (docs/rewards.md); VIDEOALIGN is not needed then.
# An iteration takes about 23 minutes (an estimate): hence --checkpoint_every 5.
#
#   MODEL=models/SkyReels-V1-I2V EMBEDDINGS=runs/embeddings/skyreels VIDEOALIGN=models/VideoReward bash scripts/train_skyreels.sh --output_dir runs/skyreels
#
# On each of 4 nodes also set NNODES=4, NODE_RANK and MASTER_ADDR. On one node of 8 GPUs add
#   --prompts_per_iteration 16 --lora_rank 32 --learning_rate 1e-4
# Without LoRA 80 GB do from 16 GPUs on; on 8 add --zero_stage 3.
# GPUS is the number of processes on a node (8). On CPUs: DS_ACCELERATOR=cpu GPUS=2. Its process ID is the one to signal: it saves and stops.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

rewards=(--rewards "videoalign.mq=${VIDEOALIGN:-},fps=6")
! given --rewards "$@" || rewards=()
need MODEL EMBEDDINGS ${rewards:+VIDEOALIGN}
python "$repository/preprocess/check_model.py" "$MODEL" --family skyreels --use training
exec python "$repository/scripts/launch.py" "${rendezvous[@]}" --nproc_per_node "${GPUS:-8}" \
    "$repository/train_grpo_skyreels.py" --model "$MODEL" --embeddings "$EMBEDDINGS" \
    "${rewards[@]}" \
    --iterations 300 --prompts_per_iteration 32 --num_generations 8 --updates_per_iteration 1 \
    --height 400 --width 640 --num_frames 53 --sampling_steps 16 --shift 7 --noise_level 0.3 --timestep_fraction 0.6 \
    --guidance_scale 5 --embedded_guidance 1 --learning_rate 1e-5 --clip_range 1e-4 --ema_decay 0.995 --vae_tiling \
    --zero_stage 2 --gradient_checkpointing --rollout_batch_size 1 --micro_batch_size 1 --checkpoint_every 5 "$@"
