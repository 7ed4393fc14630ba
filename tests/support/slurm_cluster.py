"""A real Slurm for tests: munge, slurmctld and two slurmd on this machine, brought up and taken down by `Lab`.

as root     every node has its own network namespace, host name and hosts file, as two machines have
otherwise   both daemons run on loopback, and their names are their addresses

Needs Debian's slurm-wlm and munge. Beside a cluster's Slurm it harms nothing: keys, sockets, ports and state are its own.
"""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from support.network_hosts import Hosts, can_be_made

NUM_NODES, CORES, MEMORY_MB, GPUS = 2, 4, 16000, 8
CLIENT_SECONDS, START_SECONDS = 60, 120
"""Limits for a client or daemon to return, and for the nodes to be there: many times what a busy machine needs."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
{addresses}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
TaskPlugin=task/none
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MinJobAge=3600
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=40
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Lab:
    """A context: a running cluster of two nodes with the partitions `main` (preemptible) and `high`."""

    def __init__(self) -> None:
        # Short: a socket's path has at most 107 characters.
        self.root = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
        self.root.chmod(0o755)
        self.is_networked = can_be_made()
        self.nodes = [f"node{i + 1}" if self.is_networked else f"127.0.1.{i + 1}" for i in range(NUM_NODES)]
        self.environ = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN", "MUNGE"))
        }
        self.environ |= {"PATH": _path(), "SLURM_CONF": str(self.root / "slurm.conf")}
        self._hosts = Hosts(self.nodes, self.root)

    def __enter__(self) -> "Lab":
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    # --- what tests do with it ---

    def client(self, *command: str, check: bool = True, **environ: str) -> str:
        """Run a Slurm client; what it printed."""
        done = subprocess.run(
            command, env={**self.environ, **environ}, capture_output=True, text=True, check=False, timeout=CLIENT_SECONDS
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *arguments: str | Path, cwd: Path, environ: Mapping[str, str]) -> str:
        """Submit a job; its number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)],
            env={**self.environ, **environ},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=CLIENT_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Of a job, or of all tasks of an array, each state once."""
        states = self.client("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").split()
        return " ".join(sorted(set(states)))

    def wait_for(self, holds: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
        """Until something holds; `what` tells how it stands if that does not come about."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"not within {seconds} s: {what()}"
            time.sleep(0.5)

    def ends(self, job: str, seconds: float = 120) -> str:
        """Wait for the end of a job, requeues included; its last state."""
        self.wait_for(lambda: set(self.state(job).split()) <= set(ENDED), seconds, lambda: self.describe_job(job))
        return self.state(job)

    def describe_job(self, job: str) -> str:
        """Return the state, logs and controller log of a job, for a failed test's message."""
        shown = self.client("scontrol", "show", "job", job, check=False)
        logs: list[str] = []
        for file in re.findall(r"StdOut=(\S+)", shown):
            with suppress(OSError):
                logs.append(f"--- {file}\n{Path(file).read_text(errors='replace')[-6000:]}")
        control = (self.root / "slurmctld.log").read_text(errors="replace")[-2000:]
        return "\n".join([shown, *logs, "--- slurmctld", control])

    def set_down(self, node: str) -> None:
        """As an administrator, or Slurm itself when a node dies: its jobs are gone at once."""
        self.client("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def set_up(self, node: str) -> None:
        """Bring a node back that was set down, unless Slurm has done so: its daemon still answers."""
        self.client("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        shown = ("sinfo", "-h", "-n", node, "-o", "%T")
        self.wait_for(lambda: "down" not in self.client(*shown), START_SECONDS, lambda: self.client(*shown))

    def inside(self, host: str) -> list[str]:
        """What runs a command on a node."""
        return self._hosts.inside(host) if self.is_networked else []

    # --- up and down ---

    def _start(self) -> None:
        root = self.root
        for name in ("state", "spool", "gpus"):
            (root / name).mkdir()
        key = root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemon(
            *("munged", "--force", f"--key-file={key}", f"--socket={root}/munge.socket", f"--pid-file={root}/munged.pid"),
            *(f"--log-file={root}/munged.log", f"--seed-file={root}/munged.seed", "--num-threads=2"),
        )
        self._configure()
        if self.is_networked:
            self._hosts.__enter__()
        self._daemon(*self.inside("ctl"), "slurmctld", "-c")
        for name in self.nodes:
            (root / "spool" / name).mkdir()
            self._daemon(*self.inside(name), "slurmd", "-N", name)
        idle = ("sinfo", "-h", "-N", "-t", "idle", "-p", "main", "-o", "%N")
        self.wait_for(
            lambda: len(self.client(*idle, check=False).split()) == NUM_NODES,
            START_SECONDS,
            lambda: "".join(log.read_text(errors="replace")[-3000:] for log in root.glob("*.log")),
        )

    def _configure(self) -> None:
        root, devices = self.root, self._fake_gpus()
        gres = f"Name=gpu Count={GPUS}" + (f" File={devices}" if devices else "")
        (root / "gres.conf").write_text(f"{gres}\n")
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        if self.is_networked:
            controller, port, addresses = f"ctl({self._hosts.gateway})", 6817, "CommunicationParameters=NoCtldInAddrAny"
            places = [(name, self._hosts.address(name), 6818) for name in self.nodes]
        else:
            controller, port, addresses = "localhost", _free_ports(NUM_NODES + 1), ""
            places = [("localhost", name, port + 1 + i) for i, name in enumerate(self.nodes)]
        text = CONFIGURATION.format(controller=controller, port=port, user=getpass.getuser(), root=root, addresses=addresses)
        for name, (host, address, own_port) in zip(self.nodes, places, strict=True):
            text += (
                f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={own_port} CPUs={CORES} "
                f"RealMemory={MEMORY_MB} Gres=gpu:{GPUS}\n"
            )
        # Nodes stand before the partitions that name them all.
        lines = text.splitlines()
        lines.sort(key=lambda line: line.startswith("PartitionName"))
        (root / "slurm.conf").write_text("\n".join([*lines, ""]))

    def _fake_gpus(self) -> str | None:
        """Character devices with numbers at their ends, from which Slurm makes CUDA_VISIBLE_DEVICES; nobody opens them."""
        for i in range(GPUS):
            try:
                os.mknod(self.root / "gpus" / f"nvidia{i}", 0o666 | 0o020000, os.makedev(1, 3))
            except PermissionError:
                return "/dev/tty[0-7]" if Path("/dev/tty7").exists() else None
        return f"{self.root}/gpus/nvidia[0-{GPUS - 1}]"

    def _daemon(self, *command: str) -> None:
        # Files, not pipes: a daemon keeps what it inherits, and a pipe's other end would wait for it.
        with (self.root / "start.log").open("a") as log:
            done = subprocess.run(
                command, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False, timeout=CLIENT_SECONDS
            )
        assert done.returncode == 0, f"{command}: {(self.root / 'start.log').read_text()}"

    def _stop(self) -> None:
        with suppress(OSError, subprocess.SubprocessError, AssertionError):
            self.client("scancel", "--user", getpass.getuser(), check=False)
            self.client("scancel", "--signal=KILL", "--full", "--user", getpass.getuser(), check=False)
        daemons = [path for path in (self.root / "slurmctld.pid", *self.root.glob("slurmd-*.pid")) if path.is_file()]
        self._end_daemons([*daemons, self.root / "munged.pid"])
        # Whatever outlived its job is known by the configuration in its environment.
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get("SLURM_CONF") == self.environ["SLURM_CONF"] and process.pid != os.getpid():
                    process.kill()
        if self.is_networked:
            self._hosts.__exit__()
        shutil.rmtree(self.root, ignore_errors=True)

    def _end_daemons(self, files: Sequence[Path]) -> None:
        daemons: list[psutil.Process] = []
        for path in files:
            with suppress(OSError, ValueError, psutil.Error):
                process = psutil.Process(int(path.read_text()))
                if process.name() in PROGRAMS:
                    process.send_signal(signal.SIGTERM)
                    daemons.append(process)
        for process in psutil.wait_procs(daemons, timeout=10)[1]:
            process.kill()


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    begin = os.getpid() % 625  # another test process looks at the same time
    for first in (21000 + 16 * ((begin + i) % 625) for i in range(625)):
        doors: list[socket.socket] = []
        try:
            doors += [socket.create_server(("127.0.0.1", first + i)) for i in range(count)]
        except OSError:
            continue
        finally:
            for door in doors:
                door.close()
        return first
    raise AssertionError("no free ports")
