#!/usr/bin/env bash
# Figure 7: diversity before and after, FLUX: how different pictures of a prompt from different noise are. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm flux taste taste
arm flux taste_caption "taste caption"
run_arms "$@"
