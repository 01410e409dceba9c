#!/usr/bin/env bash
# Figure 1: reward curves of Stable Diffusion, FLUX and HunyuanVideo-T2I; the first two also with the CLIP score. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for model in sd flux; do
    arm "$model" taste taste
    arm "$model" taste_caption "taste caption"
done
arm hunyuan_image taste taste
run_arms "$@"
