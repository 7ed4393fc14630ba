#!/usr/bin/env bash
# Everything that is checked: lint, format, types, import layers, all tests. Needs Python 3.10+ and a C++ compiler.
#
#   bash launch/test.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/env.sh
make check
