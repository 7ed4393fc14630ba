#!/usr/bin/env bash
# torchrun on this machine; all arguments reach agnews_dist.train unchanged.
#
#   launch/local.sh --config configs/gpt2_ddp.yaml
#   NPROC=4 launch/local.sh --optim.lr 3e-4
#
# NPROC            ranks; default: one per GPU, or one without GPUs, where torch's threads already use all cores
# OMP_NUM_THREADS  threads per rank; default: the cores divided among the ranks
#
# Paths in the arguments are seen from the directory you are in, and so is runs/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh" torchrun

exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" -m agnews_dist.train "$@"
