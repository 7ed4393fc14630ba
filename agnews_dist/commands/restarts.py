"""`agnews-dist restarts`: say whether a job that has ended should be started again.

Batch scripts call it (slurm/job.sh) with the training's own arguments. The first word of the answer is for them:

again     the run was stopped before its end, or failed after it had saved something new
finished  nothing is left to do
give_up   the run failed before it began, or several starts in a row saved nothing new

--at           begin: a start is counted; end: it has ended
--starts       the file in which the job's starts are counted, one JSON object per line
--limit        starts in a row that may save nothing new; default 3
--was_stopped  at the end: the job was asked to stop, whatever its run could still record
"""

import os
from collections.abc import Sequence
from pathlib import Path

from agnews_dist.commands.command import TRAINING_OPTIONS, run_command
from agnews_dist.config import command_line as cli
from agnews_dist.distributed.world import World
from agnews_dist.run.restart_policy import at_begin, at_end, read_starts, start_of, write_starts
from agnews_dist.run.status import job_of, read_status, run_of_job

OPTIONS = (
    *TRAINING_OPTIONS,
    cli.Option("--at", choices=("begin", "end"), default="end", help="Whether a start begins or has ended."),
    cli.Option("--starts", help="The file in which the job's starts are counted."),
    cli.Option("--limit", type=int, default=3, help="So many starts in a row may save nothing new."),
    cli.Option("--was_stopped", type=bool, default=False, help="At the end: the job was told to stop."),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the story; returns the exit code: 0 whatever the answer, 2 for settings with which no training starts."""
    return run_command("restarts", argv, run, OPTIONS)


def run(_: World, loaded: cli.Loaded) -> None:
    """Print the answer.

    Raises:
        UserError: the file cannot be written.
    """
    config, options = loaded.config, loaded.options
    runs = Path(config.run.dir)
    name = config.run.name or run_of_job(runs, job_of(os.environ))
    status = read_status(runs / name) if name is not None else None
    file = Path(options["starts"] or "starts.jsonl")
    if options["at"] == "begin":
        starts = [*read_starts(file), start_of(status)]
        write_starts(file, starts)
        answer = at_begin(starts, options["limit"])
    else:
        starts = read_starts(file)
        answer = at_end(status, starts, options["limit"], was_stopped=options["was_stopped"])
    print(f"{answer.word} {answer.reason}", flush=True)
