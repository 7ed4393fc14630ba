"""`agnews-dist restarts`: decide whether a job is started again.

Batch scripts call it (slurm/job.sh) with the arguments of the training or sweep. The first word of the output is for them:

again     the run was stopped before its end, or failed after it had saved new steps
finished  the run is complete
give_up   the run failed before it began, or several starts in a row saved nothing new
"""

import os
from pathlib import Path
from typing import Literal

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import PASSED_ON, PASSED_ON_OF_SWEEPS
from agnews_dist.config.schema import Count, PathText
from agnews_dist.distributed.slurm import identify_array, identify_job
from agnews_dist.distributed.world import World
from agnews_dist.run.restart_policy import decide_at_begin, decide_at_end, read_starts, start_from_status, write_starts
from agnews_dist.run.status import read_status, runs_of_job, status_file

COMMAND = Command(
    "restarts",
    "Decide whether a job that has ended is started again, for batch scripts. Give it the arguments of the training or sweep.",
    (
        "agnews-dist restarts --at begin --starts starts.jsonl --config my.yaml",
        "agnews-dist restarts --at end --starts starts.jsonl --config my.yaml",
        "agnews-dist restarts --at end --was_stopped --run.name news",
    ),
    (
        *PASSED_ON,
        *PASSED_ON_OF_SWEEPS,
        Option("--at", "Whether a start begins or has ended.", Literal["begin", "end"], "end"),
        Option("--starts", "File that counts the job's starts.", PathText, "starts.jsonl"),
        Option("--limit", "Starts in a row that may save nothing new.", Count, 3),
        Option("--was_stopped", "With --at end: the job was asked to stop.", bool, False),
    ),
    ("run.dir", "run.name", "run.overwrite"),
    takes_lists=True,
)


def run(_: World, loaded: Loaded) -> None:
    """Count the start or judge its end, and print the answer.

    Raises:
        UserError: the file of starts cannot be written.
    """
    config, options = loaded.config, loaded.options
    runs, job = Path(config.run.dir), identify_job(os.environ)
    name = config.run.name or next(iter(runs_of_job(runs, job)), None)
    status = read_status(runs / name, status_file(runs / name, os.environ)) if name is not None else None
    if config.run.overwrite and job is not None and status is not None and status.job not in (job, identify_array(os.environ)):
        status = None  # of a run or sweep that this job is to replace
    file = Path(options["starts"])
    if options["at"] == "begin":
        starts = [*read_starts(file), start_from_status(status)]
        write_starts(file, starts)
        answer = decide_at_begin(starts, options["limit"])
    else:
        starts = read_starts(file)
        answer = decide_at_end(status, starts, options["limit"], was_stopped=options["was_stopped"])
    print(f"{answer.word} {answer.reason}", flush=True)
