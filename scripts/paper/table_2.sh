#!/usr/bin/env bash
# Table 2: Stable Diffusion trained on the HPS score, and on HPS and CLIP scores. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm sd taste taste
arm sd taste_caption "taste caption"
run_arms "$@"
