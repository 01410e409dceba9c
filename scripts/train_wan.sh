#!/usr/bin/env bash
# Wan 2.1 text-to-video, 1.3B, at 832 x 480 on 8 GPUs (one node). The paper and its release have no Wan: here are the paper's steps for video, with Wan's
# shift and guidance, and 16 prompts an iteration, since with 8 users of the release saw no learning. Needs the embedding cache of
# scripts/preprocess_wan.sh. Downloads, memory, time: docs/models.md. The rewards are VideoAlign's visual and motion quality at Wan's 16 frames a
# second, of which it is shown 6 as for HunyuanVideo, for steadier training; for others add --rewards NAME... at the end (docs/rewards.md);
# VIDEOALIGN is not needed then.
#
#   MODEL=models/Wan2.1-T2V-1.3B-Diffusers EMBEDDINGS=runs/embeddings/wan VIDEOALIGN=models/VideoReward bash scripts/train_wan.sh --output_dir runs/wan
#
# Cheaper: --lora_rank 32 --learning_rate 1e-4, fewer frames (--num_frames 33), --guidance_scale 1. Wan 2.1's own length is --num_frames 81.
# On each of several nodes also set NNODES, NODE_RANK and MASTER_ADDR, and raise --prompts_per_iteration.
# GPUS is the number of processes on a node (8). On CPUs: DS_ACCELERATOR=cpu GPUS=2. Its process ID is the one to signal: it saves and stops.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

rewards=(--rewards "videoalign.vq=${VIDEOALIGN:-},clip_fps=16,fps=6" "videoalign.mq=${VIDEOALIGN:-},clip_fps=16,fps=6")
! given --rewards "$@" || rewards=()
need MODEL EMBEDDINGS ${rewards:+VIDEOALIGN}
python "$repository/preprocess/check_model.py" "$MODEL" --family wan --use training
exec python "$repository/scripts/launch.py" "${rendezvous[@]}" --nproc_per_node "${GPUS:-8}" \
    "$repository/train_grpo_wan.py" --model "$MODEL" --embeddings "$EMBEDDINGS" \
    "${rewards[@]}" \
    --iterations 300 --prompts_per_iteration 16 --num_generations 12 --updates_per_iteration 1 \
    --height 480 --width 832 --num_frames 53 --sampling_steps 16 --shift 5 --noise_level 0.3 --timestep_fraction 0.6 \
    --guidance_scale 5 --learning_rate 1e-5 --clip_range 1e-4 --ema_decay 0.995 --vae_tiling \
    --zero_stage 2 --gradient_checkpointing --rollout_batch_size 1 --micro_batch_size 1 --checkpoint_every 25 "$@"
