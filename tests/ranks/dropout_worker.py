"""Run under torchrun by test_dropout_on_ranks.py: one update with dropout under every engine, with several micro-batches.

What every rank drew before is its own, so that nothing could agree but by the keys.
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
from agnews_dist.training.step import train_step


def update(world: World, told: dict, name: str, max_tokens: int, *, checkpointing: bool) -> tuple[int, dict]:
    """Number of micro-batches, what the weights moved by (whole on rank 0)."""
    engine = start(world, name)
    classifier = toy_classifier(dropout=told["p"])
    place_classifier(classifier, engine, fast_path=True)
    suffix = classifier.suffix.train()
    suffix.checkpointing = checkpointing
    wrapped = engine.prepare(suffix, torch.optim.SGD(suffix.parameters(), lr=1.0), max_grad_norm=0.0)
    (batches,) = make_loader(engine, told, max_tokens).steps(0)
    before = wrapped.gather_weights()
    torch.manual_seed(10 * max_tokens + world.rank)
    key = step_key(told["seed"], told["step"])
    train_step(engine, uncached_features(classifier.prefix), wrapped, batches, dropout_key=key)
    after = wrapped.gather_weights()
    return len(batches.micro_batches), {key: before[key] - after[key] for key in before}


def main() -> None:
    # DeepSpeed's, of its own hooks and of names of collectives that torch calls old.
    warnings.simplefilter("ignore")
    output, told = Path(sys.argv[1]), json.loads(sys.argv[2])
    world, num_micro_batches = detect_world(os.environ), {}
    for name in told["engines"]:
        for what, max_tokens, checkpointing in (("one", 10_000, False), ("several", 60, False), ("again", 60, True)):
            num, moved = update(world, told, name, max_tokens, checkpointing=checkpointing)
            num_micro_batches[f"{name}-{what}"] = num
            if world.is_main:
                save_file(moved, output / f"{name}-{what}.safetensors")
    if world.is_main:
        (output / "micro_batches.json").write_text(json.dumps(num_micro_batches))


if __name__ == "__main__":
    main()
    # Not inside: the DDP module must be gone before its process group is (see collectives.close).
    collectives.close()
