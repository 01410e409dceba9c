#!/usr/bin/env bash
# Installs what the tests need into .venv and runs the checks and tests; arguments go to pytest:
#   bash scripts/test.sh                      a few minutes
#   bash scripts/test.sh -m slow              those left out above
#   bash scripts/test.sh -m slurm             on a private SLURM, which is installed where apt-get and root are there; else skipped
#   bash scripts/test.sh tests/test_sampler.py -k marginals
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
cd "$repository"

if [[ " $* " == *" -m slurm "* && $(id -u) = 0 ]] && ! command -v slurmctld >/dev/null && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge ||
        echo "SLURM could not be installed: its tests will be skipped" >&2
fi
ruff check .
ruff format --check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tests start several processes themselves
exec pytest --numprocesses logical --maxprocesses 4 --dist loadfile "$@" # a file stays together: its tests share what is slow to make
