# What the experiments of this folder share. Each file is a figure or table of the paper: its arms, runs that differ in what the figure compares.
#
#   bash scripts/paper/figure_4b.sh           trains its arms on the tiny models and evaluates them; goes on where it was stopped
#   bash scripts/paper/figure_4b.sh --full    prints the commands for the real models instead, at the paper's numbers of GPUs
#   bash scripts/paper/all.sh [--full]        all experiments; an arm that several have is trained once
#   python scripts/paper/summary.py           figures and tables of what is there so far
#
# SEEDS ("0 1 2"), of training; JOBS at a time (processors); RUNS, a folder (runs/paper; runs/paper_full for the real models): SETTING/ARM_SEED,
# logs/, evaluation/SETTING/, summary/.
# To try it: RUNS=/tmp/try TRAIN="--iterations 2" EVALUATE="--num_seeds 1 --images_per_prompt 1", flags for all arms.
[[ ! -v COLLECTING ]] || return 0 # all.sh has it already
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" requirements.txt
cd "$repository"
export OMP_NUM_THREADS=1 DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
seeds=${SEEDS:-0 1 2}
REAL_RUNS=${RUNS:-runs/paper_full} RUNS=${RUNS:-runs/paper}
declare -A trainings=() settings=() people=() # of each run its command; those that occur; of a setting whose pictures people see
order=() printed=()
questions=(--benchmarks geneval=shapes/prompts/geneval.jsonl,detector=shapes)
# Who judges the real models. Each picture or clip is sampled once for all of a line's rewards.
of_pictures=(--prompts prompts/hpd/heldout.txt --rewards clip=models/DFN5B-CLIP-ViT-H-14-378 pickscore=models/PickScore_v1 --num_seeds 1
    --benchmarks hpsv2=data/HPDv2_benchmark/benchmark,weights=models/HPS_v2.1_compressed.pt
    geneval=data/geneval/prompts/evaluation_metadata.jsonl,detector=models/mask2former,side=800,clip=models/clip-vit-large-patch14)
of_clips=(--num_seeds 1 --vae_tiling --rewards videoalign.{vq,mq,ta}=models/VideoReward,norm=0)

# The last transitions of a tiny model with guidance have gradients of noise: with a random 60 % of them its reward falls (docs/results.md).
setting() { # NAME: a model and its task. The tiny one: its prompts, flags, who judges, pictures of a held-out prompt; then the paper's own
    tiny=(--prompts_per_iteration 8 --num_generations 12 --sampling_steps 8 --ema_decay 0.95 --lr_warmup_steps 5
        --zero_stage 1 --height 32 --width 32 --rollout_batch_size 128 --micro_batch_size 64 --checkpoint_every 20 --keep_checkpoints 1)
    flow=(--shift 3 --noise_level 0.7 --updates_per_iteration 4 --learning_rate 1e-4)
    family=$1 prompts=train.txt heldout=heldout.txt judges=(aesthetic clip=shapes/models/clip shapes shapes_strict) pictures=16
    full=() size=() also=() transitions=()
    case $1 in
    sd)
        tiny+=(--noise_level 1 --guidance_scale 2 --updates_per_iteration 1 --learning_rate 1e-4 --iterations 32)
        transitions=(--timestep_selection first --timestep_fraction 0.6)
        also=("${questions[@]}") nodes=1 folder=stable-diffusion-v1-4 judges_in_full=("${of_pictures[@]}")
        ;;
    flux)
        tiny+=("${flow[@]}" --learning_rate 2e-4 --iterations 50)
        also=("${questions[@]}") nodes=4 folder=FLUX.1-dev judges_in_full=("${of_pictures[@]}")
        ;;
    hunyuan_image)
        family=hunyuan
        tiny+=("${flow[@]}" --num_frames 1 --iterations 40)
        nodes=4 folder=HunyuanVideo judges_in_full=("${of_pictures[@]}")
        full=(--num_frames 1 --height 720 --width 720 --sp_size 1 --num_generations 12 --best_of_n 0)
        ;;
    hunyuan)
        prompts=video_train.txt heldout=video_heldout.txt judges=(visual motion shapes shapes_strict) pictures=8
        tiny+=("${flow[@]}" --num_frames 9 --learning_rate 2e-4 --iterations 40)
        nodes=8 folder=HunyuanVideo
        judges_in_full=(--prompts prompts/vidprom/heldout.txt "${of_clips[@]}" "http.visionreward=http://${REWARD_SERVER:-127.0.0.1}:8500,send=uint8")
        ;;
    skyreels)
        prompts=i2v_train.jsonl heldout=i2v_heldout.jsonl judges=(motion fidelity visual shapes) pictures=8 size=(--height 32 --width 32)
        tiny+=("${flow[@]}" --num_frames 9 --guidance_scale 2 --updates_per_iteration 1 --learning_rate 2e-4 --iterations 30)
        transitions=(--timestep_selection first --timestep_fraction 0.6)
        nodes=4 folder=SkyReels-V1-I2V judges_in_full=(--prompts prompts/consisid_heldout/prompts.jsonl "${of_clips[@]}")
        ;;
    *) fail "unknown setting '$1'" ;;
    esac
}

rewards_of() { # WORDS: sets `tiny_rewards` and `real_rewards`, what stands for the paper's rewards here and the paper's own
    tiny_rewards=() real_rewards=()
    local word
    for word in $1; do
        case $word in
        taste) tiny_rewards+=(aesthetic) real_rewards+=(hpsv2=models/HPS_v2.1_compressed.pt) ;;
        taste@) tiny_rewards+=(aesthetic.binary@0.65) real_rewards+=(hpsv2.binary=models/HPS_v2.1_compressed.pt@0.28) ;;
        caption) tiny_rewards+=(clip=shapes/models/clip) real_rewards+=(clip=models/DFN5B-CLIP-ViT-H-14-378) ;;
        caption@) tiny_rewards+=(clip.binary=shapes/models/clip@0.75) real_rewards+=(clip.binary=models/DFN5B-CLIP-ViT-H-14-378@0.39) ;;
        visual) tiny_rewards+=(visual) real_rewards+=(videoalign.vq=models/VideoReward,fps=6) ;;
        motion) tiny_rewards+=(motion) real_rewards+=(videoalign.mq=models/VideoReward,fps=6) ;;
        esac
    done
    [[ $1 != "taste caption" ]] || { tiny_rewards+=(--reward_weights 0.7 1.4) real_rewards+=(--reward_weights 0.7 1.4); }
}

arm() { # SETTING NAME REWARDS [FLAGS...], of both sizes; before it TINY="FLAGS" REAL="FLAGS" of one, SCRIPT=baselines/... for another method
    local place=$1 name=$2 script method seed run command judge held_out=()
    setting "$place"
    rewards_of "$3"
    script=${SCRIPT:-train_grpo_$family.py}
    [[ $script == */refl_* || $script == */dpo_* ]] || tiny+=("${transitions[@]}") # which do not train along the trajectory
    for judge in "${judges[@]}"; do # each is trained on or watched
        [[ " ${tiny_rewards[*]} " == *" ${judge%%=*}"[\ =]* ]] || held_out+=("$judge")
    done
    for seed in $seeds; do
        run=$place/${name}_$seed
        # shellcheck disable=SC2086
        command=$(words python "$script" --model "shapes/models/$family" --embeddings "$RUNS/embeddings/$place" --output_dir "$RUNS/$run" \
            --seed "$seed" --rewards "${tiny_rewards[@]}" --held_out_rewards "${held_out[@]}" "${tiny[@]}" ${TINY:-} "${@:4}" ${TRAIN:-})
        if [[ -v trainings[$run] ]]; then # it is an arm of an earlier experiment too
            [[ ${trainings[$run]} == "$command" ]] || fail "two arms are called $run: ${trainings[$run]}and $command"
            continue
        fi
        order+=("$run") trainings[$run]=$command settings[$place]=1
        method=''
        [[ ! -v SCRIPT ]] || method="SCRIPT=$SCRIPT "
        # shellcheck disable=SC2086
        printed+=("${method}MODEL=models/$folder EMBEDDINGS=runs/embeddings/$place sbatch --nodes=$nodes --gpus-per-node=8 scripts/slurm.sh $(
            words "scripts/train_$family.sh" --output_dir "$REAL_RUNS/$run" --seed "$seed" --rewards "${real_rewards[@]}" "${full[@]}" ${REAL:-} "${@:4}"
        )")
    done
}

pairs() { # SETTING ARM NUMBER: pairs of pictures of the base model and of the first seed's run, for people
    people[$1]="${2}_${seeds%% *} $3"
}

words() { # as one line that the shell reads as the same words
    printf '%q ' "$@"
}

finished() { # SETTING FOLDER: sets `exports`, of the runs of SEEDS in it, without those of grids; all that are there, of other experiments too
    local path seed
    exports=()
    for path in "$2/$1"/*/export; do
        seed=${path%/export} seed=${seed##*_}
        [[ ! -d $path || $path == */grid_* || " $seeds " != *" $seed "* ]] || exports+=("$path")
    done
}

evaluation() { # SETTING FOLDER CHECKPOINTS [FLAGS]: a line of jobs
    setting "$1"
    # shellcheck disable=SC2086
    echo "evaluate_$2 $(words python evaluate.py --model "shapes/models/$family" --output_dir "$RUNS/evaluation/$2" --prompts "shapes/prompts/$heldout" \
        --rewards "${judges[@]}" --num_seeds 3 --images_per_prompt "$pictures" --batch_size 128 "${also[@]}" ${EVALUATE:-} --checkpoints "${@:3}")"
}

print_in_full() { # the commands, in the order in which they can be run
    local place run number exports
    echo "# 1. What docs/results.md says under \"In full\"."
    echo "# 2. Training: all of these may run at once."
    printf '%s\n' "${printed[@]}"
    echo "# 3. Evaluation, when all of a model's runs are finished; it goes on where a time limit stopped it."
    for place in "${!settings[@]}"; do
        setting "$place"
        exports=()
        for run in "${order[@]}"; do
            [[ $run != "$place"/* || $run == */grid_* ]] || exports+=("$REAL_RUNS/$run/export")
        done
        echo "sbatch --gpus-per-node=8 scripts/slurm.sh evaluate.py --model models/$folder ${judges_in_full[*]}" \
            "--output_dir $REAL_RUNS/evaluation/$place --checkpoints ${exports[*]}"
    done
    [ ${#people[@]} = 0 ] || echo "# 4. Pairs for people, after that: from the same scores."
    for place in "${!people[@]}"; do
        setting "$place"
        read -r run number <<<"${people[$place]}"
        echo "sbatch --gpus-per-node=8 scripts/slurm.sh evaluate.py --model models/$folder ${judges_in_full[*]} --human_pairs $number" \
            "--output_dir $REAL_RUNS/evaluation/people_$place --scores_dir $REAL_RUNS/evaluation/$place/scores --checkpoints $REAL_RUNS/$place/$run/export"
    done
}

run_jobs() { # DOING: those of $RUNS/jobs; on after a failure, not after a signal
    attend python scripts/paper/run_jobs.py "$RUNS" "$1" || code=$?
    [ "$code" -lt 128 ] || exit "$code"
}

run_arms() { # [--full]: the last line of each experiment; for all.sh, which has more to come, nothing
    [[ ! -v COLLECTING ]] || return 0
    local place run number exports code=0
    if [[ ${1:-} == --full ]]; then
        print_in_full
        return
    fi
    mkdir -p "$RUNS"
    for place in "${!settings[@]}"; do
        setting "$place"
        echo "embed_$place $(words python "preprocess/embed_$family.py" --model "shapes/models/$family" --prompts "shapes/prompts/$prompts" \
            --output_dir "$RUNS/embeddings/$place" "${size[@]}")"
    done >"$RUNS/jobs"
    run_jobs embedding
    for run in "${order[@]}"; do
        echo "$run ${trainings[$run]}"
    done >"$RUNS/jobs"
    run_jobs training
    for place in "${!settings[@]}"; do
        finished "$place" "$RUNS"
        [ ${#exports[@]} = 0 ] || evaluation "$place" "$place" "${exports[@]}"
    done >"$RUNS/jobs"
    run_jobs evaluating
    for place in "${!people[@]}"; do
        read -r run number <<<"${people[$place]}"
        evaluation "$place" "people_$place" "$RUNS/$place/$run/export" --scores_dir "$RUNS/evaluation/$place/scores" --human_pairs "$number"
    done >"$RUNS/jobs"
    run_jobs pairs
    python scripts/paper/summary.py --runs "$RUNS" --show "$(basename "$0" .sh)"
    exit "$code"
}
