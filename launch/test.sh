#!/usr/bin/env bash
# Run all checks: lint, format, types, import layers, then all tests. Needs Python 3.10 or later. Tests that need a system tool
# (tools.sh) or root are skipped without.
#
#   bash launch/test.sh                     everything
#   bash launch/test.sh --install           install the missing system tools first (as root, on Debian or Ubuntu)
#   bash launch/test.sh tests/unit -k plan  the checks, and these tests only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/tools.sh
source launch/tools.sh
if [[ ${1:-} == --install ]]; then
    shift
    install_missing_tools
fi
report_missing_tools

# stage NAME COMMAND...: run a command and print how long it took.
stage() {
    local name=$1 start=$SECONDS status=0
    shift
    echo "== $name"
    "$@" || status=$?
    echo "== $name: $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s, exit status $status"
    return "$status"
}

# One thread per process: the multi-process tests start several processes on the same cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Containers often set this. The package would be compiled again in each of a thousand processes.
unset PYTHONDONTWRITEBYTECODE
bin=.venv/bin
stage environment bash launch/env.sh
stage lint "$bin/ruff" check agnews_dist tests
stage format "$bin/ruff" format --check agnews_dist tests
stage layers "$bin/lint-imports"
if (($# == 0)); then
    # Four files at a time, also on two cores: many tests wait for a time limit, a disk or Slurm. Long files are first. The
    # mutants are one file: one process runs them, while three run the others.
    set -- -n 4 --dist loadfile --no-loadscope-reorder --durations=40 \
        tests/slurm tests/mutants tests/faults tests/ranks tests/run tests/gpu tests/unit
fi
# The type checker uses one core: it runs at the same time as the tests.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
stage types "$bin/basedpyright" >"$types" 2>&1 &
status=0
stage tests "$bin/python" -m pytest "$@" || status=$?
wait $! || status=$?
cat "$types"
exit "$status"
