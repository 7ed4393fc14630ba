#!/usr/bin/env bash
# Start DeepSpeed's launcher on this machine. All arguments are the training's. The engine is DeepSpeed (configs/deepspeed.yaml)
# unless they choose another.
#
#   launch/deepspeed.sh --config configs/gpt2_xl_deepspeed.yaml
#   NPROC=4 launch/deepspeed.sh --engine.zero_stage 3
#
# NPROC            ranks; default: one per GPU, or one without GPUs, where torch's threads already use all cores
# OMP_NUM_THREADS  threads per rank; default: the cores divided among the ranks
# DRY_RUN=1        print the command instead of running it
#
# Paths in the arguments, and runs/, are relative to the current directory.
set -euo pipefail
# shellcheck source=launch/ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh" deepspeed
if ! "${python[@]}" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)'; then
    echo "error: DeepSpeed is not installed in $root/.venv. Run" \
        "${python[*]} -m pip install \"agnews_dist[deepspeed]\", or use launch/local.sh." >&2
    exit 1
fi

# The command `deepspeed` starts this module on every node. We start the module ourselves, because the command leaves its ranks
# running when it is killed, exits with 0 when its launcher is killed, and rejects NPROC together with CUDA_VISIBLE_DEVICES.
world=$("${python[@]}" -c 'import base64, json, sys; ranks = list(range(int(sys.argv[1])))
print(base64.urlsafe_b64encode(json.dumps({"localhost": ranks}).encode()).decode())' "$NPROC")
# A free port: with the launcher's default, two jobs on one machine would collide.
port=$("${python[@]}" -c 'from agnews_dist.distributed.node_resources import free_port; print(free_port())')
# The launcher sets CUDA_VISIBLE_DEVICES to 0 ... NPROC - 1. `env` restores the user's value.
run "${python[@]}" -m deepspeed.launcher.launch --quiet --world_info="$world" --master_port="$port" --no_python --no_local_rank \
    env ${CUDA_VISIBLE_DEVICES+"CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"} \
    "$INTERPRETER" -m agnews_dist.train --config "$root/configs/deepspeed.yaml" "$@"
