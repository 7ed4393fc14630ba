#!/usr/bin/env bash
# What every launcher here needs: root, python, NPROC, OMP_NUM_THREADS, and the signals that reach the ranks. Sourced by
# local.sh, deepspeed.sh and accelerate.sh.
#
#   source ranks.sh torchrun      the name is for messages
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
    echo "error: NPROC='$NPROC' is no count: $1 would not know how many ranks to start. Give a number such as NPROC=2." >&2
    exit 2
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    OMP_NUM_THREADS=$((cores / NPROC > 0 ? cores / NPROC : 1))
fi
export OMP_NUM_THREADS
# torchrun, and accelerate through it, pass only these on to the ranks. Without USR1 and USR2, which clusters send before they take
# a node away, the agent would die of them and leave the ranks behind.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}
