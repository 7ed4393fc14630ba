#!/usr/bin/env bash
# This node's part of a job on one or several: torchrun, whose agents meet at the first node. All arguments reach the story
# unchanged. Once per node, in any order:
#
#   NODES=2 NODE=0 HEAD=10.0.0.1 launch/node.sh --config my.yaml       on the first host
#   NODES=2 NODE=1 HEAD=10.0.0.1 launch/node.sh --config my.yaml       on the second
#   srun --ntasks-per-node=1 launch/node.sh --config my.yaml           Slurm tells the three
#
# NODES, NODE, HEAD  how many there are, which is this (from 0), and the first one's name or address
# PORT               where they meet on the first; default: 29400, under Slurm made from the job's number
# COMMAND            train (default), evaluate, prepare or doctor
# NPROC              ranks per node; default: one per GPU, or one without GPUs, where torch's threads already use all cores
# OMP_NUM_THREADS    threads per rank; default: the cores divided among the ranks
# LOGS               directory for one log per rank (rank.sh), and one of torchrun per node
# MAX_RESTARTS       how often torchrun starts the ranks again after a failure; default 0
# PREFLIGHT=off      do not look first whether the nodes can meet
# DRY_RUN=1          print the command instead of running it
#
# Paths in the arguments are seen from the directory you are in, and so is runs/.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

# This node cannot meet the others, and they shall not wait for it; hosts without Slurm must be ended by hand.
give_up() {
    if [[ -n ${SLURM_STEP_ID:-} ]]; then
        # The number of an array's first task means the whole array.
        local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
        scancel "${job:-$SLURM_JOB_ID}.$SLURM_STEP_ID" || true
    fi
    exit "$1"
}

# Read here, on each node: on the one that runs the batch script these variables would be its own.
if [[ -z ${NODES:-} && -n ${SLURM_STEP_NUM_NODES:-} ]]; then
    ((SLURM_STEP_NUM_TASKS == SLURM_STEP_NUM_NODES)) ||
        fail "srun started $SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES node(s): each would start all ranks of its node. Add --ntasks=$SLURM_STEP_NUM_NODES --ntasks-per-node=1."
    NODES=$SLURM_STEP_NUM_NODES NODE=$SLURM_NODEID
    read -r HEAD < <(scontrol show hostnames "$SLURM_STEP_NODELIST")
    # Two jobs on one node have different numbers; below the ports that the system hands out by itself.
    PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
fi
NODES=${NODES:-1} NODE=${NODE:-0} PORT=${PORT:-29400} COMMAND=${COMMAND:-train}
[[ -z ${STORY:-} ]] || fail "STORY=$STORY: renamed, so that train would be started instead. Set COMMAND=$STORY."
for name in NODES NODE PORT; do
    [[ ${!name} =~ ^[0-9]+$ ]] ||
        fail "$name='${!name}' is no number: the nodes could not meet. Give $name as a count such as 2."
done
((NODE < NODES)) || fail "NODE=$NODE of NODES=$NODES: nodes count from 0, so this one would never be waited for. Lower NODE."
((NODES == 1)) || [[ -n ${HEAD:-} ]] ||
    fail "NODES=$NODES without HEAD: the nodes would not know where to meet. Set HEAD to the first node's name or address."
# Of a rank. Operators of Kubernetes and other launchers tell a whole node these; torchrun tells the ranks their own.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
# shellcheck source=launch/ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh" torchrun

torchrun=("${python[@]}" -m torch.distributed.run --nproc_per_node "$NPROC" --max_restarts "${MAX_RESTARTS:-0}")
if ((NODES == 1)); then
    # Without the address it would tell the ranks this machine's name, and a minute would go by where that does not resolve.
    torchrun+=(--standalone --local_addr 127.0.0.1)
else
    place=(--endpoint "$HEAD:$PORT" --nodes "$NODES" --node "$NODE")
    if [[ -z ${DRY_RUN:-} ]]; then
        [[ ${PREFLIGHT:-} == off ]] || "${python[@]}" -m agnews_dist.preflight.rendezvous_check "${place[@]}" || give_up $?
        # shellcheck source=launch/network.sh
        source "$root/launch/network.sh"
    fi
    # Told, not guessed: torchrun looks for the first node by comparing names, which nicknames and several interfaces defeat.
    is_head=$((NODE == 0))
    # Nodes come apart by what their file systems take to load Python: the default is a minute.
    torchrun+=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "${SLURM_JOB_ID:-agnews_dist}")
    torchrun+=(--rdzv_conf "is_host=$is_head,read_timeout=300" ${ADDRESS:+--local_addr "$ADDRESS"})
fi
if [[ -n ${LOGS:-} && -z ${DRY_RUN:-} ]]; then
    # Its traceback at every stop would bury what rank 0 says last.
    mkdir -p "$LOGS"
    exec 2>>"$LOGS/torchrun-$NODE.log"
fi
run "${torchrun[@]}" --no_python "$root/launch/rank.sh" "$INTERPRETER" -m agnews_dist "$COMMAND" "$@"
