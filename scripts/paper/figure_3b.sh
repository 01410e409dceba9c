#!/usr/bin/env bash
# Figure 3 (b): pairs of pictures before and after for people to judge, FLUX, HunyuanVideo and SkyReels-I2V; docs/evaluation.md has what
# to do with them. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm flux taste_caption "taste caption"
arm hunyuan visual_motion "visual motion"
arm skyreels motion motion
pairs flux taste_caption 240 # the paper's numbers of prompts
pairs hunyuan visual_motion 200
pairs skyreels motion 200
run_arms "$@"
