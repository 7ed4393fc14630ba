"""`agnews-dist train`: text in, a classifier that Hugging Face loads out. `torchrun --nproc_per_node=8 -m agnews_dist.train`.

`agnews_dist.api.training_run` is the training itself, which the Python API calls too.
"""

import time

from agnews_dist.commands.arguments import Command, Loaded
from agnews_dist.commands.command import TRAINING_OPTIONS, importing
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
    handles_stops=True,
)


def run(world: World, loaded: Loaded) -> None:
    """Train one classifier.

    Raises:
        Stopped: the run was asked to stop before its end.
    """
    start = time.perf_counter()
    preemption = loaded.preemption
    assert preemption is not None
    # Imported here: --help and wrong settings must not wait seconds for torch.
    with importing():
        from agnews_dist.api import training_run

    job = training_run.TrainingJob(loaded.config, loaded.options["accept"], loaded.options["profile"])
    training_run.train(world, job, preemption=preemption, console=loaded.console, start=start)
