"""Simulated hosts: network namespaces with their own addresses, names and hosts file. They take root."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def can_be_made() -> bool:
    """Return whether this user can create network namespaces."""
    return os.geteuid() == 0 and shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None


class Hosts:
    """A context with hosts of these names, connected with each other and with this machine."""

    def __init__(self, names: Sequence[str], directory: Path) -> None:
        """`directory` holds the hosts file; all hosts see its path."""
        self.names, self.directory = list(names), directory
        # An interface name has at most 15 characters.
        self._tag = f"{os.getpid():x}{id(self) >> 4 & 0xFFF:03x}"
        self._net = f"10.{200 + os.getpid() % 50}.{id(self) >> 4 & 0xFF}"

    @property
    def gateway(self) -> str:
        """This machine's address in their network."""
        return f"{self._net}.1"

    def address(self, name: str) -> str:
        """Return the address of a host."""
        return f"{self._net}.{10 + self.names.index(name)}"

    def inside(self, name: str) -> list[str]:
        """Return the prefix that runs a command on a host. An unknown name gets only the hosts file, in the outer network."""
        net = ["nsenter", f"--net=/run/netns/{self._namespace(name)}"] if name in self.names else []
        setup = 'hostname "$0"; for file in hosts nsswitch.conf; do mount --bind "$HOSTS/$file" "/etc/$file"; done; exec "$@"'
        return [*net, "env", f"HOSTS={self.directory}", "unshare", "--uts", "--mount", "sh", "-ec", setup, name]

    def __enter__(self) -> "Hosts":
        lines = ["127.0.0.1 localhost", f"{self.gateway} ctl", *(f"{self.address(name)} {name}" for name in self.names)]
        (self.directory / "hosts").write_text("\n".join([*lines, ""]))
        (self.directory / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            self._ip("netns", "del", self._namespace(name), check=False)
        self._ip("link", "del", f"b{self._tag}", check=False)

    def _namespace(self, name: str) -> str:
        return f"h{self._tag}-{name}"

    def _connect(self) -> None:
        bridge = f"b{self._tag}"
        self._ip("link", "add", bridge, "type", "bridge")
        self._ip("addr", "add", f"{self.gateway}/24", "dev", bridge)
        self._ip("link", "set", bridge, "up")
        for number, name in enumerate(self.names):
            namespace, cable = self._namespace(name), f"c{self._tag}{number}"
            self._ip("netns", "add", namespace)
            self._ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            self._ip("link", "set", cable, "master", bridge, "up")
            self._ip("-n", namespace, "link", "set", "lo", "up")
            self._ip("-n", namespace, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            self._ip("-n", namespace, "link", "set", "eth0", "up")

    def _ip(self, *arguments: str, check: bool = True) -> None:
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        done = subprocess.run(
            ["ip", *arguments], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False, timeout=20
        )
        assert done.returncode == 0 or not check, f"ip {' '.join(arguments)}: {done.stderr}"


@contextmanager
def listening(inside: Sequence[str], port: int) -> Iterator[int]:
    """Let another program listen at a port of the host of prefix `inside`; yield its process id."""
    listen = f"import socket, time; server = socket.create_server(('', {port})); print('open', flush=True); time.sleep(600)"
    process = subprocess.Popen([*inside, sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process.pid
    finally:
        process.kill()
        process.communicate()
