#!/usr/bin/env bash
# Runs a script on all nodes of a SLURM job: training, preprocess/*.py, evaluate.py, or scripts/train_*.sh and scripts/preprocess_*.sh with
# their settings. From the repository's root, on a file system that all nodes share:
#
#   sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh train_grpo_flux.py --output_dir runs/flux --model ...
#   MODEL=... EMBEDDINGS=... HPS=... CLIP=... sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh scripts/train_flux.sh --output_dir runs/flux
#
# Preempted, requeued, or near the time limit (an iteration and five minutes before), the run saves, and the job goes on by itself when it is
# started again. What crashes is started again within the job, but not forever: after MAX_TRIES starts (3) in a row in which no new
# iteration was finished the job ends. A mistake in the command ends it at once. docs/clusters.md tells it all.
#
# sbatch's own flags override those below. Further settings, as environment variables: PROCESSES, a node (its GPUs; 1 on CPUs), LOGS
# (logs/JOB), MAX_TRIES, MASTER_ADDR, MASTER_PORT, CONTAINER (what srun is given before the command).
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@1800

set -euo pipefail

say() {
    echo "$(date '+%F %T') slurm.sh: $*"
}

fail() {
    echo "error: $*" >&2
    exit 2
}

requeue() { # to be started again by SLURM
    trap '' TERM # which this brings
    say "$1: the job is queued again"
    scontrol requeue "$SLURM_JOB_ID" || fail "SLURM does not queue job $SLURM_JOB_ID again: submit it again, and it goes on"
    exit 0
}

seconds_left() { # 0 if unknown
    local end
    end=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'EndTime=[^ ]*') && end=$(date -d "${end#*=}" +%s) || end=0
    echo $((end > 0 ? end - $(date +%s) : 0))
}

stop_seconds() { # that saving and stopping may take: the longest of the last iterations, and five minutes
    local seconds
    seconds=$(tail -n 10 "$output_dir/metrics.jsonl" 2>/dev/null | grep -o '"time/iteration_s": [0-9]*' | cut -d ' ' -f 2 | sort -n | tail -n 1) || true
    echo $((300 + ${seconds:-0}))
}

warned='' waiter='' waited=''
on_warning() { # only this shell gets --signal=B:USR1: pass it on, but not before it must be. A second one, or one by hand long before, at once
    local left needed
    left=$(seconds_left) needed=$(stop_seconds)
    if [ -z "$waited" ] && [ "$left" -gt "$needed" ] && [ "$left" -le 1900 ]; then
        say "SIGUSR1, $left s are left: the run is asked to save and stop $needed s before the time limit"
        (sleep $((left - needed)) && kill -USR1 $$) &
        waiter=$! waited=1
        disown
        return 0 # a bare one, in a trap, gives the status of what the signal interrupted, which ends this shell
    fi
    waited=1
    say "SIGUSR1, the time limit is near: the run is asked to save and stop"
    warned=1
    scancel --signal=USR1 "$SLURM_JOB_ID"
}

ended='' tries=''
on_end() { # SLURM has sent SIGTERM to all processes, and sends SIGKILL after its KillWait
    ended=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'Reason=[A-Za-z]*' || echo unknown)
    say "SLURM ends this start (SIGTERM, $ended)"
    if [ "$ended" = Reason=TimeLimit ]; then
        scontrol requeue "$SLURM_JOB_ID" || true
    elif [ -n "$tries" ]; then
        echo "$tries $best" >"$LOGS/tries" # not the run's fault: this start does not count
    fi
}

trap on_warning USR1
trap on_end TERM

cd "$SLURM_SUBMIT_DIR"
[ -f scripts/launch.py ] || fail "$PWD is not the repository's root: submit from there"
[ -f "${1:-}" ] || fail "${1:-nothing} is no script: sbatch scripts/slurm.sh train_grpo_flux.py --output_dir ..."
if [ -z "${CONTAINER:=}" ]; then
    bash scripts/setup.sh requirements.txt # once, not on all nodes at the same time
fi

# The processes, and how they meet.
gpus=${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU || true)}
if [ "$gpus" -gt 0 ]; then
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
elif [ "${DS_ACCELERATOR:-}" != cpu ] && compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
    fail "$(hostname) has GPUs, but this job was given none: sbatch --gpus-per-node=8, or DS_ACCELERATOR=cpu to run on the CPU"
else
    export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
    gpus=1
fi
export NNODES=$SLURM_JOB_NUM_NODES GPUS=${PROCESSES:-$gpus} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
export MASTER_ADDR LOGS=${LOGS:-$PWD/logs/${job:-$SLURM_JOB_ID}} FASTVIDEO_ERROR_FILE
FASTVIDEO_ERROR_FILE=$LOGS/error
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$LOGS/nccl_} # and the rank: the flight recorder (scripts/setup.sh)
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > GPUS ? cpus / GPUS : 1))}
mkdir -p "$LOGS"

# What a node runs. The scripts of scripts/ call launch.py themselves.
# shellcheck disable=SC2016
node='export NODE_RANK=$SLURM_NODEID LAUNCH_LOGS=$LOGS
source scripts/setup.sh requirements.txt
case $1 in
*.sh) exec bash "$@" ;;
*) exec python scripts/launch.py "${rendezvous[@]}" --nproc_per_node "$GPUS" "$@" ;;
esac'

output_dir=${OUTPUT_DIR:-} scores_dir=
previous=
for word in "$@"; do
    case $previous/$word in
    */--output_dir=*) output_dir=${word#*=} ;;
    --output_dir/*) output_dir=$word ;;
    */--scores_dir=*) scores_dir=${word#*=} ;;
    --scores_dir/*) scores_dir=$word ;;
    esac
    previous=$word
done
scores_dir=${scores_dir:-$output_dir/scores}

progress() { # how many iterations have been finished, or how many files of embeddings or pictures there are and scores of evaluate.py
    {
        cat "$output_dir/metrics.jsonl" || {
            find "$output_dir" -maxdepth 2 \( -name 'shard-*' -o -name '*_*.png' \) || true
            cat "$scores_dir"/*/*.jsonl || true
        }
    } 2>/dev/null | wc -l
}

rank=0 code=0
read_failure() { # which rank failed first, and how
    if compgen -G "$LOGS/failed.*" >/dev/null; then
        # What SIGTERM ended comes last: srun sends it to the others when one has failed, perhaps within the same second.
        read -r _ _ rank code < <(awk '{ print ($3 == 138 || $3 == 143), $0 }' "$LOGS"/failed.* | sort -n -k1,1 -k2,2 | head -n 1)
    fi
}

tries=0 best=$(progress)
if [ -f "$LOGS/tries" ]; then
    read -r tries best <"$LOGS/tries"
fi
touch "$LOGS/rank_0.log"
(trap '' TERM && exec tail -n 0 -F "$LOGS/rank_0.log" 2>/dev/null) &
tail=$!
disown
trap 'sleep 1; kill -KILL $tail $waiter 2>/dev/null || true' EXIT # it may be a second late

while true; do
    done_before=$(progress)
    if [ "$done_before" -gt "$best" ]; then
        tries=0 best=$done_before
    fi
    if [ "$tries" -ge "${MAX_TRIES:-3}" ]; then
        read_failure
        say "$tries starts in a row have finished no new iteration: giving up. The last lines of rank $rank, which failed first (exit code $code):"
        tail -n 40 "$LOGS/rank_$rank.log"
        [ "$code" -ne 138 ] || say "it was the warning of the time limit that ended them: more --time, or a later --signal=B:USR1@SECONDS"
        rm "$LOGS/tries" # who queues it again has mended something
        exit 1
    fi
    echo "$((tries + 1)) $best" >"$LOGS/tries"
    [ -z "$ended" ] || exit 143
    [ -z "$warned" ] || requeue "no time is left"
    rm -f "$LOGS"/failed.* "$FASTVIDEO_ERROR_FILE"
    say "start on $SLURM_JOB_NODELIST, $NNODES x $GPUS processes, logs in $LOGS: $*"
    # shellcheck disable=SC2086
    srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \
        --kill-on-bad-exit=1 $CONTAINER bash -c "$node" bash "$@" &
    step=$!
    status=128
    while [ "$status" -ge 128 ] && kill -0 "$step" 2>/dev/null; do # a trap interrupts `wait`
        status=0
        wait "$step" || status=$?
    done
    [ -z "$ended" ] || exit 143
    [ "$status" -ne 0 ] || exit 0
    [ -z "$warned" ] || requeue "stopped near the time limit"

    code=$status
    read_failure
    case $code in
    2)
        say "not started again, which would end the same way: $(cat "$FASTVIDEO_ERROR_FILE" 2>/dev/null || tail -n 40 "$LOGS/rank_$rank.log")"
        exit 2
        ;;
    138 | 143) # SIGUSR1, SIGTERM, but SLURM has not ended the job: a preemption with a grace time
        echo "$tries $best" >"$LOGS/tries"
        requeue "stopped by a signal"
        ;;
    esac
    say "rank $rank failed with exit code $code"
    tries=$((tries + 1))
done
