#!/usr/bin/env bash
# Encode prompts and their reference images for SkyReels-V1-I2V on all GPUs of this machine, in bfloat16. From any folder:
#   MODEL=/path/to/SkyReels-V1-I2V PROMPTS=prompts.jsonl OUTPUT_DIR=data/skyreels_embeddings scripts/preprocess_skyreels.sh [flags of preprocess/embed_skyreels.py]
# A killed run continues when started again. GPUS limits the number of processes. On several nodes: docs/clusters.md.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

python "$repository/preprocess/check_model.py" "${MODEL:?set MODEL to the SkyReels-V1-I2V folder}" --family skyreels --use embedding
torchrun "${rendezvous[@]}" --nproc_per_node "$GPUS" \
  "$repository/preprocess/embed_skyreels.py" \
  --model "$MODEL" \
  --prompts "${PROMPTS:?set PROMPTS to a .jsonl prompt file}" \
  --output_dir "${OUTPUT_DIR:?set OUTPUT_DIR to the folder of the cache}" \
  --height 400 \
  --width 640 \
  --max_sequence_length 256 \
  --batch_size 16 \
  --shard_size 64 \
  --dtype bfloat16 \
  "$@"
