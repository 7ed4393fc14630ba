"""`agnews-dist probe`: how good the features of every layer of the frozen model are, and how many blocks to train.

One pass over the texts, and a logistic regression per layer and pooling. The test split is not scored. Every setting of the
training is accepted. Those that say what is trained and how have no effect; `model.pooling` decides whose layers the
conclusion is about.
"""

import time
from pathlib import Path

from agnews_dist.commands.arguments import Command, Loaded, Option
from agnews_dist.commands.command import QUIET, importing
from agnews_dist.config.schema import PathText
from agnews_dist.distributed.world import World

COMMAND = Command(
    "probe",
    "Score every layer of the frozen model by a logistic regression. "
    "It ignores model.trainable_blocks, and suggests a value for it.",
    (
        "agnews-dist probe --config my.yaml",
        "agnews-dist probe --config my.yaml --data.limit_train 2000 --output layers",
        "torchrun --nproc_per_node=8 -m agnews_dist probe --config my.yaml",
    ),
    (QUIET, Option("--output", "Directory of the results; default: runs/NAME-probe.", PathText)),
    (
        "data.source",
        "data.max_length",
        "data.limit_train",
        "model.name",
        "engine.device",
        "engine.precision",
        "run.name",
        "run.overwrite",
        "report.max_seconds",
    ),
    display="stdout",
)


def run(world: World, loaded: Loaded) -> None:
    """Probe the model over all ranks, and print the table on rank 0."""
    start = time.perf_counter()
    # Imported here, so that --help and wrong settings do not wait for torch.
    with importing():
        from agnews_dist.engine.device import should_use_cuda
        from agnews_dist.report.probe_view import show_probe
        from agnews_dist.run.probing import run_probe

    should_use_cuda(world, loaded.config.engine.device)
    output = None if loaded.options["output"] is None else Path(loaded.options["output"])
    done = run_probe(loaded.config, world, output=output, console=loaded.console, start=start)
    if done is not None:
        show_probe(done.scores, done.conclusions, done.num_rows)
