#!/usr/bin/env bash
# Run one rank's command, started by torchrun through node.sh: bind it to its cores and write its log.
#
# LOGS        directory of rank-N.log; rank 0 is also shown. Unset: all ranks write to the terminal
# RANK_CORES  one list of cores per rank of this node
set -euo pipefail

if [[ -n ${LOGS:-} ]]; then
    mkdir -p "$LOGS"
    log=$LOGS/rank-$RANK.log
    echo "== rank $RANK of $WORLD_SIZE on $(hostname), $(date '+%F %T')${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}" >>"$log"
    if ((RANK == 0)); then
        # Slurm and terminals signal every process of a job. tee must outlive the rank to write its last lines.
        exec > >(trap '' HUP INT QUIT TERM USR1 USR2; exec tee -a "$log") 2>&1
    else
        exec >>"$log" 2>&1
    fi
fi
read -r -a cores <<<"${RANK_CORES:-}"
if ((${#cores[@]} > 0)) && command -v taskset >/dev/null; then
    exec taskset --cpu-list "${cores[$LOCAL_RANK]}" "$@"
fi
exec "$@"
