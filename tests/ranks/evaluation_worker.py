"""Evaluations of toy splits on ranks, run by test_evaluation.py; every rank saves predictions and scores."""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from support.toy import toy_classifier, toy_split

from agnews_dist.data.batching import loader as loader_module
from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.distributed import collectives
from agnews_dist.distributed.world import detect_world
from agnews_dist.engine.engine import Engine
from agnews_dist.evaluation.evaluator import evaluate_split


def main() -> None:
    output, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    # A small limit, so that few texts make several batches.
    loader_module.EVALUATION_TOKENS = 60
    engine = Engine(detect_world(os.environ), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    for name, case in cases.items():
        classifier = toy_classifier(num_classes=case["num_classes"])
        with torch.no_grad():
            classifier.suffix.out_head.weight.mul_(20)
        rows = replace(toy_split(case["lengths"]), labels=np.array(case["labels"]))
        found = evaluate_split(classifier, TokenTable(rows, pad_id=0, device=engine.device), engine)
        path = output / f"{name}-rank{engine.world.rank}of{engine.world.num_ranks}"
        save_file(found.tensors(), path.with_suffix(".safetensors"))
        scores = None if found.scores is None else asdict(found.scores)
        path.with_suffix(".json").write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main()
    collectives.close()
