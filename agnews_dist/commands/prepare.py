"""`agnews-dist prepare`: download and tokenise ahead of a job, on a node with a network.

Takes the arguments of the training. Model and data go to the caches of their libraries (HF_HOME), tokens to data.cache_dir.
"""

import time
from functools import partial

from agnews_dist.commands.arguments import Command, Loaded
from agnews_dist.commands.command import PASSED_ON, importing
from agnews_dist.distributed.world import World

COMMAND = Command(
    "prepare",
    "Load and tokenise the data before a job, on a machine with a network. Give it the arguments of the training.",
    (
        "agnews-dist prepare --config my.yaml",
        "agnews-dist prepare --config my.yaml --data.cache_dir '$SCRATCH/cache'",
        "HF_HOME=/shared/hf agnews-dist prepare",
    ),
    PASSED_ON,
    ("data.source", "data.max_length", "data.limit_train", "data.cache_dir", "model"),
    display="stdout",
)


def run(world: World, loaded: Loaded) -> None:
    """Fetch model and data, and open or build the token cache: on the first rank of a node, for all of them."""
    start = time.perf_counter()
    if world.local_rank != 0:
        return
    # Imported here, so that --help and wrong settings do not wait for torch.
    with importing():
        from agnews_dist.events import RunDone
        from agnews_dist.report.console import Sinks
        from agnews_dist.run.hub_inputs import fetch_inputs, list_requests
        from agnews_dist.run.setup import load_training_inputs
        from agnews_dist.training.timing import StageTimer

    config = loaded.config
    with Sinks(loaded.console) as emit:
        fetch_inputs(partial(list_requests, config), World(), emit)
        inputs = load_training_inputs(config, world, emit, StageTimer(start))
        store = inputs.store
        facts = {**inputs.data_facts} | {
            name: f"{len(split):,} texts, {int(split.lengths.sum()):,} tokens, longest {int(split.lengths.max())}, "
            f"{split.num_truncated:,} truncated to {config.data.max_length}"
            for name, split in store.splits.items()
        }
        facts["tokens"] = "already cached" if store.was_cached else "made now"
        facts["time"] = f"{time.perf_counter() - start:.1f} s"
        emit(RunDone(facts=facts, paths={"token cache": str(store.path)}))
