"""Check that this node can meet the others at the first node, before torchrun, which waits a minute or prints a traceback.

`python -m agnews_dist.preflight.rendezvous_check --endpoint HOST:PORT --nodes N --node I [--print_interface]`; loads no torch.
"""

import argparse
import errno
import ipaddress
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import psutil

from agnews_dist.preflight.findings import Finding

CONNECT_SECONDS = 3.0
ANYWHERE = ("198.51.100.1", 9)
"""An unused address (RFC 5737), reached over the default route. Nothing is sent to it."""


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Endpoint of a job's nodes, from one node's point of view."""

    host: str
    port: int
    num_nodes: int
    node: int
    """Number of this node; the endpoint is on node 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the rendezvous, or print interface and address for a script. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="rendezvous_check", description="Check that this node can meet the others.")
    parser.add_argument("--endpoint", required=True, help="HOST:PORT on the first node.")
    parser.add_argument("--nodes", type=int, default=1, help="Number of nodes.")
    parser.add_argument("--node", type=int, default=0, help="Number of this node, from 0.")
    parser.add_argument("--print_interface", action="store_true", help="Print this node's interface and address.")
    options = parser.parse_args(argv)
    host, _, port = options.endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        parser.error(f"--endpoint {options.endpoint}: must be HOST:PORT with a port from 1 to 65535, such as node1:29400")
    rendezvous = Rendezvous(host=host.strip("[]"), port=int(port), num_nodes=options.nodes, node=options.node)
    if options.print_interface:
        try:
            print(*find_route(rendezvous))
        except OSError as error:
            print(f"error: no route to {host}: {error.strerror or error}. Check name and network.", file=sys.stderr)
            return 1
        return 0
    finding = check_rendezvous(rendezvous)
    if finding.remedy:
        label = "error" if finding.verdict == "fail" else "warning"
        print(f"{label}: rendezvous: {finding.found}. {finding.remedy}.", file=sys.stderr)
    return int(finding.verdict == "fail")


def check_rendezvous(rendezvous: Rendezvous) -> Finding:
    """Check names, addresses and the port. Takes a few seconds at most."""
    this_host, host = socket.gethostname(), rendezvous.host
    try:
        addresses = _resolve(rendezvous)
    except OSError as error:
        return _fail(
            f"{host} does not resolve on {this_host} ({error.strerror or error})",
            "Give an address instead of the name, or add the name to DNS or /etc/hosts of every node",
        )
    loopback = [address for address in addresses if ipaddress.ip_address(address.split("%")[0]).is_loopback]
    is_head = rendezvous.node == 0
    if loopback and rendezvous.num_nodes > 1 and (not is_head or _is_always_loopback(host)):
        return _fail(
            f"{host} is {loopback[0]} on {this_host}, which means each node itself", "Name the first node as the others see it"
        )
    return _check_head(rendezvous, addresses, loopback) if is_head else _check_other(rendezvous, addresses)


def _check_head(rendezvous: Rendezvous, addresses: list[str], loopback: list[str]) -> Finding:
    """Check the first node: the address is its own, and the port is free."""
    this_host, host, port = socket.gethostname(), rendezvous.host, rendezvous.port
    own = {found.address.split("%")[0] for interface in psutil.net_if_addrs().values() for found in interface}
    if not loopback and not own & set(addresses):
        return _fail(
            f"{host} is {addresses[0]}, which is not {this_host}, though this is node 0",
            "Give node 0 to the host that HEAD names, or name this host",
        )
    try:
        # Listen as torch's store does: closing connections of an earlier job do not count, a listener does.
        with closing(socket.create_server(("", port), reuse_port=False)):
            pass
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return _fail(f"port {port} of {this_host} cannot be opened ({error.strerror})", "Choose another PORT")
        return _fail(f"port {port} of {this_host} is taken{_find_owner(port)}", "Choose another PORT, or end that program")
    if loopback and rendezvous.num_nodes > 1:
        found = f"{host} is {loopback[0]} on itself, and must be another address on the other nodes"
        remedy = "Set the name's address in /etc/hosts to the one that the others see"
        return Finding(check="rendezvous", verdict="warn", found=found, remedy=remedy)
    return Finding(check="rendezvous", verdict="ok", found=f"{host}:{port} is free")


def _check_other(rendezvous: Rendezvous, addresses: list[str]) -> Finding:
    """Check another node: the first node can be reached."""
    reasons: list[str] = []
    for address in addresses:
        try:
            with closing(socket.create_connection((address, rendezvous.port), timeout=CONNECT_SECONDS)):
                pass
        except ConnectionRefusedError:
            pass  # the host answers; its torchrun does not listen yet
        except OSError as error:
            reasons.append(f"{address}: {error.strerror or error}")
            continue
        return Finding(check="rendezvous", verdict="ok", found=f"{rendezvous.host} answers")
    return _fail(
        f"{rendezvous.host} cannot be reached from {socket.gethostname()} ({'; '.join(reasons)})",
        f"Open port {rendezvous.port} in firewalls, or give an address of a network that all nodes share",
    )


def find_route(rendezvous: Rendezvous) -> tuple[str, str]:
    """Return (interface, own address) of the route from this node to the first.

    Raises:
        OSError: the name does not resolve, or no route was found.
    """
    own = _find_source_address((_resolve(rendezvous)[0], rendezvous.port))
    if rendezvous.num_nodes > 1 and ipaddress.ip_address(own).is_loopback:
        own = _find_source_address(ANYWHERE)
    for name, addresses in psutil.net_if_addrs().items():
        if own in {found.address.split("%")[0] for found in addresses}:
            return name, own
    return "lo", own


def _resolve(rendezvous: Rendezvous) -> list[str]:
    found = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _find_source_address(target: tuple[str, int]) -> str:
    """Return the source address of packets to `target`. Connecting a UDP socket sends nothing."""
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _is_always_loopback(host: str) -> bool:
    """Return whether the name is loopback on every machine. A node's own name may be loopback on that node alone."""
    if host == "localhost" or host.startswith("localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _find_owner(port: int) -> str:
    """Return ` by process PID (NAME)` of the program that listens, or nothing if another user owns it."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:] == (port,) and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError):  # no permission
        pass
    return ""


def _fail(found: str, remedy: str) -> Finding:
    return Finding(check="rendezvous", verdict="fail", found=found, remedy=remedy)


if __name__ == "__main__":
    sys.exit(main())
