#!/usr/bin/env bash
# Everything that is checked: lint, format, types, import layers, all tests. Needs Python 3.10+ and a C++ compiler;
# tests that need root, Slurm or another tool (.ci/run installs them) are skipped without.
#
#   bash launch/test.sh                     everything, as CI does
#   bash launch/test.sh tests/unit -k plan  the checks, and these tests only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/env.sh
# One thread per process: the multi-process tests start several processes on the same cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
bin=.venv/bin
$bin/ruff check agnews_dist tests
$bin/ruff format --check agnews_dist tests
$bin/basedpyright
$bin/lint-imports
if (($# > 0)); then
    exec $bin/python -m pytest "$@"
fi
# Three at a time, also on two cores: most of them wait for imports and for other processes. The tests of a file share what it has
# set up; the mutants are one file and share nothing.
$bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/slurm tests/faults tests/ranks \
    tests/run tests/gpu tests/unit
$bin/python -m pytest -n 3 tests/mutants
