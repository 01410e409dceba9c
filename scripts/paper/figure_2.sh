#!/usr/bin/env bash
# Figure 2: reward curves of HunyuanVideo, visual and motion quality, and of SkyReels-I2V, motion quality. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm hunyuan visual_motion "visual motion"
arm skyreels motion motion
run_arms "$@"
