#!/usr/bin/env bash
# Figure 4 (a): training on the best 8 and the worst 8 of 16, 64 and 256 samples of a prompt, Stable Diffusion. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for pool in 16 64 256; do
    TINY="--prompts_per_iteration 4 --iterations 25" arm sd "taste_16_of_$pool" taste --num_generations "$pool" --best_of_n 16
done
run_arms "$@"
