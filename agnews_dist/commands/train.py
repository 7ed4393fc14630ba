"""`agnews-dist train`: text in, a classifier that Hugging Face loads out. `torchrun --nproc_per_node=8 -m agnews_dist.train`.

`agnews_dist.api.training_run` is the training itself, which the Python API calls too.
"""

import os
import time
from collections.abc import Sequence
from functools import partial

from agnews_dist.commands.arguments import Command, Loaded
from agnews_dist.commands.command import TRAINING_OPTIONS, importing, run_command
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.world import World

COMMAND = Command(
    "train",
    "Fine-tune, evaluate, and write a model that Hugging Face loads. Under torchrun, all ranks train one model.",
    (
        "agnews-dist train --debug",
        "agnews-dist train --config my.yaml --optim.lr 3e-4 --run.name news",
        "torchrun --nproc_per_node=8 -m agnews_dist.train --config my.yaml",
    ),
    TRAINING_OPTIONS,
    display="stdout",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 for a failed run, 2 for wrong settings, or the exit code of a stop (preemption.py)."""
    preemption = PreemptionHandler(os.environ)
    return run_command(COMMAND, argv, partial(train, preemption=preemption), preemption)


def train(world: World, loaded: Loaded, *, preemption: PreemptionHandler) -> None:
    """Train one classifier.

    Raises:
        Stopped: the run was asked to stop before its end.
    """
    start = time.perf_counter()
    # Imported here: --help and wrong settings must not wait seconds for torch.
    with importing():
        from agnews_dist.api import training_run

    job = training_run.TrainingJob(loaded.config, loaded.options["accept"], loaded.options["profile"])
    training_run.train(world, job, preemption=preemption, console=loaded.console, start=start)
