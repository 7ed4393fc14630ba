#!/usr/bin/env bash
# Create .venv with exactly the versions of requirements.lock and this package. Does nothing if it is up to date.
#
#   bash launch/env.sh
#   PYTHON=python3.11 bash launch/env.sh        another interpreter than python3
#
# On Linux pip installs torch's CUDA build. The CPU build has the same version for the lock file and is some gigabytes smaller:
#
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/env.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $1" >&2
    exit 1
}

stamp=.venv/agnews_dist.stamp
# The directory is part of the stamp: a moved or copied .venv refers to its old location.
wanted=$(pwd; cksum requirements.lock pyproject.toml)
if [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

# A working .venv is updated. One that was moved, or has another Python than PYTHON, is created again.
python=${PYTHON:-python3}
prefix=$(.venv/bin/python -c 'import sys; print(sys.prefix)' 2>/dev/null || true)
if [[ -z ${PYTHON:-} && $prefix -ef .venv ]]; then
    python=.venv/bin/python
fi
command -v "$python" >/dev/null ||
    fail "$python not found: the package needs Python 3.10 or later. Install it, or name another with PYTHON=python3.11."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$python is Python $version: the package needs 3.10 or later. Name another interpreter with PYTHON=python3.11."
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module. Install it (Debian and Ubuntu: apt install python$version-venv)."

rm -f "$stamp"
if [[ $python != .venv/bin/python ]]; then
    "$python" -m venv --clear .venv
fi
echo "installing requirements.lock for Python $version into .venv; the first time takes minutes"
install=(.venv/bin/python -m pip install --quiet --no-compile)
# torch is half of the work, so the rest is installed at the same time. The last call adds what torch's build needs on this machine.
"${install[@]}" --no-deps "$(grep '^torch==' requirements.lock)" &
torch=$!
"${install[@]}" --no-deps --requirement <(grep -v '^torch==' requirements.lock)
wait "$torch"
"${install[@]}" --requirement requirements.lock
# pip would compile all with one core. What is left out here is compiled when it is imported. Some templates are not Python.
packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rare='/(tests?|testing|_inductor|_vendor|lexers)/|/transformers/models/(?!auto/|gpt2/)\w+/'
.venv/bin/python -m compileall -q -j 0 -x "$rare" "$packages" >/dev/null || true
# The lock file includes the build backend: without build isolation nothing unpinned is installed.
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
echo "$wanted" >"$stamp"
