# shellcheck shell=bash
# What the batch scripts share: the site's environment, one `srun` per story, and the way back into the queue. Each of them sources
# this file and calls `story` or `train_to_the_end`.
#
# TERM  Slurm takes the job away (preemption, requeue, scancel). It signals the ranks itself, and requeues what is to be requeued
# USR1  `--signal=B:USR1@...`: the time limit is near, or the site warns of a preemption. Passed on to the ranks; then back into
#       the queue, where the next start goes on
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
was_stopped=
note_stop() {
    trap 'was_stopped=1' USR1 USR2 TERM
}
note_stop

if [[ -f $root/slurm/site.env ]]; then
    # shellcheck source=slurm/site.env.example
    source "$root/slurm/site.env"
fi
if declare -F setup >/dev/null; then
    setup
fi
# Only now: what modules and conda have to run breaks where an unset variable is an error.
set -uo pipefail
# What another shell exported would win over what Slurm says (launch/node.sh).
unset NODES NODE HEAD
export INTERPRETER CONTAINER DRY_RUN PREFLIGHT NPROC MAX_RESTARTS
# The first task of an array has the array's own number, with which Slurm's clients mean all of them.
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

# ask_slurm CLIENT ARGUMENTS...: its answer, waited for while the controller is busy or away.
ask_slurm() {
    local pause
    for pause in 2 5 10 20 0; do
        "$@" && return
        sleep "$pause"
    done
    return 1
}

# Slurm of 2022 and before does not tell a job its end; the ranks save and leave in time if they know it.
if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    SLURM_JOB_END_TIME=$(date -d "$(ask_slurm squeue --noheader --jobs "$job" --format %e)" +%s 2>/dev/null) &&
        export SLURM_JOB_END_TIME
fi
export LOGS=${LOGS:-$SLURM_SUBMIT_DIR/logs}/$SLURM_JOB_NAME-$SLURM_JOB_ID

# story NAME ARGUMENTS...: on every node of the job; its exit status.
story() {
    local name=$1 step status=0
    shift
    # Prepare needs the network, and everything else can do without.
    [[ $name != prepare && -n ${OFFLINE:-} ]] && export HF_HUB_OFFLINE=1
    # One task per node, whatever sbatch was told, and all that the job has there: ranks are bound to cores in rank.sh. A node
    # whose torchrun was stopped ends with an error and must not take the others down, since rank 0 may still be saving; of
    # failures the ranks tell each other. After --export=NONE to sbatch, srun would keep COMMAND and all that follows to itself.
    COMMAND=$name srun --export=ALL --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 \
        --wait=900 "$root/launch/node.sh" "$@" &
    step=$!
    trap 'was_stopped=1; kill -USR1 "$step" 2>/dev/null' USR1 USR2
    # A signal ends `wait`, not the step.
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
    done
    wait "$step"
    status=$?
    note_stop
    if ((status != 0)) && [[ -z $was_stopped ]]; then
        tail -n 12 "$LOGS"/torchrun-*.log 2>/dev/null
        echo "error: $name ended with exit status $status. What each rank said is in $LOGS." >&2
    fi
    return "$status"
}

# train_to_the_end ARGUMENTS...: one start of a training that may take several; exits. DOCTOR=1 has the cluster checked before
# the first.
train_to_the_end() {
    # A name that every start of this job knows; one of your own, later in the arguments, wins.
    set -- --run.name "$SLURM_JOB_NAME-$SLURM_JOB_ID" "$@"
    if [[ -n ${DRY_RUN:-} ]]; then
        story train "$@"
        exit
    fi
    if [[ -n ${DOCTOR:-} && ${SLURM_RESTART_COUNT:-0} == 0 ]] && ! story doctor "$@"; then
        [[ -z $was_stopped ]] || again
        exit 1
    fi
    local answer status=0
    answer=$(judge begin "$@") || exit
    echo "job $job: ${answer#* }"
    [[ $answer != give_up* ]] || exit 1
    [[ -z $was_stopped ]] || again
    story train "$@" || status=$?
    is_taken_away && was_stopped=1
    answer=$(judge end ${was_stopped:+--was_stopped} "$@") || exit
    echo "job $job: the training ended with exit status $status; ${answer%% *}: ${answer#* }"
    case $answer in
    finished*) exit 0 ;;
    again*) again ;;
    *) exit 1 ;;
    esac
}

# Ask `agnews_dist restarts`; the first word of its answer is for this script.
judge() {
    local at=$1
    shift
    # shellcheck disable=SC2086  # CONTAINER is words
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} ${CONTAINER:-} "${INTERPRETER:-$root/.venv/bin/python}" -m agnews_dist restarts \
        --at "$at" --starts "$LOGS/starts.jsonl" --limit "${MAX_FRUITLESS_STARTS:-3}" "$@"
}

# Whether Slurm is preempting the job: in its grace time only the ranks are signalled, and nothing reaches this script.
is_taken_away() {
    [[ $(ask_slurm scontrol show job "$job") == *PreemptTime=[0-9]* ]]
}

# Back into the queue; exits.
again() {
    local state
    state=$(ask_slurm squeue --noheader --jobs "$job" --format %T)
    # A job that Slurm requeues, or a user has cancelled, is not running any more.
    if [[ -n $state && $state != RUNNING ]]; then
        echo "job $job: it is left to Slurm"
        exit 75
    fi
    trap '' TERM # of our own requeue
    if ask_slurm scontrol requeue "$job"; then
        echo "job $job: requeued"
        exit 75
    fi
    echo "error: job $job was not requeued: it would go on where it was stopped. Submit it again with --run.name $SLURM_JOB_NAME-$SLURM_JOB_ID." >&2
    exit 75
}
