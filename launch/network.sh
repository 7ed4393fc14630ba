# shellcheck shell=bash disable=SC2034,SC2154  # node.sh sets and reads what is neither here
# How the ranks of several nodes talk, each setting with its reason; what you export yourself wins. Sourced by node.sh, which sets
# `python` and `place`.

# Of several interfaces (management, storage, fabric) the libraries take the first by name, which other nodes may not reach: take
# the one that leads to the first node. ADDRESS is this node's own there, which the others are told.
interface=${GLOO_SOCKET_IFNAME:-}
if [[ -z $interface || -z ${ADDRESS:-} ]]; then
    read -r found own < <("${python[@]}" -m agnews_dist.preflight.rendezvous_check "${place[@]}" --print_interface)
    interface=${interface:-$found} ADDRESS=${ADDRESS:-$own}
fi
# gloo: the CPU ranks' collectives, and every engine's side channel.
export GLOO_SOCKET_IFNAME=$interface
# NCCL's first handshake, and its data where there is no InfiniBand. `=`: this very name, not all that begin with it.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface}
# Errors of the network are otherwise silent until the timeout.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# What every rank did last in NCCL, which torch writes when a collective times out; without it nobody can tell which rank was
# missing. Beside the logs instead of in the home directory.
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-${LOGS:-/tmp}/nccl-trace-}
