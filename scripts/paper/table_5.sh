#!/usr/bin/env bash
# Table 5: HunyuanVideo trained on visual and motion quality. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm hunyuan visual_motion "visual motion"
run_arms "$@"
