#!/usr/bin/env bash
# Submit three jobs that depend on each other: prepare, train, evaluate on the test split. Prints their numbers. With OFFLINE in
# site.env (compute nodes without a network) it prepares on this machine instead.
#
#   slurm/submit.sh --config my.yaml
#   slurm/submit.sh --nodes=4 --time=8:00:00 -- --config my.yaml --optim.lr 3e-4
#
# Options before `--` are sbatch's, for the training; options after it are settings. Without `--` all are settings.
#
# RUN        name of the run; default: agnews-, the time and the process
# RUNS       directory of all runs; default: runs
# DRY_RUN=1  print the sbatch commands instead of submitting
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -f $root/slurm/site.env ]]; then
    # A site's own commands may use unset variables or fail.
    set +eu
    # shellcheck source=slurm/site.env.example
    source <(tr -d '\r' <"$root/slurm/site.env") # editors on Windows end lines with CRLF
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
RUN=${RUN:-agnews-$(date +%Y%m%d-%H%M%S)-$$} RUNS=${RUNS:-runs}

# submit COMMAND WORDS...: submit a job and print its number. A dry run prints the sbatch command, and COMMAND as the number.
submit() {
    local command=$1
    shift
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%s\n' "$(printf '%q ' sbatch --parsable "$@")" >&2
        echo "$command"
        return
    fi
    # With several clusters sbatch prints `number;cluster`.
    local number
    number=$(sbatch --parsable "$@")
    echo "${number%%;*}"
}

# prepare_here ARGUMENTS...: fill the caches on this machine, as slurm/prepare.sbatch does on a node.
prepare_here() {
    # shellcheck disable=SC2206  # CONTAINER is several words
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

# By default a job whose predecessor failed would stay in the queue for ever.
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
