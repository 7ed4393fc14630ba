#!/usr/bin/env bash
# One rank, as torchrun starts it through node.sh: bound to its cores, with a log of its own, then the command it is given.
#
# LOGS        directory of rank-N.log; rank 0 is shown as well, the others are only there. Unset: all ranks share the terminal
# RANK_CORES  one list of cores per rank of this node
set -euo pipefail

if [[ -n ${LOGS:-} ]]; then
    mkdir -p "$LOGS"
    log=$LOGS/rank-$RANK.log
    echo "== rank $RANK of $WORLD_SIZE on $(hostname), $(date '+%F %T')${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}" >>"$log"
    if ((RANK == 0)); then
        # Whoever stops the job signals every process of it; what the rank says last must still be written.
        exec > >(trap '' HUP INT TERM USR1 USR2; exec tee -a "$log") 2>&1
    else
        exec >>"$log" 2>&1
    fi
fi
read -r -a cores <<<"${RANK_CORES:-}"
if ((${#cores[@]} > 0)) && command -v taskset >/dev/null; then
    exec taskset --cpu-list "${cores[$LOCAL_RANK]}" "$@"
fi
exec "$@"
