# shellcheck shell=bash disable=SC2034,SC2154  # node.sh sets and reads variables of this file
# Network settings for ranks on several nodes, each with its reason. Values exported by the user win. Sourced by node.sh, which
# sets `python` and `rendezvous`.

# A node may have several interfaces (management, storage, fabric). By default the libraries take the first by name, which other
# nodes may not reach. Take the one on the route to the first node. ADDRESS is this node's address there, for the other nodes.
interface=${GLOO_SOCKET_IFNAME:-}
if [[ -z $interface || -z ${ADDRESS:-} ]]; then
    read -r route_interface route_address < <("${python[@]}" -m agnews_dist.preflight.rendezvous_check "${rendezvous[@]}" --print_interface)
    interface=${interface:-$route_interface} ADDRESS=${ADDRESS:-$route_address}
fi
# gloo: collectives of CPU ranks, and the side channel of every engine.
export GLOO_SOCKET_IFNAME=$interface
# NCCL: first handshake, and data on machines without InfiniBand. `=` means exactly this name; the default is a prefix match.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface}
# Print network errors at once. By default they are silent until the timeout.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# If a collective times out, torch writes each rank's last NCCL calls here. They show which rank was missing.
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-${LOGS:-/tmp}/nccl-trace-}
