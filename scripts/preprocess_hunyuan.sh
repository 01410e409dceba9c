#!/usr/bin/env bash
# Encode a prompt file for HunyuanVideo on all GPUs of this machine, in bfloat16. From any folder:
#   MODEL=/path/to/HunyuanVideo PROMPTS=prompts.txt OUTPUT_DIR=data/hunyuan_embeddings scripts/preprocess_hunyuan.sh [flags of preprocess/embed_hunyuan.py]
# A killed run continues when started again. GPUS limits the number of processes; DS_ACCELERATOR=cpu runs on CPUs. On several nodes: docs/clusters.md.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

need MODEL PROMPTS OUTPUT_DIR
python "$repository/preprocess/check_model.py" "$MODEL" --family hunyuan --use embedding
exec python "$repository/scripts/launch.py" "${rendezvous[@]}" --nproc_per_node "$GPUS" \
  "$repository/preprocess/embed_hunyuan.py" \
  --model "$MODEL" \
  --prompts "$PROMPTS" \
  --output_dir "$OUTPUT_DIR" \
  --max_sequence_length 256 \
  --batch_size 16 \
  --shard_size 64 \
  --dtype bfloat16 \
  "$@"
