#!/usr/bin/env bash
# Encode prompts and their reference images for SkyReels-V1-I2V on all GPUs of this machine, in bfloat16. From any folder:
#   MODEL=/path/to/SkyReels-V1-I2V PROMPTS=prompts.jsonl OUTPUT_DIR=data/skyreels_embeddings scripts/preprocess_skyreels.sh [flags of preprocess/embed_skyreels.py]
# A killed run continues when started again. GPUS limits the number of processes; DS_ACCELERATOR=cpu runs on CPUs. On several nodes: docs/clusters.md.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

need MODEL PROMPTS OUTPUT_DIR
if lacking=$(grep -cv -e '"prompt": *"FPS-24, ' -e '^[[:space:]]*$' "$PROMPTS" 2>/dev/null); then
    echo "warning: $lacking prompts in $PROMPTS do not begin with 'FPS-24, ', as those that SkyReels-V1 was trained on do: docs/prompts.md" >&2
fi
python "$repository/preprocess/check_model.py" "$MODEL" --family skyreels --use embedding
exec python "$repository/scripts/launch.py" "${rendezvous[@]}" --nproc_per_node "$GPUS" \
  "$repository/preprocess/embed_skyreels.py" \
  --model "$MODEL" \
  --prompts "$PROMPTS" \
  --output_dir "$OUTPUT_DIR" \
  --height 400 \
  --width 640 \
  --max_sequence_length 256 \
  --batch_size 16 \
  --shard_size 64 \
  --dtype bfloat16 \
  "$@"
