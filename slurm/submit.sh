#!/usr/bin/env bash
# The whole journey as three jobs that wait for each other: prepare, train, evaluate on the test split. Prints their numbers.
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
    # shellcheck source=slurm/site.env.example
    source "$root/slurm/site.env"
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

prepare=$(unset SBATCH_GPUS_PER_NODE; submit prepare "$root/slurm/prepare.sbatch" "$@")
echo "prepare $prepare"
# A job whose turn never comes, because the one before it failed, shall not wait for ever.
train=$(submit train --dependency="afterok:$prepare" --kill-on-invalid-dep=yes "${options[@]}" \
    "$root/slurm/train.sbatch" "$@" --run.dir "$RUNS" --run.name "$RUN")
echo "train $train"
evaluate=$(submit evaluate --dependency="afterok:$train" --kill-on-invalid-dep=yes \
    "$root/slurm/evaluate.sbatch" --config "$RUNS/$RUN/config.yaml" \
    --model.name "$RUNS/$RUN" --split test --output "scores/$RUN")
echo "evaluate $evaluate"
