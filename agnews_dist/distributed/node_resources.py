"""How many ranks this node should run, with which threads and cores. Prints shell assignments: launch/ranks.sh evaluates them.

NPROC            what the user says; else one per GPU that the job shows; else one
OMP_NUM_THREADS  what the user says; else the cores that the job has here, divided among the ranks
RANK_CORES       one list of cores per rank, in the form of `taskset --cpu-list`; empty: ranks are not bound

CUDA shows a process one MIG instance, and NCCL connects no two of one GPU: instances count as one device.
"""

import os
import random
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from agnews_dist.errors import UserError

CORES = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
PORTS = range(20000, 30000)
"""Of what a job opens. Those that the system gives to connections by itself lie above: one of them could be taken before rank 0
listens there, even by a rank that looks for it, which then hears itself."""
NO_DEVICES = ("", "-1", "NoDevFiles")
"""What hides all GPUs: the last is an old Slurm's word."""


@dataclass(frozen=True)
class Cores:
    """The cores this process may use."""

    allowed: tuple[int, ...]
    """Numbers, neighbours on the chip beside each other."""
    count: int
    """How many of them are the job's: fewer where a limit of time, not of cores, holds, or where Slurm does not confine."""

    @property
    def are_ours(self) -> bool:
        """Whether no other job computes on them: only then ranks may be bound."""
        return self.count == len(self.allowed)


def count_devices(environ: Mapping[str, str]) -> int:
    """GPUs that a process here would see, without asking CUDA where the environment tells."""
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        names = [name.strip() for name in shown.split(",")]
        if names[0] in NO_DEVICES:
            return 0
        return 1 if names[0].startswith("MIG-") else len(names)
    if environ.get("SLURM_GPUS_ON_NODE", "").isdecimal():
        return int(environ["SLURM_GPUS_ON_NODE"])
    if "SLURM_JOB_ID" in environ:
        return 0  # a job that asked for none
    import torch  # seconds: only where nothing else tells

    return torch.cuda.device_count()


def find_cores(environ: Mapping[str, str]) -> Cores:
    """The cores that this process, its control group and its Slurm job may use."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        count = os.cpu_count() or 1
        return Cores(tuple(range(count)), count)
    allowed = tuple(sorted(os.sched_getaffinity(0), key=_place))
    count = len(allowed)
    of_job = environ.get("SLURM_CPUS_ON_NODE", "")
    if of_job.isdecimal():
        count = min(count, int(of_job))
    try:
        quota, period = QUOTA.read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or "max"
        pass
    return Cores(allowed, count)


def _place(core: int) -> tuple[int, int, int]:
    """Socket and physical core, so that siblings are neighbours."""
    found: list[int] = []
    for name in ("physical_package_id", "core_id"):
        try:
            found.append(int((CORES / f"cpu{core}" / "topology" / name).read_text()))
        except (OSError, ValueError):
            found.append(0)
    return found[0], found[1], core


def free_port() -> int:
    """One of `PORTS` that nothing uses here at the moment.

    Raises:
        UserError: all are taken.
    """
    for port in random.sample(PORTS, len(PORTS)):
        try:
            with closing(socket.create_server(("", port))):
                return port
        except OSError:
            continue
    raise UserError(
        f"no port from {PORTS[0]} to {PORTS[-1]} is free on {socket.gethostname()}: the ranks would have nowhere to meet. End "
        "what listens there (ss --listening --tcp)."
    )


def settings(environ: Mapping[str, str], cores: Cores, launcher: str) -> dict[str, str]:
    """The variables of the module's text.

    Raises:
        UserError: NPROC is no count.
    """
    given = environ.get("NPROC") or str(max(1, count_devices(environ)))
    if not given.isdecimal() or int(given) < 1:
        raise UserError(
            f"NPROC={given!r} is no count: {launcher} would not know how many ranks to start. Give a number such as NPROC=2."
        )
    num_ranks = int(given)
    threads = environ.get("OMP_NUM_THREADS") or str(max(1, cores.count // num_ranks))
    share = len(cores.allowed) // num_ranks
    bound: list[str] = []
    if cores.are_ours and "SLURM_JOB_ID" in environ and num_ranks > 1 and share >= 1:
        bound = [",".join(map(str, cores.allowed[i * share : (i + 1) * share])) for i in range(num_ranks)]
    return {"NPROC": str(num_ranks), "OMP_NUM_THREADS": threads, "RANK_CORES": " ".join(bound)}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the assignments; the only argument is the launcher's name, for messages. Returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        found = settings(os.environ, find_cores(os.environ), arguments[0] if arguments else "torchrun")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
