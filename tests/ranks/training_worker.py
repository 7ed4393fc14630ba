"""The rank of test_training.py: some epochs of plain SGD through the loader; it saves weights and batches."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.toy import toy_classifier, toy_split

from agnews_dist.data.batching.loader import TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import detect_world
from agnews_dist.engine.engine import Engine
from agnews_dist.model.prefix import uncached_features
from agnews_dist.training.step import train_step


def train(engine: Engine, lengths: list[int], case: dict, output: Path) -> None:
    classifier, world = toy_classifier(), engine.world
    table = TokenTable(toy_split(lengths), pad_id=0, device=engine.device)
    settings = PlanSettings(**case["settings"])
    loader = TrainLoader(table, world, settings, max_tokens_per_rank=case["max_tokens_per_rank"], quadratic=0.1)
    optimizer = torch.optim.SGD(classifier.suffix.eval().parameters(), lr=case["lr"])
    wrapped = engine.prepare(classifier.suffix, optimizer, max_grad_norm=1.0)
    seen, losses = [], []
    for epoch in range(case["epochs"]):
        for batches in loader.steps(epoch):
            result = train_step(engine, uncached_features(classifier.prefix), wrapped, batches)
            mine = [batch.ids_B[batch.weights_B > 0].tolist() for batch in batches.micro_batches]
            seen.append(collectives.all_gather(mine))
            losses.append(result.loss)
    name = f"{case['name']}-rank{world.rank}of{world.num_ranks}"
    save_file(
        {key: value.detach().clone() for key, value in classifier.suffix.named_parameters()}, output / f"{name}.safetensors"
    )
    # seen[step][rank][micro-batch]: ids of examples
    (output / f"{name}.json").write_text(json.dumps({"seen": seen, "losses": losses}), encoding="utf-8")


def main() -> None:
    output, task = Path(sys.argv[1]), json.loads(sys.argv[2])
    engine = Engine(detect_world(os.environ), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    for case in task["cases"]:
        train(engine, task["lengths"], case, output)


if __name__ == "__main__":
    main()
    # Not inside: the DDP module must be gone before its process group is (see collectives.close).
    collectives.close()
