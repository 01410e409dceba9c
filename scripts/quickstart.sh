#!/usr/bin/env bash
# Trains the embedded shapes FLUX with GRPO on two CPU processes, from an empty machine to a picture of the gain, in under 15 minutes.
# Arguments go to train_grpo_flux.py (--seed 1, --iterations 50, ...); the run folder is runs/quickstart plus their letters, or RUN.
# Running it again goes on where it stopped. The last line of output is a JSON object with what was measured.
start=$SECONDS
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
cd "$repository"

run=${RUN:-runs/quickstart$(printf '%s' "$*" | tr -c 'a-zA-Z0-9.' _)}
processes=${PROCESSES:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

echo "== 1. cache the embeddings of the training prompts"
attend python preprocess/embed_flux.py --model shapes/models/flux --prompts shapes/prompts/train.txt --output_dir runs/embeddings/flux_shapes

echo "== 2. train"
train_start=$SECONDS
attend python scripts/launch.py --standalone --nproc_per_node "$processes" train_grpo_flux.py \
    --model shapes/models/flux --embeddings runs/embeddings/flux_shapes --output_dir "$run" \
    --rewards shapes shapes_strict --iterations 190 --prompts_per_iteration 8 --num_generations 16 --best_of_n 8 --updates_per_iteration 1 \
    --sampling_steps 8 --shift 3 --noise_level 2 --sde_window 0 4 --timestep_fraction 1 \
    --learning_rate 2e-4 --ema_decay 0.97 --lr_warmup_steps 5 --zero_stage 1 \
    --height 32 --width 32 --rollout_batch_size 64 --micro_batch_size 64 --checkpoint_every 60 --sample_every 60 "$@"
train_seconds=$((SECONDS - train_start))

echo "== 3. evaluate before and after, on prompts that training never asked for"
attend python scripts/launch.py --standalone --nproc_per_node "$processes" evaluate.py --model shapes/models/flux --checkpoints trained="$run/export" \
    --prompts shapes/prompts/heldout.txt --rewards shapes_strict shapes clip=shapes/models/clip aesthetic \
    --num_seeds 3 --images_per_prompt 24 --batch_size 64 --output_dir "$run/evaluation"

echo "== 4. one page about the run"
python -m fastvideo.report "$run"

cat <<END

Run folder: $run
  metrics.jsonl           one line an iteration        tensorboard/             tensorboard --logdir $run/tensorboard
  export/                 the trained transformer      evaluation/results.md    all scores, with intervals
  evaluation/rewards.png  reward curves, with the base model's noise band
  evaluation/samples.png  before and after, from the same noise
  report.html             all of it on one page: open it in a browser
END
python - "$run" "$train_seconds" "$((SECONDS - start))" <<'END'
import json, sys

run, train_seconds, total_seconds = sys.argv[1:]
results = json.load(open(f"{run}/evaluation/results.json"))
scores = {model: found["prompts"] for model, found in results["scores"].items()}
samples = results["benchmarks"]["prompts"]["samples"]
measured = {"run": run, "images": samples, "train_seconds": int(train_seconds), "total_seconds": int(total_seconds)}
for reward, base in scores["base"].items():
    measured[reward] = {"base": base["mean"], "base_seed_std": base.get("seed_std"), "trained": scores["trained"][reward]["mean"]}
print(json.dumps(measured))
END
