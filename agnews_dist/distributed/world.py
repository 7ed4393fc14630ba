"""Which rank is this: the launcher's environment, read once at the edge and passed in.

torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, the deepspeed launcher calls the last
one LOCAL_SIZE; without a launcher there is one rank. Nothing else in the package reads these variables. A process that is one
of several, but was not told which, is refused: all of them would train, each alone on all the data.
"""

import re
from collections.abc import Mapping
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
"""How many processes were started by what, and how it starts one per node: it gives them no ranks that torch understands."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the job's processes; `local_` counts within the node."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    ranks_per_node: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return self.rank == 0

    @property
    def label(self) -> str:
        """How a message names this rank: `[rank 3/8]`."""
        return f"[rank {self.rank}/{self.num_ranks}]"


def detect_world(environ: Mapping[str, str]) -> World:
    """Read the launcher's variables.

    Raises:
        UserError: some of the variables are missing, no numbers or at odds; the rank is outside the world; or several
            processes were started without ranks, which would be several independent trainings.
    """
    given = {name: environ[name] for name in LAUNCHER_VARIABLES if environ.get(name)}
    # Only with what a launcher sets for every rank: alone, LOCAL_SIZE may be anybody's.
    if given and environ.get(DEEPSPEED_LOCAL_WORLD_SIZE):
        of_deepspeed = environ[DEEPSPEED_LOCAL_WORLD_SIZE]
        of_torchrun = given.setdefault("LOCAL_WORLD_SIZE", of_deepspeed)
        if of_torchrun != of_deepspeed:
            raise UserError(
                f"LOCAL_WORLD_SIZE={of_torchrun} but LOCAL_SIZE={of_deepspeed}: torchrun sets the one, the deepspeed launcher "
                "the other, and one is left from another job. Unset both before you start the launcher."
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
            raise UserError(f"{name}={value!r} is no count: the ranks cannot be numbered. Start the job with torchrun.")
    rank, num_ranks, local_rank, ranks_per_node = (int(given[name]) for name in LAUNCHER_VARIABLES)
    if rank >= num_ranks or local_rank >= ranks_per_node or ranks_per_node > num_ranks:
        raise UserError(
            f"RANK={rank} of WORLD_SIZE={num_ranks}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={ranks_per_node} do "
            "not match: a rank outside the world would hang the others. Start the job with torchrun, which sets all four."
        )
    return World(rank=rank, num_ranks=num_ranks, local_rank=local_rank, ranks_per_node=ranks_per_node)


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher has given this process a rank."""
    return bool(environ.get(LAUNCHER_VARIABLES[0]))


def ranks_of_srun(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would tell this task of a bare `srun`, for stories that may run without restarts; empty: there is none.

    Tasks meet at the first node, at a port made from the job's number.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if is_launched(environ) or not tasks.isdecimal() or int(tasks) < 2:
        return {}
    node = int(environ.get("SLURM_NODEID", "0"))
    counts = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", tasks))
    hosts = expand_nodes(environ.get("SLURM_STEP_NODELIST", "localhost"))
    rank, size, local_rank, local_size = LAUNCHER_VARIABLES
    return {
        rank: environ.get("SLURM_PROCID", "0"),
        size: tasks,
        local_rank: environ.get("SLURM_LOCALID", "0"),
        local_size: str(counts[node] if node < len(counts) else 1),
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 10000),
    }


def expand_counts(text: str) -> list[int]:
    """Slurm's counts per node: `2(x3),1` is 2, 2, 2, 1."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(count)] * int(times or 1)
    return found


def expand_nodes(text: str) -> list[str]:
    """Slurm's list of nodes: `gpu[01-02,7],login` is gpu01, gpu02, gpu7, login."""
    found: list[str] = []
    for name in re.findall(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", text):
        expanded = [""]
        for plain, choice in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", name):
            endings = [plain] if plain else [number for part in choice.split(",") for number in _numbers(part)]
            expanded = [begin + end for begin in expanded for end in endings]
        found += expanded
    return found


def _numbers(part: str) -> list[str]:
    first, _, last = part.partition("-")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]


def _refuse_processes_without_ranks(environ: Mapping[str, str]) -> None:
    for name, (starter, one_per_node) in TASK_COUNTS.items():
        tasks = environ.get(name, "1")
        if tasks.isdigit() and int(tasks) > 1:
            raise UserError(
                f"{starter} started {tasks} tasks without torchrun: each would train alone on all the data. "
                f"Start one task per node with '{one_per_node} torchrun ... -m agnews_dist.train'."
            )
    # accelerate says where the ranks meet only when asked for several processes, and without GPUs starts one all the same.
    port = environ.get("MASTER_PORT")
    if port and environ.get("ACCELERATE_MIXED_PRECISION"):
        raise UserError(
            f"accelerate launch was asked for several processes (MASTER_PORT={port}) but started one without a rank: on a "
            "CPU it does so silently. Use launch/accelerate.sh, or unset MASTER_PORT for a single process."
        )
