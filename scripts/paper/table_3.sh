#!/usr/bin/env bash
# Table 3: FLUX trained on the HPS score, and on HPS and CLIP scores. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm flux taste taste
arm flux taste_caption "taste caption"
run_arms "$@"
