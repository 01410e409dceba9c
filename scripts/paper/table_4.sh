#!/usr/bin/env bash
# Table 4 and, with DPOK, Table 1: methods on Stable Diffusion, trained on one reward each. See common.sh.
#
# Each method has the best of four learning rates for each reward: by the reward at the end of training with seed 9, which is not among SEEDS.
# Those below are what the grid has shown. DPO's published beta, 5000, is too careful for so few iterations (baselines/README.md).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
method() { # PREFIX OF ITS ARMS, RATE FOR TASTE, RATE FOR CAPTION (none: the setting's), FLAGS
    local rate reward
    [[ -z $1 ]] || local SCRIPT=baselines/${1}sd.py
    for rate in 5e-5 1e-4 2e-4 4e-4; do
        for reward in taste caption; do
            TINY="--learning_rate $rate ${*:4}" seeds=9 arm sd "grid_$1${reward}_$rate" "$reward"
        done
    done
    TINY="${2:+--learning_rate $2} ${*:4}" arm sd "${1}taste" taste
    TINY="${3:+--learning_rate $3} ${*:4}" arm sd "${1}caption" caption
}
method "" "" ""
method ddpo_ 1e-4 1e-4
method dpok_ 1e-4 1e-4
method refl_ 1e-4 1e-4 --last_steps 2
method dpo_ 1e-4 1e-4 --beta 500
run_arms "$@"
