#!/usr/bin/env bash
# HunyuanVideo text-to-video on 64 GPUs (8 nodes of 8); two share each sample (--sp_size 2). Needs the embedding cache of
# scripts/preprocess_hunyuan.sh. Downloads, memory, time: docs/models.md.
#
#                         paper         release               here
#   steps                 25            16                    16
#   noise level           0.3           0.25                  0.25
#   samples a prompt      12            24, best and worst 4  24, best and worst 4
#   prompts an iteration  32                                  32 (16 or more: with 8 its users saw no learning)
#   frames                              53                    53
#   VideoAlign            VQ, MQ apart                        VQ + MQ
# VideoAlign is shown 6 frames a second instead of its own 2, 14 of 53 instead of 4, for steadier training: the paper says more without a number, and these are the
# release's 14 (it stores clips of 24 a second at 8). For other rewards add --rewards NAME... at the end (docs/rewards.md); VIDEOALIGN is not needed then.
#
#   MODEL=models/HunyuanVideo EMBEDDINGS=runs/embeddings/hunyuan VIDEOALIGN=models/VideoReward bash scripts/train_hunyuan.sh --output_dir runs/hunyuan
#
# On each of 8 nodes also set NNODES=8, NODE_RANK and MASTER_ADDR. On one node of 8 GPUs add
#   --prompts_per_iteration 16 --num_generations 12 --best_of_n 0 --lora_rank 32 --learning_rate 1e-4
# Without LoRA 80 GB do from 16 GPUs on; on 8 add --zero_stage 3 --no-gather_for_rollout.
# Text-to-image, with rewards for pictures: --num_frames 1 --height 720 --width 720 --rewards hpsv2=FILE clip=FOLDER --reward_weights 0.7 1.4
# GPUS is the number of processes on a node (8). On CPUs: DS_ACCELERATOR=cpu GPUS=2. Its process ID is the one to signal: it saves and stops.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

rewards=(--rewards "videoalign.vq=${VIDEOALIGN:-},fps=6" "videoalign.mq=${VIDEOALIGN:-},fps=6")
! given --rewards "$@" || rewards=()
need MODEL EMBEDDINGS ${rewards:+VIDEOALIGN}
python "$repository/preprocess/check_model.py" "$MODEL" --family hunyuan --use training
exec python "$repository/scripts/launch.py" "${rendezvous[@]}" --nproc_per_node "${GPUS:-8}" \
    "$repository/train_grpo_hunyuan.py" --model "$MODEL" --embeddings "$EMBEDDINGS" \
    "${rewards[@]}" \
    --iterations 300 --prompts_per_iteration 32 --num_generations 24 --best_of_n 8 --updates_per_iteration 4 \
    --height 480 --width 480 --num_frames 53 --sampling_steps 16 --shift 5 --noise_level 0.25 --timestep_fraction 0.6 --embedded_guidance 6.018 \
    --learning_rate 1e-5 --clip_range 1e-4 --ema_decay 0.995 --vae_tiling \
    --zero_stage 2 --sp_size 2 --gradient_checkpointing --rollout_batch_size 1 --micro_batch_size 1 --checkpoint_every 10 "$@"
