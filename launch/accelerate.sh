#!/usr/bin/env bash
# accelerate launch on this machine, with configs/accelerate/default.yaml; all arguments reach agnews_dist.train unchanged. The
# engine is chosen by them, not by accelerate.
#
#   launch/accelerate.sh --config configs/gpt2_ddp.yaml
#   NPROC=4 launch/accelerate.sh --engine.backend deepspeed
#
# NPROC            ranks; default: one per GPU, or one without GPUs, where torch's threads already use all cores
# OMP_NUM_THREADS  threads per rank; default: the cores divided among the ranks
#
# Paths in the arguments are seen from the directory you are in, and so is runs/.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=$root/.venv/bin/python
if [[ ! -x $python ]]; then
    echo "error: $root/.venv is not there: nothing is installed yet. Run bash launch/env.sh first." >&2
    exit 1
fi
if [[ -z ${NPROC:-} ]]; then
    NPROC=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
if [[ ! $NPROC =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC='$NPROC' is no count: accelerate would not know how many ranks to start. Give a number such as NPROC=2." >&2
    exit 2
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    OMP_NUM_THREADS=$((cores / NPROC > 0 ? cores / NPROC : 1))
fi
export OMP_NUM_THREADS

exec "$python" -m accelerate.commands.launch --config_file "$root/configs/accelerate/default.yaml" --num_processes "$NPROC" \
    -m agnews_dist.train "$@"
