# shellcheck shell=bash
# Shared by the batch scripts: they source it and call `run_command` or `run_to_end`. README.md in this folder explains it.
#
# TERM  Slurm takes the job away (preemption, requeue, scancel). Slurm itself signals the ranks and requeues the job.
# USR1  The time limit is near (`--signal=B:USR1@...`), or the site announces a preemption. The script passes the signal on to
#       the ranks and then requeues the job. USR2, HUP, INT and QUIT mean the same.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
was_stopped=
trap_stop_signals() {
    trap 'was_stopped=1' TERM HUP INT QUIT USR1 USR2
}
trap_stop_signals

if [[ -f $root/slurm/site.env ]]; then
    # shellcheck source=slurm/site.env.example
    source <(tr -d '\r' <"$root/slurm/site.env") # editors on Windows end lines with CRLF
fi
if declare -F setup >/dev/null; then
    setup
fi
# After setup: environment modules and conda use unset variables.
set -uo pipefail
# launch/node.sh reads these from Slurm; values exported by a user's shell would override them.
unset NODES NODE HEAD
export INTERPRETER CONTAINER DRY_RUN PREFLIGHT NPROC MAX_RESTARTS
# One task of an array has the array's own number, which means all tasks to Slurm's clients.
job=$SLURM_JOB_ID run_name=$SLURM_JOB_NAME-$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

# call_slurm CLIENT ARGUMENTS...: run a Slurm client, again while the controller is busy or down.
call_slurm() {
    local pause
    for pause in 2 5 10 20 0; do
        "$@" && return
        sleep "$pause"
    done
    return 1
}

# run_python MODULE ARGUMENTS...: run a module of this repository.
run_python() {
    # shellcheck disable=SC2086  # CONTAINER is several words
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} ${CONTAINER:-} "${INTERPRETER:-$root/.venv/bin/python}" -m "$@"
}

# Slurm of 2022 and before does not set the end time of the job. The ranks need it to save in time.
if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    SLURM_JOB_END_TIME=$(date -d "$(call_slurm squeue --noheader --jobs "$job" --format %e)" +%s 2>/dev/null) &&
        export SLURM_JOB_END_TIME
fi
LOGS=${LOGS:-$SLURM_SUBMIT_DIR/logs}
if [[ $LOGS == *[~\$]* ]]; then # quotes keep `~` and variables
    LOGS=$(run_python agnews_dist.storage.directories "$LOGS") || exit
fi
export LOGS=$LOGS/$SLURM_JOB_NAME-$SLURM_JOB_ID

# run_command NAME ARGUMENTS...: run a command of agnews_dist on every node of the job; returns its exit status.
run_command() {
    local name=$1 step status=0
    shift
    # Only prepare needs the network.
    [[ $name != prepare && -n ${OFFLINE:-} ]] && export HF_HUB_OFFLINE=1
    # --ntasks-per-node=1  one torchrun per node, whatever sbatch was given
    # --cpu-bind=none      all cores of the job; rank.sh binds the ranks
    # --kill-on-bad-exit=0 a node that was stopped exits with an error while rank 0 may still be saving on another
    # --export=ALL         after `sbatch --export=NONE` srun would drop COMMAND and all other variables
    COMMAND=$name srun --export=ALL --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 \
        --wait=900 "$root/launch/node.sh" "$@" &
    step=$!
    trap 'was_stopped=1; kill -USR1 "$step" 2>/dev/null' HUP INT QUIT USR1 USR2
    # A signal interrupts `wait`, not the step.
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
    done
    wait "$step"
    status=$?
    trap_stop_signals
    if ((status != 0)) && [[ -z $was_stopped ]]; then
        tail -n 12 "$LOGS"/torchrun-*.log 2>/dev/null
        echo "error: $name exited with status $status. The ranks' logs are in $LOGS." >&2
    fi
    return "$status"
}

# run_to_end train|sweep ARGUMENTS...: run one start of the command, then exit; requeues the job until the command is finished.
run_to_end() {
    local command=$1
    shift
    # The tasks of an array work on one sweep.
    [[ $command != sweep ]] || run_name=$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
    # All starts of this job share the name; a --run.name in the arguments comes later and wins.
    set -- --run.name "$run_name" "$@"
    if [[ -n ${DRY_RUN:-} ]]; then
        run_command "$command" "$@"
        exit
    fi
    if [[ -n ${DOCTOR:-} && ${SLURM_RESTART_COUNT:-0} == 0 ]] && ! run_command doctor "$@"; then
        [[ -z $was_stopped ]] || requeue_job
        exit 1
    fi
    local answer status=0
    answer=$(decide_restart begin "$@") || exit
    echo "job $job: ${answer#* }"
    [[ $answer != give_up* ]] || exit 1
    [[ -z $was_stopped ]] || requeue_job
    run_command "$command" "$@" || status=$?
    is_preempted && was_stopped=1
    answer=$(decide_restart end ${was_stopped:+--was_stopped} "$@") || exit
    echo "job $job: $command exited with status $status; ${answer%% *}: ${answer#* }"
    case $answer in
    finished*) exit 0 ;;
    again*) requeue_job ;;
    *) exit 1 ;;
    esac
}

# decide_restart begin|end ARGUMENTS...: print the answer of `agnews_dist restarts`; its first word decides.
decide_restart() {
    local at=$1
    shift
    run_python agnews_dist restarts --at "$at" --starts "$LOGS/starts.jsonl" --limit "${MAX_FRUITLESS_STARTS:-3}" "$@"
}

# is_preempted: whether Slurm is preempting the job. In the grace time Slurm signals only the ranks, not this script.
is_preempted() {
    [[ $(call_slurm scontrol show job "$job") == *PreemptTime=[0-9]* ]]
}

# requeue_job: put the job back into the queue, then exit with 75 (EX_TEMPFAIL).
requeue_job() {
    local state
    state=$(call_slurm squeue --noheader --jobs "$job" --format %T)
    # Slurm is requeueing the job itself, or a user has cancelled it.
    if [[ -n $state && $state != RUNNING ]]; then
        echo "job $job: state $state, not requeued by this script"
        exit 75
    fi
    trap '' TERM # from our own requeue
    if call_slurm scontrol requeue "$job"; then
        echo "job $job: requeued"
        exit 75
    fi
    echo "error: job $job: Slurm refused to requeue it. Submit it again with --run.name $run_name to resume." >&2
    exit 75
}
