#!/usr/bin/env bash
# Figure 4 (c): how much noise the SDE has, FLUX: the paper's 0.3 (0.7 on the tiny model), less, and one that decays. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm flux taste taste
TINY="--noise_level 0.35" REAL="--noise_level 0.2" arm flux noise_less taste
TINY="--noise_level 0.15" REAL="--noise_level 0.1" arm flux noise_least taste
arm flux noise_decay taste --noise_schedule decay
run_arms "$@"
