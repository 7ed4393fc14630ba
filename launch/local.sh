#!/usr/bin/env bash
# Start torchrun on this machine alone, also inside a Slurm allocation. All arguments are the training's.
#
#   launch/local.sh --config configs/gpt2_ddp.yaml
#   NPROC=4 launch/local.sh --optim.lr 3e-4
#   NPROC=4 LOGS=logs launch/local.sh       one log per rank; rank 0 is shown as well
#
# NPROC            ranks; default: one per GPU, or one without GPUs, where torch's threads already use all cores
# OMP_NUM_THREADS  threads per rank; default: the cores divided among the ranks
# DRY_RUN=1        print the command instead of running it
#
# Paths in the arguments, and runs/, are relative to the current directory. More variables: node.sh.
set -euo pipefail

NODES=1 exec "$(dirname "${BASH_SOURCE[0]}")/node.sh" "$@"
