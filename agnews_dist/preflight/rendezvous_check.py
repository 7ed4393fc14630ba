"""Check that this node can meet the others at the first node, before torchrun, which waits a minute or prints a traceback.

`python -m agnews_dist.preflight.rendezvous_check --endpoint HOST:PORT --nodes N --node I [--wait S] [--print_interface]`;
loads no torch.
"""

import argparse
import errno
import ipaddress
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress

import psutil

from agnews_dist.preflight.findings import Finding

CONNECT_SECONDS = 3.0
RETRY_SECONDS = 1.0
ANYWHERE = ("198.51.100.1", 9)
"""An unused address (RFC 5737), reached over the default route. Nothing is sent to it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the rendezvous, or print interface and address for a script. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="rendezvous_check", description="Check that this node can meet the others.")
    parser.add_argument("--endpoint", required=True, help="HOST:PORT on the first node.")
    parser.add_argument("--nodes", type=int, default=1, help="Number of nodes.")
    parser.add_argument("--node", type=int, default=0, help="Number of this node, from 0.")
    parser.add_argument("--wait", type=float, default=0.0, help="Seconds until a node that cannot be met is an error.")
    parser.add_argument("--print_interface", action="store_true", help="Print this node's interface and address.")
    options = parser.parse_args(argv)
    name, _, digits = options.endpoint.rpartition(":")
    if not name or not digits.isdecimal() or not 0 < int(digits) < 65536:
        parser.error(f"--endpoint {options.endpoint}: must be HOST:PORT with a port from 1 to 65535, such as node1:29400")
    host, port = name.strip("[]"), int(digits)
    if options.print_interface:
        try:
            print(*find_route(host, port, options.nodes))
        except OSError as error:
            print(f"error: no route to {name}: {error.strerror or error}. Check name and network.", file=sys.stderr)
            return 1
        return 0
    finding = _wait_for_rendezvous(host, port, options.nodes, options.node, options.wait)
    if finding.remedy:
        label = "error" if finding.verdict == "fail" else "warning"
        print(f"{label}: rendezvous: {finding.found}. {finding.remedy}.", file=sys.stderr)
    return int(finding.verdict == "fail")


def _wait_for_rendezvous(host: str, port: int, num_nodes: int, node: int, seconds: float) -> Finding:
    """Check again until the nodes can meet, for `seconds` at most."""
    deadline = time.monotonic() + seconds
    is_waiting = False
    while (finding := check_rendezvous(host, port, num_nodes, node)).verdict == "fail" and time.monotonic() < deadline:
        if not is_waiting:
            print(f"rendezvous: {finding.found}: waiting up to {seconds:.0f} s", file=sys.stderr, flush=True)
            is_waiting = True
        time.sleep(RETRY_SECONDS)
    return finding


def check_rendezvous(host: str, port: int, num_nodes: int, node: int) -> Finding:
    """Check names, addresses and the port; the endpoint is on node 0. Takes a few seconds at most."""
    this_host = socket.gethostname()
    try:
        addresses = _resolve(host, port)
    except OSError as error:
        remedy = "Give an address instead of the name, or add the name to DNS or /etc/hosts of every node"
        return Finding("rendezvous", "fail", f"{host} does not resolve on {this_host} ({error.strerror or error})", remedy)
    loopback = [address for address in addresses if ipaddress.ip_address(address.split("%")[0]).is_loopback]
    # A node's own name may be loopback on that node alone.
    if loopback and num_nodes > 1 and (node > 0 or host.startswith(("localhost", "127.", "::1"))):
        found = f"{host} is {loopback[0]} on {this_host}, which means each node itself"
        return Finding("rendezvous", "fail", found, "Name the first node as the others see it")
    if node > 0:
        return _check_other(host, port, addresses)
    own = {found.address.split("%")[0] for interface in psutil.net_if_addrs().values() for found in interface}
    if not loopback and not own & set(addresses):
        found = f"{host} is {addresses[0]}, which is not {this_host}, though this is node 0"
        return Finding("rendezvous", "fail", found, "Give node 0 to the host that HEAD names, or name this host")
    reason = _find_port_problem(port)
    if reason is not None:
        return Finding(
            "rendezvous",
            "fail",
            f"port {port} of {this_host} {reason}",
            "Choose another PORT, or end the program that listens there",
        )
    if loopback and num_nodes > 1:
        found = f"{host} is {loopback[0]} on itself, and must be another address on the other nodes"
        return Finding("rendezvous", "warn", found, "Set the name's address in /etc/hosts to the one that the others see")
    return Finding("rendezvous", "ok", f"{host}:{port} is free")


def _find_port_problem(port: int) -> str | None:
    """Return why torchrun cannot listen on this port, with the program that does; None if it can."""
    try:
        # Listen as torch's store does: closing connections of an earlier job do not count, a listener does.
        with closing(socket.create_server(("", port), reuse_port=False)):
            pass
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return f"cannot be opened ({error.strerror})"
    else:
        return None
    with suppress(psutil.Error, OSError):  # no permission
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:] == (port,) and connection.pid:
                return f"is taken by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "is taken"


def _check_other(host: str, port: int, addresses: Sequence[str]) -> Finding:
    """Check another node: the first node can be reached."""
    reasons: list[str] = []
    for address in addresses:
        try:
            with closing(socket.create_connection((address, port), timeout=CONNECT_SECONDS)):
                pass
        except ConnectionRefusedError:
            pass  # the host answers; its torchrun does not listen yet
        except OSError as error:
            reasons.append(f"{address}: {error.strerror or error}")
            continue
        return Finding("rendezvous", "ok", f"{host} answers")
    found = f"{host} cannot be reached from {socket.gethostname()} ({'; '.join(reasons)})"
    return Finding(
        "rendezvous", "fail", found, f"Open port {port} in firewalls, or give an address of a network that all nodes share"
    )


def find_route(host: str, port: int, num_nodes: int) -> tuple[str, str]:
    """Return (interface, own address) of the route from this node to the first.

    Raises:
        OSError: the name does not resolve, or no route was found.
    """
    own = _find_source_address((_resolve(host, port)[0], port))
    if num_nodes > 1 and ipaddress.ip_address(own).is_loopback:
        own = _find_source_address(ANYWHERE)
    for name, addresses in psutil.net_if_addrs().items():
        if own in {found.address.split("%")[0] for found in addresses}:
            return name, own
    return "lo", own


def _resolve(host: str, port: int) -> list[str]:
    return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


def _find_source_address(target: tuple[str, int]) -> str:
    """Return the source address of packets to `target`. Connecting a UDP socket sends nothing."""
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


if __name__ == "__main__":
    sys.exit(main())
