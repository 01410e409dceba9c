#!/usr/bin/env bash
# All experiments, in parallel as cores allow: about three hours on two. See common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
COLLECTING=1
for experiment in figure_4a figure_2 figure_8 table_4 figure_1 figure_3a figure_3b figure_4b figure_4c figure_5 figure_7 figure_9 table_2 table_3 table_5; do
    source "$repository/scripts/paper/$experiment.sh"
done
unset COLLECTING
run_arms "$@"
