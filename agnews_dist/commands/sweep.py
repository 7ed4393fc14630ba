"""`agnews-dist sweep`: lists and ranges of settings, trained on one set of features."""

import time

from agnews_dist.commands.arguments import Command, Loaded
from agnews_dist.commands.command import QUIET, SWEEP_OPTIONS, VERBOSE, importing
from agnews_dist.distributed.world import World
from agnews_dist.errors import ConfigError

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
    handles_stops=True,
)


def run(world: World, loaded: Loaded) -> None:
    """Train all members of a sweep.

    Raises:
        UserError: anything that the user can fix.
    """
    start = time.perf_counter()
    preemption, options = loaded.preemption, loaded.options
    assert preemption is not None
    for name in ("search", "sample_seed"):
        if options["samples"] is None and options[name] is not None:
            raise ConfigError(f"--{name} {options[name]}: all combinations are trained. Set --samples N, or leave it out.")
    with importing():
        from agnews_dist.experiments import sweep_job

    wanted = {"distilled": options["distil"], "ensemble": options["ensemble"] or options["distil"]}
    job = sweep_job.SweepJob(
        loaded.config,
        loaded.dimensions,
        num_samples=options["samples"],
        search=options["search"] or "random",
        sample_seed=options["sample_seed"] or 0,
        wanted=frozenset(name for name, is_wanted in wanted.items() if is_wanted),
        halving=options["halving"],
    )
    sweep_job.run_sweep(world, job, preemption=preemption, console=loaded.console, start=start)
