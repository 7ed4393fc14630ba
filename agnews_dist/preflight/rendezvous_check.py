"""Can this node meet the others at the first one? Names, interfaces, ports: asked before torchrun, which would wait a minute,
or end with a traceback. Knows no torch.
"""

import errno
import ipaddress
import socket
from contextlib import closing
from dataclasses import dataclass

import psutil

from agnews_dist.errors import ConfigError, UserError
from agnews_dist.preflight.findings import Finding

CHECK = "rendezvous"
CONNECT_SECONDS = 3.0
ANYWHERE = ("198.51.100.1", 9)
"""An address of nobody (RFC 5737): the way there is the default route. Nothing is sent."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the nodes of a job meet, seen from one of them."""

    host: str
    port: int
    num_nodes: int
    node: int
    """This one's number; 0 is the first, where they meet."""

    @property
    def is_head(self) -> bool:
        """Whether they meet here."""
        return self.node == 0


def parse_endpoint(endpoint: str, *, num_nodes: int, node: int) -> Meeting:
    """`HOST:PORT`, as torchrun takes it.

    Raises:
        ConfigError: it is none, or the numbers do not fit.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--endpoint {endpoint!r} is no HOST:PORT: there would be nowhere to meet. Give a name or address and a port from "
            "1 to 65535, node1:29400 for example."
        )
    if not 0 <= node < num_nodes:
        raise ConfigError(
            f"--node {node} of --nodes {num_nodes}: nodes count from 0, so nobody waits for this one. Lower --node."
        )
    return Meeting(host=host.strip("[]"), port=int(port), num_nodes=num_nodes, node=node)


def look(meeting: Meeting) -> Finding:
    """What stands between this node and the meeting, if anything does; at most some seconds."""
    here = socket.gethostname()
    try:
        addresses = _resolve(meeting)
    except OSError as error:
        return _fail(
            f"{meeting.host} does not resolve on {here} ({error.strerror or error})",
            "Take an address instead of the name, or have it put into DNS or /etc/hosts of every node",
        )
    loopback = [address for address in addresses if ipaddress.ip_address(address.split("%")[0]).is_loopback]
    if loopback and meeting.num_nodes > 1 and (not meeting.is_head or _is_this_machine_by_name(meeting.host)):
        return _fail(
            f"{meeting.host} is {loopback[0]} on {here}: every node's own, so each would wait for itself",
            "Name the first node as the others see it",
        )
    return _look_here(meeting, addresses, loopback) if meeting.is_head else _look_there(meeting, addresses)


def _look_here(meeting: Meeting, addresses: list[str], loopback: list[str]) -> Finding:
    here = socket.gethostname()
    own = {found.address.split("%")[0] for interface in psutil.net_if_addrs().values() for found in interface}
    if not loopback and not own & set(addresses):
        return _fail(
            f"{meeting.host} is {addresses[0]}, which is not {here}, though this is node 0",
            "Number the nodes so that 0 is the one they meet at, or name this one",
        )
    try:
        # What torch's store does too. Connections of an earlier job that fade away do not count, a listener does.
        with closing(socket.create_server(("", meeting.port), reuse_port=False)):
            pass
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return _fail(f"port {meeting.port} of {here} cannot be opened ({error.strerror})", "Choose another PORT")
        return _fail(
            f"port {meeting.port} of {here} is taken{_owner(meeting.port)}: the nodes would talk to that program",
            "Choose another PORT, or end that program",
        )
    if loopback and meeting.num_nodes > 1:
        return Finding(
            check=CHECK,
            verdict="warn",
            found=f"{meeting.host} is {loopback[0]} on itself, and must be another address on the other nodes",
            remedy="Have the name's line in /etc/hosts give the address that the others see",
        )
    return Finding(check=CHECK, verdict="ok", found=f"{meeting.host}:{meeting.port} is free, on {_way(meeting)}")


def _look_there(meeting: Meeting, addresses: list[str]) -> Finding:
    here = socket.gethostname()
    reasons: list[str] = []
    for address in addresses:
        try:
            with closing(socket.create_connection((address, meeting.port), timeout=CONNECT_SECONDS)):
                pass
        except ConnectionRefusedError:
            pass  # it answers; its torchrun has not begun to listen yet
        except OSError as error:
            reasons.append(f"{address}: {error.strerror or error}")
            continue
        return Finding(check=CHECK, verdict="ok", found=f"{meeting.host} answers, over {_way(meeting)}")
    return _fail(
        f"{meeting.host} cannot be reached from {here} ({'; '.join(reasons)})",
        f"Look for a firewall that closes port {meeting.port}, or take an address of a network that all nodes share",
    )


def route(meeting: Meeting) -> tuple[str, str]:
    """(interface, own address) of the way from this node to the first.

    Raises:
        UserError: there is none.
    """
    try:
        target = _resolve(meeting)[0]
        own = _source((target, meeting.port))
        if meeting.num_nodes > 1 and ipaddress.ip_address(own).is_loopback:
            own = _source(ANYWHERE)
    except OSError as error:
        raise UserError(
            f"no way from {socket.gethostname()} to {meeting.host} ({error.strerror or error}): the ranks could not talk. Run "
            "the doctor with the same --endpoint, which says why."
        ) from error
    for name, addresses in psutil.net_if_addrs().items():
        if own in {found.address.split("%")[0] for found in addresses}:
            return name, own
    return "lo", own


def _resolve(meeting: Meeting) -> list[str]:
    found = socket.getaddrinfo(meeting.host, meeting.port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _source(target: tuple[str, int]) -> str:
    """The address that packets to `target` would come from; none is sent."""
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _way(meeting: Meeting) -> str:
    try:
        interface, address = route(meeting)
    except UserError:
        return "an unknown interface"
    return f"{interface} ({address})"


def _is_this_machine_by_name(host: str) -> bool:
    """Whether the name means this machine on every machine; a node's own name may mean loopback on itself alone."""
    if host == "localhost" or host.startswith("localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _owner(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and tuple(connection.laddr)[1:] == (port,) and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError):  # another user's
        pass
    return ""


def _fail(found: str, remedy: str) -> Finding:
    return Finding(check=CHECK, verdict="fail", found=found, remedy=remedy)
