"""`agnews-dist sweep`: lists and ranges of settings, trained on one set of features."""

import os
import time
from collections.abc import Sequence
from functools import partial

from agnews_dist.commands.arguments import Command, Loaded
from agnews_dist.commands.command import QUIET, SWEEP_OPTIONS, VERBOSE, importing, run_command
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.world import World

COMMAND = Command(
    "sweep",
    "Train all combinations of settings with several values. The best on validation is scored on test.",
    (
        "agnews-dist sweep --optim.lr 1e-4,3e-4,1e-3 --run.seed 0..4",
        "agnews-dist sweep --config my.yaml --optim.lr 1e-4..1e-2 --samples 20",
        "torchrun --nproc_per_node=8 -m agnews_dist sweep --run.seed 0..7 --distil",
    ),
    (QUIET, VERBOSE, *SWEEP_OPTIONS),
    (
        "data.source",
        "data.limit_train",
        "model.name",
        "model.trainable_blocks",
        "batch.global_batch_size",
        "optim.lr",
        "optim.epochs",
        "engine.device",
        "engine.precision",
        "run.dir",
        "run.name",
        "run.seed",
        "run.overwrite",
    ),
    takes_lists=True,
    display="stdout",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 for a failed sweep, 2 for wrong settings, or the exit code of a stop (preemption.py)."""
    preemption = PreemptionHandler(os.environ)
    return run_command(COMMAND, argv, partial(sweep, preemption=preemption), preemption)


def sweep(world: World, loaded: Loaded, *, preemption: PreemptionHandler) -> None:
    """Train all members of a sweep.

    Raises:
        UserError: anything that the user can fix.
    """
    start = time.perf_counter()
    with importing():
        from agnews_dist.experiments import sweep_job

    options = loaded.options
    wanted = {"distilled": options["distil"], "ensemble": options["ensemble"] or options["distil"]}
    job = sweep_job.SweepJob(
        loaded.config,
        loaded.dimensions,
        num_samples=options["samples"],
        search=options["search"],
        sample_seed=options["sample_seed"],
        wanted=frozenset(name for name, is_wanted in wanted.items() if is_wanted),
        halving=options["halving"],
    )
    sweep_job.run_sweep(world, job, preemption=preemption, console=loaded.console, start=start)
