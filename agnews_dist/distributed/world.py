"""The rank of this process, read once from the launcher's environment variables and passed on as a `World`.

torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. The deepspeed launcher calls the last
one LOCAL_SIZE. Without a launcher there is one rank. A process that is one of several but has no rank is refused: each of them
would train alone on all the data.
"""

import socket
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

from agnews_dist.errors import UserError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
DEEPSPEED_LOCAL_WORLD_SIZE = "LOCAL_SIZE"
TASK_COUNTS = {
    "SLURM_STEP_NUM_TASKS": ("srun", "srun --ntasks-per-node=1"),
    "OMPI_COMM_WORLD_SIZE": ("mpirun", "mpirun --npernode 1"),
    "PMI_SIZE": ("mpirun", "mpirun -ppn 1"),
    "MV2_COMM_WORLD_SIZE": ("mpirun", "mpirun -ppn 1"),
}
"""Variable with the number of processes -> (program that started them, its command line for one per node)."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the job's processes; `local_` counts within the node."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    ranks_per_node: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    @property
    def label(self) -> str:
        """Prefix of this rank's messages: `[rank 3/8]`."""
        return f"[rank {self.rank}/{self.num_ranks}]"

    def prefix_of(self, rank: int) -> str:
        """Return the prefix of a message about a rank: `[rank 3/8] `; empty where there is only one."""
        return f"[rank {rank}/{self.num_ranks}] " if self.num_ranks > 1 else ""


def detect_world(environ: Mapping[str, str]) -> World:
    """Read the launcher's variables.

    Raises:
        UserError: some variables are missing, not numbers or contradictory, or several processes were started without ranks.
    """
    given = {name: environ[name] for name in LAUNCHER_VARIABLES if environ.get(name)}
    # Only if a launcher set another variable too: LOCAL_SIZE alone may be any program's.
    if given and environ.get(DEEPSPEED_LOCAL_WORLD_SIZE):
        local_size = environ[DEEPSPEED_LOCAL_WORLD_SIZE]
        if given.setdefault("LOCAL_WORLD_SIZE", local_size) != local_size:
            raise UserError(
                f"LOCAL_WORLD_SIZE={given['LOCAL_WORLD_SIZE']} (torchrun) and LOCAL_SIZE={local_size} (deepspeed): one is left "
                "from another job. Unset both before you start the launcher."
            )
    if not given:
        _refuse_processes_without_ranks(environ)
        return World()
    missing = [name for name in LAUNCHER_VARIABLES if name not in given]
    if missing:
        raise UserError(
            f"{', '.join(given)} set but {', '.join(missing)} missing: the ranks cannot find each other. "
            "Start with torchrun, or unset these variables for a single process."
        )
    for name, value in given.items():
        if not value.isdigit():
            raise UserError(f"{name}={value!r}: must be a whole number. Start the job with torchrun.")
    rank, num_ranks, local_rank, ranks_per_node = (int(given[name]) for name in LAUNCHER_VARIABLES)
    if rank >= num_ranks or local_rank >= ranks_per_node or ranks_per_node > num_ranks:
        raise UserError(
            f"RANK={rank} of WORLD_SIZE={num_ranks}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={ranks_per_node}: these do "
            "not match. Start the job with torchrun, which sets all four."
        )
    return World(rank=rank, num_ranks=num_ranks, local_rank=local_rank, ranks_per_node=ranks_per_node)


def print_line(text: str) -> None:
    """Print to standard error in a single write: ranks share it, and `print` under torchrun would let their lines mix."""
    with suppress(OSError, ValueError, AttributeError):  # the terminal is gone, or standard error is closed
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


SPEAK_SECONDS = 5.0
"""Length of a wait from which it is reported."""


@contextmanager
def unless_done_in(seconds: float, action: Callable[[], object]) -> Generator[None]:
    """Run `action` in a thread if the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def announced(world: World, describe: Callable[[], str]) -> AbstractContextManager[None]:
    """Print what `describe` returns if the block takes longer than SPEAK_SECONDS: what the rank waits for. Once per node."""
    if world.local_rank > 0:
        return nullcontext()
    return unless_done_in(SPEAK_SECONDS, lambda: print_line(f"{world.label} waits {describe()}"))


def is_launched(environ: Mapping[str, str]) -> bool:
    """Return whether a launcher has given this process a rank."""
    return bool(environ.get(LAUNCHER_VARIABLES[0]))


def check_interfaces(environ: Mapping[str, str], world: World) -> None:
    """Check that the network interfaces that gloo is to use exist, before every rank fails at the rendezvous.

    Raises:
        UserError: one does not.
    """
    known = [name for _, name in socket.if_nameindex()]
    for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if world.num_ranks > 1 else ():
        if name and name not in known:
            raise UserError(
                f"GLOO_SOCKET_IFNAME {name}: {socket.gethostname()} has no such network interface, only {', '.join(known)}. "
                "Correct or unset it."
            )


def _refuse_processes_without_ranks(environ: Mapping[str, str]) -> None:
    for name, (starter, one_per_node) in TASK_COUNTS.items():
        tasks = environ.get(name, "1")
        # In the shell of `srun --pty bash` one process is what the user wants, however many tasks the allocation has.
        if starter == "srun" and environ.get("SLURM_PTY_PORT") and environ.get("SLURM_PROCID") == "0":
            continue
        if tasks.isdigit() and int(tasks) > 1:
            raise UserError(
                f"{starter} started {tasks} tasks without torchrun: each would train alone on all the data. "
                f"Start one task per node with '{one_per_node} torchrun ... -m agnews_dist.train'."
            )
    # accelerate sets MASTER_PORT only for several processes, and without GPUs starts a single one all the same.
    port = environ.get("MASTER_PORT")
    if port and environ.get("ACCELERATE_MIXED_PRECISION"):
        raise UserError(
            f"accelerate launch started one process, with MASTER_PORT={port}: on a CPU it starts no others. "
            "Use launch/accelerate.sh, or unset MASTER_PORT for a single process."
        )
