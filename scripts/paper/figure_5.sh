#!/usr/bin/env bash
# Figure 5: DDPO on rectified flow, FLUX, beside GRPO. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm flux taste taste
SCRIPT=baselines/ddpo_flux.py arm flux ddpo_taste taste --timestep_fraction 0.6 # as many transitions as GRPO
run_arms "$@"
