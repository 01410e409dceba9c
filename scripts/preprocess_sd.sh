#!/usr/bin/env bash
# Encode a prompt file for Stable Diffusion v1.4 on all GPUs of this machine, in bfloat16. From any folder:
#   MODEL=/path/to/stable-diffusion-v1-4 PROMPTS=prompts.txt OUTPUT_DIR=data/sd_embeddings scripts/preprocess_sd.sh [flags of preprocess/embed_sd.py]
# A killed run continues when started again. GPUS limits the number of processes. On several nodes: docs/clusters.md.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

python "$repository/preprocess/check_model.py" "${MODEL:?set MODEL to the stable-diffusion-v1-4 folder}" --family sd --use embedding
torchrun "${rendezvous[@]}" --nproc_per_node "$GPUS" \
  "$repository/preprocess/embed_sd.py" \
  --model "$MODEL" \
  --prompts "${PROMPTS:?set PROMPTS to a .txt or .jsonl prompt file}" \
  --output_dir "${OUTPUT_DIR:?set OUTPUT_DIR to the folder of the cache}" \
  --batch_size 256 \
  --shard_size 2048 \
  --dtype bfloat16 \
  "$@"
