"""`agnews-dist restarts`: decide whether a job is started again.

Batch scripts call it (slurm/job.sh) with the arguments of the training. The first word of the output is for them:

again     the run was stopped before its end, or failed after it had saved new steps
finished  the run is complete
give_up   the run failed before it began, or several starts in a row saved nothing new
"""

import os
from collections.abc import Sequence
from pathlib import Path

from agnews_dist.commands.command import TRAINING_OPTIONS, run_command
from agnews_dist.config.command_line import Loaded, Option
from agnews_dist.distributed.slurm import identify_job
from agnews_dist.distributed.world import World
from agnews_dist.run.restart_policy import decide_at_begin, decide_at_end, read_starts, start_from_status, write_starts
from agnews_dist.run.status import read_status, run_of_job

OPTIONS = (
    *TRAINING_OPTIONS,
    Option("--at", choices=("begin", "end"), default="end", help="Whether a start begins or has ended."),
    Option("--starts", help="File that counts the job's starts."),
    Option("--limit", type=int, default=3, help="Starts in a row that may save nothing new."),
    Option("--was_stopped", type=bool, default=False, help="With --at end: the job was asked to stop."),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 for every answer, or 2 for wrong settings."""
    return run_command("restarts", argv, decide_restart, OPTIONS)


def decide_restart(_: World, loaded: Loaded) -> None:
    """Count the start or judge its end, and print the answer.

    Raises:
        UserError: the file of starts cannot be written.
    """
    config, options = loaded.config, loaded.options
    runs = Path(config.run.dir)
    name = config.run.name or run_of_job(runs, identify_job(os.environ))
    status = read_status(runs / name) if name is not None else None
    file = Path(options["starts"] or "starts.jsonl")
    if options["at"] == "begin":
        starts = [*read_starts(file), start_from_status(status)]
        write_starts(file, starts)
        answer = decide_at_begin(starts, options["limit"])
    else:
        starts = read_starts(file)
        answer = decide_at_end(status, starts, options["limit"], was_stopped=options["was_stopped"])
    print(f"{answer.word} {answer.reason}", flush=True)
