#!/usr/bin/env bash
# Figure 8: the samples of a prompt from the same noise or each from its own, HunyuanVideo. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
arm hunyuan visual_motion "visual motion"
arm hunyuan separate_noise "visual motion" --no-shared_noise
run_arms "$@"
