#!/usr/bin/env bash
# Encode a prompt file for FLUX.1-dev on all GPUs of this machine, in bfloat16. From any folder:
#   MODEL=/path/to/FLUX.1-dev PROMPTS=prompts.txt OUTPUT_DIR=data/flux_embeddings scripts/preprocess_flux.sh [flags of preprocess/embed_flux.py]
# A killed run continues when started again. GPUS limits the number of processes; DS_ACCELERATOR=cpu runs on CPUs. On several nodes: docs/clusters.md.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

need MODEL PROMPTS OUTPUT_DIR
python "$repository/preprocess/check_model.py" "$MODEL" --family flux --use embedding
exec python "$repository/scripts/launch.py" "${rendezvous[@]}" --nproc_per_node "$GPUS" \
  "$repository/preprocess/embed_flux.py" \
  --model "$MODEL" \
  --prompts "$PROMPTS" \
  --output_dir "$OUTPUT_DIR" \
  --max_sequence_length 512 \
  --batch_size 32 \
  --shard_size 64 \
  --dtype bfloat16 \
  "$@"
