#!/usr/bin/env bash
# What every launcher here needs: root, INTERPRETER, NPROC, OMP_NUM_THREADS, RANK_CORES, the signals that reach the ranks, and `run`.
# Sourced by node.sh, deepspeed.sh and accelerate.sh.
#
#   source ranks.sh torchrun      the name is for messages
#
# INTERPRETER  Python with the package; default: that of .venv
# CONTAINER    words before it, such as "apptainer exec --nv image.sif"; the repository must be visible inside
# DRY_RUN=1    print the last command instead of running it
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

export INTERPRETER=${INTERPRETER:-$root/.venv/bin/python}
read -r -a python <<<"${CONTAINER:-}"
python+=("$INTERPRETER")
if ! command -v "${python[0]}" >/dev/null; then
    if [[ ${python[0]} == "$root/.venv/bin/python" ]]; then
        echo "error: $root/.venv is not there: nothing is installed yet. Run bash launch/env.sh first." >&2
    else
        echo "error: ${python[0]} is not there: nothing can be started. Set INTERPRETER or CONTAINER to what is installed." >&2
    fi
    exit 1
fi
# Wherever the package is not installed, in a container for example, it is found in the repository.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
settings=$("${python[@]}" -m agnews_dist.distributed.node_resources "$1") || exit
eval "$settings"
# torchrun, and accelerate through it, pass only these on to the ranks. Without USR1 and USR2, which clusters send before they take
# a node away, the agent would die of them and leave the ranks behind.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}

# Become the command, or print it.
run() {
    if [[ -n ${DRY_RUN:-} ]]; then
        # One write: nodes share the output.
        printf '%s\n' "$(printf '%q ' "$@")"
        exit 0
    fi
    exec "$@"
}
