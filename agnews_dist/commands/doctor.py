"""Check whether a training would run here: `python -m agnews_dist doctor`, alone or under torchrun.

Every rank checks its machine, the disks and the model's config. Then the ranks meet, compare facts and measure each other.
Loads no weights and no data. Exit code 1: the run would fail. Takes the options of a training, and OPTIONS.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from agnews_dist.commands.command import TRAINING_OPTIONS, importing, run_command
from agnews_dist.config.command_line import Loaded, Option
from agnews_dist.distributed.world import World, is_launched
from agnews_dist.errors import ConfigError

OPTIONS = (
    *TRAINING_OPTIONS,
    Option("--ranks", "Ranks of the training; under a launcher: expected number of ranks.", int | None),
    Option("--ranks_per_node", "Ranks on one node; default: all of --ranks.", int | None),
    Option("--json", "Print one JSON object instead of a table.", bool, default=False),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    return run_command("doctor", argv, run, OPTIONS)


def run(world: World, loaded: Loaded) -> None:
    """Run all checks; rank 0 prints the findings.

    Raises:
        UserError: the run would fail.
    """
    planned_world = _planned_world(world, loaded)
    # Imported here, not above: --help and a wrong setting must not wait seconds for torch.
    with importing():
        from agnews_dist.preflight.machine import PlannedRun
        from agnews_dist.preflight.runner import run_checks
        from agnews_dist.run.engine_setup import check_engine
        from agnews_dist.run.fingerprints import weight_settings
        from agnews_dist.run.setup import build_memory_setup
        from agnews_dist.storage.directories import cache_root

    config, engine = loaded.config, loaded.config.engine
    compared = {"engine.backend": engine.backend, "engine.zero_stage": engine.zero_stage}
    planned = PlannedRun(
        world=planned_world,
        model_name=config.model.name,
        revision=config.model.revision,
        init=config.model.init,
        source=config.data.source,
        device=engine.device,
        precision=engine.precision,
        run_dir=Path(config.run.dir).absolute(),
        cache_dir=cache_root(config.data.cache_dir).absolute(),
        num_checkpoints=config.checkpoint.keep,
        feature_bytes=int(engine.feature_cache_gigabytes * 1e9) if engine.feature_cache == "disk" else 0,
        settings={**weight_settings(config), **compared},
        check_engine=partial(check_engine, config, planned_world),
        read_memory_setup=partial(build_memory_setup, config, planned_world),
    )
    run_checks(planned, world, num_expected=loaded.options["ranks"], as_json=loaded.options["json"])


def _planned_world(world: World, loaded: Loaded) -> World:
    """Return the ranks of the planned training: those of this launch, or those of the options."""
    ranks, per_node = loaded.options["ranks"], loaded.options["ranks_per_node"]
    for name, value in (("--ranks", ranks), ("--ranks_per_node", per_node)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: a training has at least one rank. Set it to 1 or more.")
    if ranks is None or is_launched(os.environ):
        return world
    if per_node is not None and per_node > ranks:
        raise ConfigError(
            f"--ranks_per_node {per_node} with --ranks {ranks}: a node cannot have more ranks than there are. Lower the first."
        )
    return World(num_ranks=ranks, ranks_per_node=per_node or ranks)
