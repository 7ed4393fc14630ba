#!/usr/bin/env bash
# Set root, INTERPRETER, python, NPROC, OMP_NUM_THREADS, RANK_CORES, the signals that reach the ranks, and the function `run`.
# Sourced by node.sh, deepspeed.sh and accelerate.sh with the launcher's name for messages: source ranks.sh torchrun
#
# INTERPRETER  Python with the package's requirements; default: that of .venv
# CONTAINER    words before it, such as "apptainer exec --nv image.sif"; the repository must be visible inside
# DRY_RUN=1    print the last command instead of running it
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

export INTERPRETER=${INTERPRETER:-$root/.venv/bin/python}
read -r -a python <<<"${CONTAINER:-}"
python+=("$INTERPRETER")
if ! command -v "${python[0]}" >/dev/null; then
    if [[ ${python[0]} == "$root/.venv/bin/python" ]]; then
        echo "error: $root/.venv does not exist. Run bash launch/env.sh first." >&2
    else
        echo "error: ${python[0]} does not exist. Set INTERPRETER or CONTAINER to an existing program." >&2
    fi
    exit 1
fi
# The package need not be installed, in a container for example.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
settings=$("${python[@]}" -m agnews_dist.distributed.node_resources "$1") || exit
eval "$settings"
# Quotes, and YAML files of pods, keep `~` and variables.
if [[ ${LOGS:-} == *[~\$]* ]]; then
    LOGS=$("${python[@]}" -m agnews_dist.storage.directories "$LOGS") || exit
    export LOGS
fi
# torchrun passes only these signals on to the ranks, also under accelerate. By default USR1 and USR2, which clusters send before
# they take a node away, would end the agent and leave the ranks running.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}

# Kubeflow's defaults for torchrun: a launcher that names no number of nodes would wait for the others.
unset PET_NNODES PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT PET_NPROC_PER_NODE

# run COMMAND ARGUMENTS...: replace this process by the command, or print it.
run() {
    if [[ -n ${DRY_RUN:-} ]]; then
        # A single write: several nodes share the output.
        printf '%s\n' "$(printf '%q ' "$@")"
        exit 0
    fi
    exec "$@"
}
