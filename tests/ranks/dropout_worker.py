"""One update with dropout under every engine, with one and several micro-batches, run on ranks by test_dropout_on_ranks.py.

Every rank has another random state, so only the keys can make the masks agree.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from engine_worker import make_loader, start
from safetensors.torch import save_file
from support.toy import toy_classifier

from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import World, detect_world
from agnews_dist.model.dropout import step_key
from agnews_dist.model.prefix import uncached_features
from agnews_dist.run.engine_setup import place_classifier
from agnews_dist.training.losses import StepSettings
from agnews_dist.training.step import train_step


def update(
    world: World, arguments: dict, name: str, max_tokens: int, *, checkpointing: bool, r_drop: float = 0.0
) -> tuple[int, dict]:
    """Return the number of micro-batches and the change of the weights (complete on rank 0)."""
    engine = start(world, name)
    classifier = toy_classifier(dropout=arguments["p"])
    place_classifier(classifier, engine, fast_path=True)
    suffix = classifier.suffix.train()
    suffix.checkpointing = checkpointing
    strategy = engine.prepare(suffix, torch.optim.SGD(suffix.parameters(), lr=1.0), max_grad_norm=0.0)
    (batches,) = make_loader(engine, arguments, max_tokens).steps(0)
    before = strategy.gather_weights()
    torch.manual_seed(10 * max_tokens + world.rank)
    key = step_key(arguments["seed"], arguments["step"])
    settings = StepSettings(r_drop=r_drop)
    train_step(engine, uncached_features(classifier.prefix), strategy, batches, dropout_key=key, settings=settings)
    after = strategy.gather_weights()
    return len(batches.micro_batches), {key: before[key] - after[key] for key in before}


def main() -> None:
    # DeepSpeed warns of its hooks and of collectives that torch has renamed.
    warnings.simplefilter("ignore")
    output, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    world, num_micro_batches = detect_world(os.environ), {}
    for name in arguments["engines"]:
        for what, max_tokens, options in (
            ("one", 10_000, {"checkpointing": False}),
            ("several", 60, {"checkpointing": False}),
            ("again", 60, {"checkpointing": True}),
            ("r_drop", 60, {"checkpointing": False, "r_drop": arguments["r_drop"]}),
        ):
            num, change = update(world, arguments, name, max_tokens, **options)
            num_micro_batches[f"{name}-{what}"] = num
            if world.is_main:
                save_file(change, output / f"{name}-{what}.safetensors")
    if world.is_main:
        (output / "micro_batches.json").write_text(json.dumps(num_micro_batches))


if __name__ == "__main__":
    main()
    # After main: the DDP module must be deleted before its process group (see collectives.close).
    collectives.close()
