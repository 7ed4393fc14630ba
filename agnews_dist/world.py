"""Which rank is this: the launcher's environment, read once at the edge and passed in.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without a launcher there is one rank. Nothing else in the
package reads these variables.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from agnews_dist.errors import UserError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


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
        UserError: some of torchrun's variables are missing or no numbers; the rank is outside the world; or Slurm started
            several tasks without torchrun, which would be several independent trainings.
    """
    given = {name: environ[name] for name in LAUNCHER_VARIABLES if environ.get(name)}
    if not given:
        tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks.isdigit() and int(tasks) > 1:
            raise UserError(
                f"srun started {tasks} tasks without torchrun: each would train alone on all the data. "
                "Start one task per node with 'srun --ntasks-per-node=1 torchrun ... -m agnews_dist.train'."
            )
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
