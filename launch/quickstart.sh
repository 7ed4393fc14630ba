#!/usr/bin/env bash
# From nothing to a trained classifier: environment, then two ranks on embedded text and an embedded model. No network is
# used after the installation, and no GPU is needed. Arguments reach agnews_dist.train unchanged:
#
#   bash launch/quickstart.sh
#   NPROC=1 bash launch/quickstart.sh --optim.epochs 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/env.sh
# Two ranks on one GPU cannot talk to each other over NCCL, so a machine with exactly one runs one rank.
NPROC=${NPROC:-$(.venv/bin/python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')}
export NPROC
exec bash launch/local.sh --config configs/quickstart.yaml "$@"
