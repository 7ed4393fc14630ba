"""Tokenise ahead of the job: on a login node with a network, for compute nodes without. `python -m agnews_dist prepare`.

Takes the arguments of the training it prepares. Model and data end up in the caches of their libraries (HF_HOME), the
tokens in data.cache_dir; the training job finds them there.
"""

import time
from collections.abc import Sequence

from agnews_dist.commands.command import TRAINING_OPTIONS, run_command
from agnews_dist.config import command_line as cli
from agnews_dist.distributed.world import World


def main(argv: Sequence[str] | None = None) -> int:
    """Run the story; returns the exit code."""
    return run_command("prepare", argv, run, TRAINING_OPTIONS)


def run(world: World, loaded: cli.Loaded) -> None:
    """Load the model once, so that its files are cached, and open or build the token cache."""
    start = time.perf_counter()
    # Imported here, not above: --help and a wrong setting must not wait seconds for torch.
    from agnews_dist.data.corpus import check_source
    from agnews_dist.events import RunDone
    from agnews_dist.report.console import Console, Sinks
    from agnews_dist.run.setup import load_training_inputs
    from agnews_dist.training.timing import StageTimer

    config = loaded.config
    with Sinks() as emit:
        if world.is_main:
            emit.add(Console())
        check_source(config.data.source)
        store = load_training_inputs(config, world, emit, StageTimer(start)).store
        facts = {
            name: f"{len(split):,} texts, {int(split.lengths.sum()):,} tokens, longest {int(split.lengths.max())}, "
            f"{split.num_truncated:,} cut off at {config.data.max_length}"
            for name, split in store.splits.items()
        }
        facts["tokens"] = "were there already" if store.was_cached else "made now"
        facts["time"] = f"{time.perf_counter() - start:.1f} s"
        emit(RunDone(facts=facts, paths={"token cache": str(store.path)}))
