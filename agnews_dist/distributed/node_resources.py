"""Ranks, threads and cores of this node, printed as shell assignments that launch/ranks.sh evaluates.

NPROC            the user's value, else one rank per GPU that the job shows, else one
OMP_NUM_THREADS  the user's value, else the job's cores on this node divided by the ranks
RANK_CORES       one list of cores per rank, as for `taskset --cpu-list`; empty: ranks are not bound to cores

MIG instances count as one device: CUDA shows a process only one of them, and NCCL does not connect two of one GPU.
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

from agnews_dist.distributed.slurm import slurm_count
from agnews_dist.errors import UserError

CORES = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")
PORTS = range(20000, 30000)
"""Ports that a job may open. Ports above could be taken by outgoing connections, even by a rank that connects to rank 0."""
NO_DEVICES = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs; old versions of Slurm set the last one."""


@dataclass(frozen=True)
class Cores:
    """CPU cores that this process may use."""

    allowed: tuple[int, ...]
    """Core numbers; hardware threads of one core, and cores of one socket, follow each other."""
    count: int
    """Cores that the job was given. Fewer if a CPU quota holds, or if Slurm does not confine the job to its cores."""

    @property
    def is_exclusive(self) -> bool:
        """True if no other job computes on these cores, so that ranks can be bound to them."""
        return self.count == len(self.allowed)


def count_devices(environ: Mapping[str, str]) -> int:
    """Return the number of GPUs that a process here sees; asks CUDA only if no variable says it."""
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        names = [name.strip() for name in shown.split(",")]
        if names[0] in NO_DEVICES:
            return 0
        return 1 if names[0].startswith("MIG-") else len(names)
    if (num_gpus := slurm_count(environ, "SLURM_GPUS_ON_NODE")) is not None:
        return num_gpus
    if "SLURM_JOB_ID" in environ:
        return 0  # the job did not request any
    import torch  # here, as it takes seconds

    return torch.cuda.device_count()


def find_cores(environ: Mapping[str, str]) -> Cores:
    """Return the cores that this process, its control group and its Slurm job may use."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        count = os.cpu_count() or 1
        return Cores(tuple(range(count)), count)
    allowed = tuple(sorted(os.sched_getaffinity(0), key=_locate))
    count = len(allowed)
    if (num_cpus := slurm_count(environ, "SLURM_CPUS_ON_NODE")) is not None:
        count = min(count, num_cpus)
    try:
        quota, period = QUOTA.read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or its limit is "max"
        pass
    return Cores(allowed, count)


def _locate(core: int) -> tuple[int, int, int]:
    """Return (socket, physical core, number): a sort key by which hardware threads of one core are neighbours."""
    found: list[int] = []
    for name in ("physical_package_id", "core_id"):
        try:
            found.append(int((CORES / f"cpu{core}" / "topology" / name).read_text()))
        except (OSError, ValueError):
            found.append(0)
    return found[0], found[1], core


def free_port() -> int:
    """Return a port of `PORTS` that is free on this node now."""
    for port in random.sample(PORTS, len(PORTS)):
        try:
            with closing(socket.create_server(("", port))):
                return port
        except OSError:
            continue
    raise UserError(
        f"no port from {PORTS[0]} to {PORTS[-1]} is free on {socket.gethostname()}: the ranks cannot meet. "
        "End programs that listen there (ss --listening --tcp)."
    )


def choose_variables(environ: Mapping[str, str], cores: Cores, launcher: str) -> dict[str, str]:
    """Return the variables that the module's docstring lists."""
    given = environ.get("NPROC") or str(max(1, count_devices(environ)))
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"NPROC={given!r}: {launcher} needs a number of ranks, at least 1. Set NPROC=2, for example.")
    num_ranks = int(given)
    threads = environ.get("OMP_NUM_THREADS") or str(max(1, cores.count // num_ranks))
    share = len(cores.allowed) // num_ranks
    bound: list[str] = []
    if cores.is_exclusive and "SLURM_JOB_ID" in environ and num_ranks > 1 and share >= 1:
        bound = [",".join(map(str, cores.allowed[i * share : (i + 1) * share])) for i in range(num_ranks)]
    return {"NPROC": str(num_ranks), "OMP_NUM_THREADS": threads, "RANK_CORES": " ".join(bound)}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the assignments and return the exit code. The only argument is the launcher's name, for messages."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        found = choose_variables(os.environ, find_cores(os.environ), arguments[0] if arguments else "torchrun")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
