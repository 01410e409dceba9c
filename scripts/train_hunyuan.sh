#!/usr/bin/env bash
# HunyuanVideo text-to-video with the paper's settings: 480 x 480, 53 frames, 64 GPUs (8 nodes of 8); best and worst 4 of 24 samples, as
# released; two GPUs share each sample (--sp_size 2), and have one of the 32 prompts. Needs the embedding cache of
# scripts/preprocess_hunyuan.sh. Memory and batch sizes are estimates (docs/gpu.md: what we ran). The rewards are
# VideoAlign's visual and motion quality (docs/rewards.md: what to download); for others add --rewards NAME... at the end.
#
#   MODEL=models/HunyuanVideo EMBEDDINGS=runs/embeddings/hunyuan VIDEOALIGN=models/VideoReward bash scripts/train_hunyuan.sh --output_dir runs/hunyuan
#
# On each of 8 nodes also set NNODES=8, NODE_RANK and MASTER_ADDR. On one node of 8 GPUs add
#   --prompts_per_iteration 8 --num_generations 12 --best_of_n 0 --lora_rank 32 --learning_rate 1e-4
# Text-to-image, with rewards for pictures: --num_frames 1 --height 720 --width 720 --rewards hpsv2=FILE clip=FOLDER --reward_weights 0.7 1.4
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

python "$repository/preprocess/check_model.py" "${MODEL:?set MODEL to the HunyuanVideo folder}" --family hunyuan --use training
torchrun "${rendezvous[@]}" --nproc_per_node "${GPUS:-8}" \
    "$repository/train_grpo_hunyuan.py" --model "$MODEL" --embeddings "${EMBEDDINGS:?set EMBEDDINGS to the embedding cache}" \
    --rewards "videoalign.vq=${VIDEOALIGN:?set VIDEOALIGN to the VideoReward folder}" "videoalign.mq=$VIDEOALIGN" \
    --iterations 300 --prompts_per_iteration 32 --num_generations 24 --best_of_n 8 --updates_per_iteration 4 \
    --height 480 --width 480 --num_frames 53 --sampling_steps 16 --shift 5 --noise_level 0.25 --timestep_fraction 0.6 --embedded_guidance 6.018 \
    --learning_rate 1e-5 --clip_range 1e-4 --ema_decay 0.995 --vae_tiling \
    --zero_stage 3 --sp_size 2 --gradient_checkpointing --rollout_batch_size 1 --micro_batch_size 1 --checkpoint_every 25 "$@"
