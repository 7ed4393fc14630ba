#!/usr/bin/env bash
# Create the environment, then train on two ranks with embedded text and an embedded model. After the installation it needs no
# network and no GPU. Arguments are the training's.
#
#   bash launch/quickstart.sh
#   NPROC=1 bash launch/quickstart.sh --optim.epochs 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/env.sh
# NCCL cannot connect two ranks on one GPU: with exactly one GPU, run one rank.
NPROC=${NPROC:-$(.venv/bin/python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')}
export NPROC
exec bash launch/local.sh --config configs/quickstart.yaml "$@"
