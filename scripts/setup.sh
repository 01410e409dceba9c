# Makes the repository's .venv if it is missing and installs a requirements file into it: bash scripts/setup.sh requirements.txt
# The other scripts source it, which also puts .venv on PATH and sets `repository`; the working directory stays.
# PYTHON chooses the interpreter. A requirements file is installed again only when it or the packages' pins change.

set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3.11 python3 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

install_requirements() { # FILE [OPTIONS OF PIP...]
    local requirements="$repository/$1" venv="$repository/.venv" stamp="$repository/.venv/installed-$1" python lock
    installed() { [ -f "$stamp" ] && cat "$repository/requirements.txt" "$requirements" | cmp -s - "$stamp"; }
    if installed; then
        return
    fi
    exec {lock}>"$repository/.venv.lock" # several may start at once
    flock "$lock"
    if installed; then
        exec {lock}>&-
        return
    fi
    command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
        fail "no C compiler found (cc, gcc or clang), which DeepSpeed needs to build its CPU optimizer: install one, for example build-essential"
    if [ ! -x "$venv/bin/python" ]; then
        python=$(find_python) || fail "Python 3.11 or 3.12 with the venv module is needed: install it, or name it as PYTHON=/path/to/python3.12"
        echo "making $venv with $("$python" --version)"
        "$python" -m venv "$venv"
    fi
    echo "installing $1 into $venv (a few minutes the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}" -r "$requirements"
    cat "$repository/requirements.txt" "$requirements" >"$stamp"
    exec {lock}>&-
}

install_requirements "$1"
if [ "$1" = requirements-dev.txt ]; then # cannot include this one, which is installed in another way
    install_requirements requirements-ocr.txt --no-deps
fi
export PATH="$repository/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error

# A signal is for the training processes, which save and stop: torchrun passes it on, and waits half an hour for them, not 30 seconds. One that
# is ignored, as nohup has SIGHUP, stays so.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGUSR2 PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-1800}
[ -n "$(trap -p HUP)" ] || PET_SIGNALS_TO_HANDLE+=,SIGHUP
# GPU memory without fragments; the last 2,000 collectives of each process, written down when one takes too long: docs/clusters.md.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
case ${0##*/} in
preprocess_*.sh) # all GPUs; one process where PyTorch finds none, which runs on the CPU or says what is wrong
    GPUS=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
    ;;&
train_*.sh | preprocess_*.sh) # torchrun would give each process one thread, of which --offload's optimizer wants many
    threads=$(($(nproc) / ${GPUS:-8}))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    ;;
esac

# How torchrun's processes meet. Alone on a node, at any free port: others may train there too.
if [ "${NNODES:-1}" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}")
fi
