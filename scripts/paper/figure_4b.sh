#!/usr/bin/env bash
# Figure 4 (b): which transitions are trained, HunyuanVideo-T2I. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm hunyuan_image first_30 taste --timestep_selection first --timestep_fraction 0.3
arm hunyuan_image random_30 taste --timestep_fraction 0.3
arm hunyuan_image last_40 taste --timestep_selection last --timestep_fraction 0.4
arm hunyuan_image taste taste # a random 60 %
arm hunyuan_image all_steps taste --timestep_fraction 1
run_arms "$@"
