#!/usr/bin/env bash
# Start torchrun on this node of a job. The agents of all nodes meet at the first node. All arguments are the command's. Run it
# once per node, in any order:
#
#   NODES=2 NODE=0 HEAD=10.0.0.1 launch/node.sh --config my.yaml       on the first host
#   NODES=2 NODE=1 HEAD=10.0.0.1 launch/node.sh --config my.yaml       on the second
#   srun --ntasks-per-node=1 launch/node.sh --config my.yaml           Slurm sets the three variables
#
# Pods of Kubeflow (trainjob.yaml) take them from PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT, PET_NPROC_PER_NODE.
#
# NODES, NODE, HEAD  number of nodes, number of this node (from 0), name or address of the first node
# PORT               port of the first node for the rendezvous; default: 29400, under Slurm derived from the job's number
# COMMAND            train (default), sweep, evaluate, prepare or doctor
# NPROC              ranks per node; default: one per GPU, or one without GPUs, where torch's threads already use all cores
# OMP_NUM_THREADS    threads per rank; default: the cores divided among the ranks
# LOGS               directory for one log per rank (rank.sh), and one of torchrun per node
# MAX_RESTARTS       times that torchrun restarts the ranks after a failure; default 0
# PREFLIGHT=off      skip the check that the nodes can meet
# DRY_RUN=1          print the command instead of running it
#
# Paths in the arguments, and runs/, are relative to the current directory.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

# cancel_step STATUS: end this node, and under Slurm the whole step: the other nodes would wait for this one.
cancel_step() {
    if [[ -n ${SLURM_STEP_ID:-} ]]; then
        # One task of an array has the array's own number, which means all tasks to scancel.
        local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
        scancel "${job:-$SLURM_JOB_ID}.$SLURM_STEP_ID" || true
    fi
    exit "$1"
}

# Read on each node: in the batch script these variables describe its own node.
if [[ -z ${NODES:-} && -n ${SLURM_STEP_NUM_NODES:-} ]]; then
    ((SLURM_STEP_NUM_TASKS == SLURM_STEP_NUM_NODES)) ||
        fail "srun started $SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES node(s): it must start one per node. Add --ntasks=$SLURM_STEP_NUM_NODES --ntasks-per-node=1."
    NODES=$SLURM_STEP_NUM_NODES NODE=$SLURM_NODEID
    read -r HEAD < <(scontrol show hostnames "$SLURM_STEP_NODELIST")
    # Different for two jobs on one node, and below the system's ephemeral ports.
    PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
fi
# Kubeflow sets the defaults of torchrun's options, which all nodes share.
wait_seconds=0
if [[ -z ${NODES:-} && -n ${PET_NNODES:-} ]]; then
    NODES=$PET_NNODES NODE=${PET_NODE_RANK:-0} HEAD=${PET_MASTER_ADDR:-${MASTER_ADDR:-}} PORT=${PET_MASTER_PORT:-${MASTER_PORT:-}}
    # `auto`, `gpu` and `cpu` are left to ranks.sh.
    [[ ${PET_NPROC_PER_NODE:-} =~ ^[0-9]+$ ]] && export NPROC=${NPROC:-$PET_NPROC_PER_NODE}
    # The name of the first pod resolves some seconds after it was scheduled, and to its old address while it is replaced.
    wait_seconds=300
fi
NODES=${NODES:-1} NODE=${NODE:-0} PORT=${PORT:-29400} COMMAND=${COMMAND:-train}
[[ -z ${STORY:-} ]] || fail "STORY=$STORY: the variable is now COMMAND. Set COMMAND=$STORY."
for name in NODES NODE PORT; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail "$name='${!name}': must be a number. Set for example $name=2."
done
((NODE < NODES)) || fail "NODE=$NODE of NODES=$NODES: nodes count from 0. Lower NODE."
((NODES == 1)) || [[ -n ${HEAD:-} ]] || fail "NODES=$NODES without HEAD. Set HEAD to the first node's name or address."
# Old operators set these per pod; torchrun sets them per rank.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
# shellcheck source=launch/ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh" torchrun

torchrun=("${python[@]}" -m torch.distributed.run --nproc_per_node "$NPROC" --max_restarts "${MAX_RESTARTS:-0}")
if ((NODES == 1)); then
    # Without the address torchrun resolves this machine's name, which may take a minute to fail.
    torchrun+=(--standalone --local_addr 127.0.0.1)
else
    rendezvous=(--endpoint "$HEAD:$PORT" --nodes "$NODES" --node "$NODE")
    if [[ -z ${DRY_RUN:-} ]]; then
        [[ ${PREFLIGHT:-} == off ]] || "${python[@]}" -m agnews_dist.preflight.rendezvous_check "${rendezvous[@]}" --wait "$wait_seconds" ||
            cancel_step $?
        # shellcheck source=launch/network.sh
        source "$root/launch/network.sh"
    fi
    # Set is_host ourselves: torchrun compares host names, which fails with aliases or several interfaces.
    is_host=$((NODE == 0))
    torchrun+=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "${SLURM_JOB_ID:-agnews_dist}")
    # Nodes with a cold file system load Python minutes apart; the default read_timeout is 60 s.
    torchrun+=(--rdzv_conf "is_host=$is_host,read_timeout=300" ${ADDRESS:+--local_addr "$ADDRESS"})
fi
if [[ -n ${LOGS:-} && -z ${DRY_RUN:-} ]]; then
    # torchrun prints a traceback at every stop, which would hide rank 0's last lines.
    mkdir -p "$LOGS"
    exec 2>>"$LOGS/torchrun-$NODE.log"
fi
run "${torchrun[@]}" --no_python "$root/launch/rank.sh" "$INTERPRETER" -m agnews_dist "$COMMAND" "$@"
