"""Will it run here, and what will it take? `python -m agnews_dist.doctor --config FILE --ranks 8`.

Looks at the machine, what is installed and the model's config; loads no weights and no data. Ends with 1 if the run cannot fit.

--ranks            ranks of the training; default: those of this launch
--ranks_per_node   of them on one node; default: all, or those of this launch
--json             one JSON object on standard output
"""

import json
import sys
from collections.abc import Sequence

from agnews_dist import cli
from agnews_dist.errors import ConfigError, ModelError
from agnews_dist.story import tell
from agnews_dist.world import World

OPTIONS = (
    cli.Option("--ranks", type=int | None, help="Ranks of the training; default: those of this launch."),
    cli.Option("--ranks_per_node", type=int | None, help="Ranks of them on one node; default: all of --ranks."),
    cli.Option("--json", type=bool, default=False, help="Print one JSON object instead of the tables for people."),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the story; returns the exit code."""
    return tell("doctor", argv, run, OPTIONS)


def run(world: World, loaded: cli.Loaded) -> None:
    """Show machine, versions and memory per rank, on rank 0 alone.

    Raises:
        UserError: an engine that cannot start here, no such model, or a run that cannot fit.
    """
    config, asked = loaded.config, _asked(world, loaded)
    if not world.is_main:
        return
    # Imported here, not above: --help and a wrong setting must not wait seconds for torch.
    from agnews_dist.fitting import diagnose
    from agnews_dist.report.doctor_view import show_diagnosis
    from agnews_dist.sources import check_engine

    check_engine(config, asked)
    found = diagnose(config, asked)
    if loaded.options["json"]:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        show_diagnosis(found)
    if found.problem is not None:
        raise ModelError(found.problem)


def _asked(world: World, loaded: cli.Loaded) -> World:
    """The ranks of the training that is asked about."""
    ranks, per_node = loaded.options["ranks"], loaded.options["ranks_per_node"]
    for name, value in (("--ranks", ranks), ("--ranks_per_node", per_node)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: a training has at least one rank. Set it to 1 or more.")
    if ranks is None:
        return world
    if per_node is not None and per_node > ranks:
        raise ConfigError(
            f"--ranks_per_node {per_node} with --ranks {ranks}: a node cannot have more ranks than there are. Lower the first."
        )
    return World(num_ranks=ranks, ranks_per_node=per_node or ranks)


if __name__ == "__main__":
    sys.exit(main())
