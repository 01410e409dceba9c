#!/usr/bin/env bash
# Figure 9: a reward of taste alone makes unnatural pictures, with the CLIP score beside it they stay natural, FLUX. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm flux taste taste
arm flux taste_caption "taste caption"
run_arms "$@"
