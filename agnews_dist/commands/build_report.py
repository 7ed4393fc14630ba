"""`agnews-dist report`: the report of a run, built again from its files; with several runs, a comparison with the first one."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import importing
from agnews_dist.config.fields import values_of
from agnews_dist.config.schema import PathText
from agnews_dist.distributed.world import World
from agnews_dist.errors import ConfigError
from agnews_dist.events import begin_phase

COMMAND = Command(
    "report",
    "Write the report of a run again. With several runs, compare them with the first one, text by text.",
    (
        "agnews-dist report runs/NAME",
        "agnews-dist report runs/ONE runs/OTHER --output comparison",
        "agnews-dist report runs/NAME --recompute --data.source data/news",
    ),
    (
        Option("run", "Directories of runs.", PathText, nargs="*"),
        Option("--output", "Another directory; of a comparison by default: comparison.", PathText),
        Option("--recompute", "Analyse the texts again.", bool, False),
    ),
    ("data.source", "data.cache_dir", "report.max_seconds"),
    shows_defaults=False,
)


def run(world: World, loaded: Loaded) -> None:
    """Write the page on rank 0, and print its path."""
    runs: Sequence[str] = loaded.options["run"]
    if not runs:
        raise ConfigError("report of 0 runs: it takes one or more. Write agnews-dist report runs/NAME.")
    names = [Path(run).resolve() for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"report of {', '.join(runs)}: a run is named twice. Name each once.")
    if not world.is_main:
        return
    # Imported here, so that --help does not wait for rich, and the first line not for torch.
    from agnews_dist.report.console import create_console

    overrides = {key: value for key, value in values_of(loaded.config) if key in loaded.explicit}
    with closing(create_console()) as emit:
        emit(begin_phase("load the libraries of the report"))
        with importing():
            from agnews_dist.run import reporting, stored_reports

        reporting.check_packages()
        build = partial(stored_reports.report_one, overrides=overrides, recompute=loaded.options["recompute"], emit=emit)
        output = None if loaded.options["output"] is None else Path(loaded.options["output"])
        if len(names) > 1:
            page = stored_reports.compare(names, output or Path("comparison"), build)
        else:
            page = build(names[0], output=output)
    print(f"{page} written")
