"""The cost of comparing the ranks' weights, as a share of a step's time at the default interval of checkpoints.

    PYTHONPATH=.:tests python tests/bench/replica_check.py [--layers 12] [--width 768] [--rounds 20] [--steps 10]

Two forked ranks hold the last block of a GPT-2 of this shape, the final norm and a head, with both moments after one update. A
step has 32 texts of 56 tokens with kept features. The comparison is made once per checkpoint; the default interval follows from
what a checkpoint costs. Prints one JSON line.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from support import fork_server

RANK = "rank"


def measure(function: Callable[[], object], rounds: int) -> float:
    """Return the least of a function's seconds, after one call to warm up."""
    function()
    seconds: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def run_rank(options: argparse.Namespace) -> None:
    """Measure on one rank; rank 0 prints."""
    import os

    import torch
    from torch.nn import functional
    from transformers import GPT2Config, GPT2Model

    from agnews_dist.distributed import collectives
    from agnews_dist.distributed.world import detect_world
    from agnews_dist.engine.engine import Engine
    from agnews_dist.model.gpt2 import Backbone, split_model
    from agnews_dist.report.event_log import EventLog
    from agnews_dist.training.best_weights import BestWeights
    from agnews_dist.training.checkpoint_manager import CheckpointManager, CheckpointSettings
    from agnews_dist.training.optim import build_optimizer

    world = detect_world(os.environ)
    engine = Engine(world, device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=300)
    config = GPT2Config(n_embd=options.width, n_layer=options.layers, n_head=options.width // 64)
    suffix = split_model(Backbone(GPT2Model(config), None, None), trainable_blocks=1, num_classes=4, seed=0).suffix
    strategy = engine.prepare(suffix, build_optimizer(suffix, lr=1e-4, weight_decay=0.01), max_grad_norm=1.0)
    hidden_BTD, lengths_B = torch.randn(16, 56, options.width), torch.full((16,), 56)

    def step() -> None:
        with strategy.accumulate(is_last=True):
            strategy.backward(functional.cross_entropy(strategy(hidden_BTD, lengths_B), torch.arange(16) % 4))
        strategy.update()

    facts = {"step": measure(step, options.steps), "check": measure(lambda: strategy.check_replicas(1), options.rounds)}
    with tempfile.TemporaryDirectory() as folder:
        settings = CheckpointSettings(keep=2, every_steps=None, every_minutes=None, max_overhead=0.01)
        manager = CheckpointManager(
            lambda: Path(folder, "checkpoints"),
            strategy,
            settings,
            metadata={},
            log=EventLog(Path(folder, "events.jsonl")) if world.is_main else None,
            emit=lambda event: None,
        )
        for number in (1, 2):
            manager.save(number, {}, BestWeights(strategy), is_scored=False, wait=True)
        manager.close()
    if world.is_main:
        interval = manager._every_seconds
        facts |= {"interval": interval, "share": facts["check"] / interval, "torch": torch.__version__}
        print(json.dumps({**vars(options), **facts}, allow_nan=False))
    collectives.close()


def main(words: Sequence[str]) -> None:
    """Start two ranks of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("layers", 12), ("width", 768), ("rounds", 20), ("steps", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    is_rank = words[:1] == [RANK]
    options = parser.parse_args(words[1:] if is_rank else words)
    if is_rank:
        run_rank(options)
    else:
        print(fork_server.run_ranks(2, __file__, RANK, *words).stdout, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
