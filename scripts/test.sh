#!/usr/bin/env bash
# Installs what the tests need into .venv and runs the checks and tests; arguments go to pytest:
#   bash scripts/test.sh                      a few minutes
#   bash scripts/test.sh -m slow              those left out above
#   bash scripts/test.sh tests/test_sampler.py -k marginals
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
cd "$repository"

ruff check .
ruff format --check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tests start several processes themselves
exec pytest --numprocesses logical --maxprocesses 4 --dist loadfile "$@" # a file stays together: its tests share what is slow to make
