#!/usr/bin/env bash
# The whole journey as three jobs that wait for each other: prepare, train, evaluate on the test split. Prints their numbers. With
# OFFLINE in site.env (compute nodes without a network) it prepares right here instead.
#
#   slurm/submit.sh --config my.yaml
#   slurm/submit.sh --nodes=4 --time=8:00:00 -- --config my.yaml --optim.lr 3e-4
#
# What stands before `--` is sbatch's, for the training; the rest are settings. Without `--` all are settings.
#
# RUN        name of the run; default: agnews- and the time
# RUNS       directory of all runs; default: runs
# DRY_RUN=1  print the sbatch commands instead of submitting
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -f $root/slurm/site.env ]]; then
    # What a site writes there may not be as strict.
    set +eu
    # shellcheck source=slurm/site.env.example
    source "$root/slurm/site.env"
    set -eu
fi

options=()
for word in "$@"; do
    if [[ $word == -- ]]; then
        while [[ $1 != -- ]]; do
            options+=("$1")
            shift
        done
        shift
        break
    fi
done
RUN=${RUN:-agnews-$(date +%Y%m%d-%H%M%S)} RUNS=${RUNS:-runs}

# submit STORY WORDS...: prints the job's number, in a dry run the command and the story in its place.
submit() {
    local story=$1
    shift
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%s\n' "$(printf '%q ' sbatch --parsable "$@")" >&2
        echo "$story"
        return
    fi
    # A cluster of several answers `number;cluster`.
    local number
    number=$(sbatch --parsable "$@")
    echo "${number%%;*}"
}

# prepare_here ARGUMENTS...: what slurm/prepare.sbatch does, on this machine.
prepare_here() {
    # shellcheck disable=SC2206  # CONTAINER is words
    local command=(${CONTAINER:-} "${INTERPRETER:-$root/.venv/bin/python}" -m agnews_dist prepare "$@")
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%s\n' "$(printf '%q ' "${command[@]}")" >&2
        return
    fi
    if declare -F setup >/dev/null; then
        set +eu
        setup
        set -eu
    fi
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "${command[@]}" >&2
}

# A job whose turn never comes, because the one before it failed, shall not wait for ever.
after=(--kill-on-invalid-dep=yes)
if [[ -n ${OFFLINE:-} ]]; then
    (prepare_here "$@")
    echo "prepare here"
else
    prepare=$(unset SBATCH_GPUS_PER_NODE SBATCH_CPUS_PER_GPU SBATCH_MEM_PER_GPU; submit prepare "$root/slurm/prepare.sbatch" "$@")
    echo "prepare $prepare"
    options=(--dependency="afterok:$prepare" "${after[@]}" "${options[@]}")
fi
train=$(submit train "${options[@]}" "$root/slurm/train.sbatch" "$@" --run.dir "$RUNS" --run.name "$RUN")
echo "train $train"
evaluate=$(submit evaluate --dependency="afterok:$train" "${after[@]}" "$root/slurm/evaluate.sbatch" \
    --config "$RUNS/$RUN/config.yaml" --model.name "$RUNS/$RUN" --split test --output "scores/$RUN")
echo "evaluate $evaluate"
