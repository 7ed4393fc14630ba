"""Trainings with features in each place, run on ranks by test_feature_training.py; saves weights, logits and facts."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from support.toy import toy_classifier, toy_split

from agnews_dist.data.batching import loader as loader_module
from agnews_dist.data.batching.loader import TokenTable, TrainLoader
from agnews_dist.data.batching.settings import PlanSettings
from agnews_dist.data.rows import Ints
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import detect_world
from agnews_dist.engine.engine import Engine
from agnews_dist.evaluation.evaluator import compute_rank_logits
from agnews_dist.evaluation.metrics import in_file_order
from agnews_dist.events import Event, Warned
from agnews_dist.features.manager import CacheSettings, FeatureCache
from agnews_dist.features.precompute import FeatureRows
from agnews_dist.model import prefix as prefix_module
from agnews_dist.run.fingerprints import weights_fingerprint
from agnews_dist.training.optim import build_optimizer
from agnews_dist.training.step import train_step


def count_tokens(computed: list[int]) -> None:
    """Append the number of tokens to `computed` whenever this process computes texts."""
    compute = FeatureRows.compute

    def counted(self: FeatureRows, numbers: Ints) -> torch.Tensor:
        computed.append(self.count_tokens(numbers))
        return compute(self, numbers)

    FeatureRows.compute = counted


def train(engine: Engine, arguments: dict, case: dict, output: Path, computed: list[int]) -> None:
    classifier, world = toy_classifier(case["trainable_blocks"]), engine.world
    classifier.use_fast_path(case["fast_path"])
    splits = {name: replace(toy_split(arguments["lengths"][name]), name=name) for name in ("train", "validation", "test")}
    tables = {name: TokenTable(split, pad_id=0, device=engine.device) for name, split in splits.items()}
    settings = PlanSettings(**arguments["settings"])
    loader = TrainLoader(tables["train"], world, settings, max_tokens_per_rank=arguments["max_tokens_per_rank"], quadratic=0.1)
    events: list[Event] = []
    cache_settings = CacheSettings(
        requested=case["requested"],
        num_epochs=arguments["epochs"],
        directory=output / f"cache-of-{world.num_ranks}{case['cache']}",
        limit_bytes=10**9,
        reserved_bytes=0,
        frozen_weights=weights_fingerprint(classifier.frozen_state),
        model_name="toy",
    )
    if case["earlier"]:
        # An earlier run on the first texts of the training split.
        fewer = replace(toy_split(arguments["lengths"]["train"][: case["earlier"]]), name="train")
        earlier = tables | {"train": TokenTable(fewer, pad_id=0, device=engine.device)}
        FeatureCache(classifier, earlier, engine, replace(cache_settings, requested="disk")).build(events.append)
    computed.clear()
    features = FeatureCache(classifier, tables, engine, cache_settings)
    features.build(events.append)
    loader.owner_N = features.owner_N
    counts = collectives.all_gather(sum(computed))

    scored = {}
    for name in ("validation", "test"):
        local = compute_rank_logits(classifier, tables[name], engine, features=features.source(name))
        ids_N, logits_NC = (np.concatenate(parts) for parts in zip(*collectives.all_gather(local), strict=True))
        scored[name] = torch.from_numpy(logits_NC[in_file_order(ids_N, len(tables[name]))])

    suffix = classifier.suffix.eval()
    optimizer = build_optimizer(suffix, lr=arguments["lr"], weight_decay=arguments["weight_decay"])
    strategy = engine.prepare(suffix, optimizer, max_grad_norm=1.0)
    seen, losses = [], []
    for epoch in range(arguments["epochs"]):
        for batches in loader.steps(epoch):
            result = train_step(engine, features.source("train"), strategy, batches)
            seen.append([batch.ids_B[batch.weights_B > 0].tolist() for batch in batches.micro_batches])
            losses.append(result.loss)
    name = f"{case['name']}-rank{world.rank}of{world.num_ranks}"
    trained = {key: value.detach().clone() for key, value in classifier.suffix.named_parameters()}
    save_file({**trained, **{f"logits.{split}": logits for split, logits in scored.items()}}, output / f"{name}.safetensors")
    facts = {
        "place": features.choice.place,
        "reason": features.choice.reason,
        "computed": counts,
        "warnings": [event.message for event in events if isinstance(event, Warned)],
        # seen[step][micro-batch]: ids of this rank's examples
        "seen": seen,
        "losses": losses,
    }
    (output / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")


def main() -> None:
    output, arguments = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    # Small limits, so that little text makes many calls, segments and evaluation batches.
    prefix_module.CALL_TOKENS["cpu"] = arguments["call_tokens"]
    loader_module.EVALUATION_TOKENS = arguments["evaluation_tokens"]
    engine = Engine(detect_world(os.environ), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    computed: list[int] = []
    count_tokens(computed)
    for case in arguments["cases"][str(engine.world.num_ranks)]:
        train(engine, arguments, case, output, computed)


if __name__ == "__main__":
    main()
    # After main: the DDP module must be deleted before its process group (see collectives.close).
    collectives.close()
