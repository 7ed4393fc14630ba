#!/usr/bin/env bash
# Start accelerate's launcher on this machine, with configs/accelerate/default.yaml. All arguments are the training's, which also
# choose the engine.
#
#   launch/accelerate.sh --config configs/gpt2_ddp.yaml
#   NPROC=4 launch/accelerate.sh --engine.backend deepspeed
#
# NPROC            ranks; default: one per GPU, or one without GPUs, where torch's threads already use all cores
# OMP_NUM_THREADS  threads per rank; default: the cores divided among the ranks
# DRY_RUN=1        print the command instead of running it
#
# Paths in the arguments, and runs/, are relative to the current directory.
set -euo pipefail
# shellcheck source=launch/ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh" accelerate

run "${python[@]}" -m accelerate.commands.launch --config_file "$root/configs/accelerate/default.yaml" --num_processes "$NPROC" \
    -m agnews_dist.train "$@"
