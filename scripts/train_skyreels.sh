#!/usr/bin/env bash
# SkyReels-V1-I2V image-to-video with the paper's settings: 32 prompts of 8 samples at 640 x 400, 53 frames, on 32 GPUs (4 nodes of 8). Needs the
# embedding cache of scripts/preprocess_skyreels.sh. Memory and batch sizes are estimates (docs/gpu.md: what we ran). The reward is
# VideoAlign's motion quality (docs/rewards.md: what to download); for others add --rewards NAME... at the end.
#
#   MODEL=models/SkyReels-V1-I2V EMBEDDINGS=runs/embeddings/skyreels VIDEOALIGN=models/VideoReward bash scripts/train_skyreels.sh --output_dir runs/skyreels
#
# On each of 4 nodes also set NNODES=4, NODE_RANK and MASTER_ADDR. On one node of 8 GPUs add
#   --prompts_per_iteration 8 --lora_rank 32 --learning_rate 1e-4
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

python "$repository/preprocess/check_model.py" "${MODEL:?set MODEL to the SkyReels folder}" --family skyreels --use training
torchrun "${rendezvous[@]}" --nproc_per_node "${GPUS:-8}" \
    "$repository/train_grpo_skyreels.py" --model "$MODEL" --embeddings "${EMBEDDINGS:?set EMBEDDINGS to the embedding cache}" \
    --rewards "videoalign.mq=${VIDEOALIGN:?set VIDEOALIGN to the VideoReward folder}" \
    --iterations 300 --prompts_per_iteration 32 --num_generations 8 --updates_per_iteration 1 \
    --height 400 --width 640 --num_frames 53 --sampling_steps 16 --shift 7 --noise_level 0.3 --timestep_fraction 0.6 \
    --guidance_scale 5 --embedded_guidance 1 --learning_rate 1e-5 --clip_range 1e-4 --ema_decay 0.995 --vae_tiling \
    --zero_stage 3 --gradient_checkpointing --rollout_batch_size 1 --micro_batch_size 1 --checkpoint_every 25 "$@"
