# Makes the repository's .venv if it is missing and installs a requirements file into it: bash scripts/setup.sh requirements.txt
# The other scripts source it, which also puts .venv on PATH and sets `repository`; the working directory stays.
# PYTHON chooses the interpreter. A requirements file is installed again only when it or the packages' pins change.

set -euo pipefail
repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() { # by a mistake of who called
    echo "error: $*" >&2
    exit 2
}

need() { # NAMES of variables that the caller must have set
    local name unset=''
    for name in "$@"; do
        [ -n "${!name:-}" ] || unset+=", $name"
    done
    [ -z "$unset" ] || fail "set ${unset#, }: the head of $0 shows how"
}

given() { # FLAG WORDS...: whether the flag is one of the words
    local flag=$1 word
    shift
    for word in "$@"; do
        [[ $word != "$flag" && $word != "$flag="* ]] || return 0
    done
    return 1
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

# GPU memory without fragments; the last 2,000 collectives of each process, written down when one takes too long: docs/clusters.md.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
case ${0##*/} in
preprocess_*.sh) # all GPUs; one process where PyTorch finds none, which runs on the CPU or says what is wrong
    GPUS=${GPUS:-$(python -c 'import signal; signal.signal(2, signal.SIG_DFL); import torch; print(torch.cuda.device_count() or 1)')}
    ;;&
train_*.sh | preprocess_*.sh) # torchrun gives each process one thread, of which --offload's optimizer wants many
    threads=$(($(nproc) / ${GPUS:-8}))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    ;;
esac

# How the processes meet. Alone on a node, at any free port: others may train there too.
if [ "${NNODES:-1}" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}")
fi

attend() { # COMMAND...: for scripts that have more to do after it: passes on what asks it to stop, and ends with its exit code
    local code=128 name
    (trap - INT QUIT && exec "$@") & # which bash has what is in the background ignore
    attended=$!
    for name in TERM INT QUIT HUP USR1 USR2; do
        # shellcheck disable=SC2064
        [ -n "$(trap -p "$name")" ] || trap "kill -$name $attended 2>/dev/null || true" "$name"
    done
    while [ "$code" -ge 128 ] && kill -0 "$attended" 2>/dev/null; do # a trap interrupts `wait`
        code=0
        wait "$attended" || code=$?
    done
    trap - TERM INT QUIT HUP USR1 USR2
    return "$code"
}
