#!/usr/bin/env bash
# Table 4: GRPO, DDPO, DPOK, ReFL and DPO on Stable Diffusion, by one reward each. See common.sh.
#
# Learning rates: the best of three for each method, by the mean reward of the last quarter of training with seed 9, which is not among the SEEDS.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
method() { # NAME TASTE_RATE CAPTION_RATE RATES...
    local script=baselines/$1_sd.py reward rate
    [[ $1 != grpo ]] || script=train_grpo_sd.py
    for reward in taste caption; do
        for rate in "${@:4}"; do
            seeds=(9) SCRIPT=$script
            TINY="--learning_rate $rate" arm sd "grid_$1_${reward}_$rate" "$reward"
        done
    done
}
run_arms "$@"
