"""Check whether a training would run here: `python -m agnews_dist doctor`, alone or under torchrun.

Every rank checks its machine, the disks and the model's config. Then the ranks meet, compare facts and measure each other.
Loads no weights and no data. Exit code 1: the run would fail. Takes the options of a training or
sweep, and its own; of several values it checks the first.
"""

import os
from functools import partial
from pathlib import Path

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import PASSED_ON, PASSED_ON_OF_SWEEPS, importing
from agnews_dist.config.schema import Count
from agnews_dist.distributed.world import World, is_launched
from agnews_dist.errors import ConfigError

COMMAND = Command(
    "doctor",
    "Check machine, disks, hub, memory and settings before a job. Under a launcher, the ranks meet and compare too.",
    (
        "agnews-dist doctor --config my.yaml --ranks 8",
        "torchrun --nproc_per_node=8 -m agnews_dist doctor --config my.yaml",
        "agnews-dist doctor --config my.yaml --ranks 64 --ranks_per_node 8 --json",
    ),
    (
        *PASSED_ON,
        *PASSED_ON_OF_SWEEPS,
        Option("--ranks", "Ranks of the training, or to expect here.", Count | None),
        Option("--ranks_per_node", "Ranks on one node; default: all.", Count | None),
        Option("--json", "Print one JSON object.", bool, False),
    ),
    takes_lists=True,
)


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
        from agnews_dist.run.fingerprints import setting_values
        from agnews_dist.run.hub_inputs import list_requests
        from agnews_dist.run.memory_setup import build_memory_setup
        from agnews_dist.storage.directories import cache_root

    config, engine = loaded.config, loaded.config.engine
    # Ranks of one run may keep their caches in different directories, but differ in nothing else.
    compared = {key: value for key, value in setting_values(config).items() if key != "data.cache_dir"}
    planned = PlannedRun(
        world=planned_world,
        model_name=config.model.name,
        source=config.data.source,
        device=engine.device,
        precision=engine.precision,
        run_dir=Path(config.run.dir).absolute(),
        cache_dir=cache_root(config.data.cache_dir).absolute(),
        num_checkpoints=config.checkpoint.keep,
        feature_bytes=int(engine.feature_cache_gigabytes * 1e9) if engine.feature_cache == "disk" else 0,
        settings=compared,
        list_requests=partial(list_requests, config),
        list_config_requests=partial(list_requests, config, has_weights=False, has_data=False),
        check_engine=partial(check_engine, config, planned_world),
        read_memory_setup=partial(build_memory_setup, config, planned_world),
    )
    run_checks(planned, world, num_expected=loaded.options["ranks"], as_json=loaded.options["json"])


def _planned_world(world: World, loaded: Loaded) -> World:
    """Return the ranks of the planned training: those of this launch, or those of the options."""
    ranks, per_node = loaded.options["ranks"], loaded.options["ranks_per_node"]
    if ranks is None or is_launched(os.environ):
        return world
    if per_node is not None and per_node > ranks:
        raise ConfigError(
            f"--ranks_per_node {per_node} with --ranks {ranks}: a node cannot have more ranks than there are. Lower the first."
        )
    return World(num_ranks=ranks, ranks_per_node=per_node or ranks)
