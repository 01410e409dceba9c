#!/usr/bin/env bash
# Figure 3 (a): rewards that are 1 above a threshold, else 0, of Stable Diffusion. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm sd taste_binary taste@
arm sd caption_binary caption@
run_arms "$@"
