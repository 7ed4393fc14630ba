"""`agnews-dist runs`: all runs and sweeps below a directory, with state, scores, settings that differ, age and size."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import importing
from agnews_dist.config.schema import PathText
from agnews_dist.distributed.world import World
from agnews_dist.errors import ConfigError

COMMAND = Command(
    "runs",
    "List all runs of a directory. Each with state, scores, settings that differ from the defaults, age and size.",
    ("agnews-dist runs", "agnews-dist runs /scratch/runs --sort test", "agnews-dist runs --json"),
    (
        Option("directory", "Directory of the runs; default: run.dir.", PathText, nargs="*"),
        Option(
            "--sort",
            "Order: the last changed first, or the highest accuracy.",
            Literal["time", "name", "test", "validation", "size"],
            "time",
        ),
        Option("--json", "Print one JSON object.", bool, False),
    ),
    ("run.dir",),
)


def run(world: World, loaded: Loaded) -> None:
    """Print the list on rank 0."""
    given: Sequence[str] = loaded.options["directory"]
    if len(given) > 1:
        raise ConfigError(f"runs of {len(given)} directories: it takes one. Write agnews-dist runs DIR.")
    if not world.is_main:
        return
    # Imported here, so that --help does not wait for numpy.
    with importing():
        from agnews_dist.experiments.stored_sweeps import find_sweeps, list_sweep_facts
        from agnews_dist.report.result_files import print_json
        from agnews_dist.report.run_list import runs_to_json, show_runs, sort_runs
        from agnews_dist.run.stored_runs import find_runs, list_facts

    directory = Path(given[0] if given else loaded.config.run.dir)
    found = [*map(list_facts, find_runs(directory)), *map(list_sweep_facts, find_sweeps(directory))]
    runs = sort_runs([asdict(facts) for facts in found], loaded.options["sort"])
    if loaded.options["json"]:
        print_json(runs_to_json(directory, runs))
    else:
        show_runs(directory, runs)
