#!/usr/bin/env bash
# Encode a prompt file for Stable Diffusion v1.4 on all GPUs of this machine, in bfloat16. From any folder:
#   MODEL=/path/to/stable-diffusion-v1-4 PROMPTS=prompts.txt OUTPUT_DIR=data/sd_embeddings scripts/preprocess_sd.sh [flags of preprocess/embed_sd.py]
# A killed run continues when started again. GPUS limits the number of processes; DS_ACCELERATOR=cpu runs on CPUs. On several nodes: docs/clusters.md.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

need MODEL PROMPTS OUTPUT_DIR
python "$repository/preprocess/check_model.py" "$MODEL" --family sd --use embedding
exec python "$repository/scripts/launch.py" "${rendezvous[@]}" --nproc_per_node "$GPUS" \
  "$repository/preprocess/embed_sd.py" \
  --model "$MODEL" \
  --prompts "$PROMPTS" \
  --output_dir "$OUTPUT_DIR" \
  --batch_size 256 \
  --shard_size 2048 \
  --dtype bfloat16 \
  "$@"
