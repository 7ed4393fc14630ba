#!/usr/bin/env bash
# DeepSpeed's launcher on this machine; the engine is DeepSpeed (configs/deepspeed.yaml) unless the arguments say otherwise,
# and all of them reach agnews_dist.train unchanged.
#
#   launch/deepspeed.sh --config configs/gpt2_xl_deepspeed.yaml
#   NPROC=4 launch/deepspeed.sh --engine.zero_stage 3
#
# NPROC            ranks; default: one per GPU, or one without GPUs, where torch's threads already use all cores
# OMP_NUM_THREADS  threads per rank; default: the cores divided among the ranks
# DRY_RUN=1        print the command instead of running it
#
# Paths in the arguments are seen from the directory you are in, and so is runs/.
set -euo pipefail
# shellcheck source=launch/ranks.sh
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh" deepspeed
if ! "${python[@]}" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)'; then
    echo "error: DeepSpeed is not in $root/.venv: its launcher cannot start. Run" \
        "${python[*]} -m pip install \"agnews_dist[deepspeed]\", or use launch/local.sh." >&2
    exit 1
fi

# What the command `deepspeed` starts on every node, and not that command: killed, it would leave the ranks running; it exits
# with 0 when its launcher is killed; and it takes NPROC only with other devices than CUDA_VISIBLE_DEVICES names.
world=$("${python[@]}" -c 'import base64, json, sys; ranks = list(range(int(sys.argv[1])))
print(base64.urlsafe_b64encode(json.dumps({"localhost": ranks}).encode()).decode())' "$NPROC")
# A free port: two jobs on one machine would meet at the launcher's default.
port=$("${python[@]}" -c 'from agnews_dist.distributed.node_resources import free_port; print(free_port())')
# The launcher shows the ranks the devices 0 to NPROC - 1; `env` gives them back the ones you chose, or none.
run "${python[@]}" -m deepspeed.launcher.launch --quiet --world_info="$world" --master_port="$port" --no_python --no_local_rank \
    env ${CUDA_VISIBLE_DEVICES+"CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"} \
    "$INTERPRETER" -m agnews_dist.train --config "$root/configs/deepspeed.yaml" "$@"
