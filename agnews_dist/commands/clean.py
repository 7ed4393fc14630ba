"""`agnews-dist clean`: probable label errors and near duplicates, and the training without them."""

import time
from pathlib import Path
from typing import Annotated

from pydantic import Field

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import QUIET, VERBOSE, importing
from agnews_dist.config.schema import PathText
from agnews_dist.distributed.world import World

Share = Annotated[float, Field(ge=0, lt=1)]
COMMAND = Command(
    "clean",
    "Find probable label errors by models that have not seen them. Then train without them, and compare.",
    (
        "agnews-dist clean --config my.yaml",
        "agnews-dist clean --config my.yaml --share 0.01 --output cleaned",
        "agnews-dist train --config my.yaml --data.exclude cleaned/exclude.csv",
    ),
    (
        QUIET,
        VERBOSE,
        Option("--folds", "Number of folds.", Annotated[int, Field(ge=2, le=100)], 5),
        Option("--share", "Share of rows to exclude; default: as estimated.", Share),
        Option("--output", "Directory of the results; default: runs/NAME-clean.", PathText),
    ),
    (
        "data.source",
        "data.limit_train",
        "model.name",
        "model.trainable_blocks",
        "optim.lr",
        "optim.epochs",
        "engine.device",
        "engine.precision",
        "run.dir",
        "run.name",
        "run.overwrite",
        "report.max_seconds",
    ),
    display="stdout",
    handles_stops=True,
)


def run(world: World, loaded: Loaded) -> None:
    """Find label errors, and train without them.

    Raises:
        UserError: anything that the user can fix.
    """
    start = time.perf_counter()
    preemption = loaded.preemption
    assert preemption is not None
    with importing():
        from agnews_dist.experiments import clean_job

    run, options = loaded.config.run, loaded.options
    name = run.name or Path(loaded.config.data.source).stem
    output = Path(options["output"] or Path(run.dir) / f"{name}-clean")
    job = clean_job.CleanJob(loaded.config, output, options["folds"], options["share"])
    clean_job.run_clean(world, job, preemption=preemption, console=loaded.console, start=start)
