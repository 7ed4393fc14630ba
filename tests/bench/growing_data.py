"""The frozen part's cost when a corpus grows: from scratch, grown from an earlier run's cache, and found whole.

    OMP_NUM_THREADS=2 PYTHONPATH=. python tests/bench/growing_data.py --shared DIR [--texts 2048] [--percent 1] [--rounds 2]

The texts are AG News' through a model of GPT-2 small's shape with random weights, fp32, on a CPU. Each round has a new
directory. `--shared` is the directory with `data/ag_news` and `tokenizers/gpt2`. Prints a table; `--log` gets one JSON line per
round. The features of the grown corpus must equal those from scratch to the last bit, or the script fails.

New texts cost whole calls of 512 tokens, each on one thread. So 1 % of few texts costs more than 1 %.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from agnews_dist.config.schema import Config, DataConfig, EngineConfig, ModelConfig
from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.data.tokens import TokenSplit
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.events import ignore_event
from agnews_dist.features.manager import CacheSettings, FeatureCache
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.run.setup import load_training_inputs
from agnews_dist.training.timing import StageTimer


def first_rows(split: TokenSplit, num_rows: int) -> TokenSplit:
    """Return the first rows of a split."""
    offsets = split.offsets[: num_rows + 1]
    return replace(split, tokens=split.tokens[: offsets[-1]], offsets=offsets, labels=split.labels[:num_rows])


def build(classifier: Classifier, split: TokenSplit, directory: Path, engine: Engine) -> tuple[float, FeatureCache, TokenTable]:
    """Fill or open a cache on disk; return its seconds."""
    table = TokenTable(split, pad_id=0, device=engine.device)
    sizes = {"limit_bytes": 10**12, "reserved_bytes": 0}
    settings = CacheSettings("disk", 3, directory, **sizes, frozen_weights="random", model_name="GPT-2 small's shape")
    begin = time.perf_counter()
    cache = FeatureCache(classifier, {"train": table}, engine, settings)
    cache.build(ignore_event)
    seconds = time.perf_counter() - begin
    assert cache.choice.place == "disk"
    cache.close()
    return seconds, cache, table


def are_equal(found: FeatureCache, expected: FeatureCache, table: TokenTable) -> bool:
    """Return whether two caches have the same bits."""
    for ids in np.array_split(np.arange(len(table)), max(1, len(table) // 32)):
        batch = table.batch(ids)
        one, other = (cache.source("train")(batch) for cache in (found, expected))
        for row, length in enumerate(one.lengths_B.tolist()):
            if not torch.equal(one.hidden_BTD[row, :length], other.hidden_BTD[row, :length]):
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the features of a growing corpus cost.")
    parser.add_argument("--shared", type=Path, required=True, help="Directory with data/ag_news and tokenizers/gpt2.")
    parser.add_argument("--texts", type=int, default=2048, help="Rows before the growth.")
    parser.add_argument("--percent", type=float, default=1.0, help="Growth.")
    parser.add_argument("--rounds", type=int, default=2, help="The table has the least seconds of them.")
    parser.add_argument("--log", type=Path, help="File for the measurements, one JSON object per line.")
    options = parser.parse_args()
    num_grown = options.texts + max(1, round(options.texts * options.percent / 100))
    with tempfile.TemporaryDirectory(prefix="growing-data-") as name:
        config = Config(
            data=DataConfig(source=str(options.shared / "data" / "ag_news"), cache_dir=name, limit_train=num_grown),
            model=ModelConfig(name=str(options.shared / "tokenizers" / "gpt2"), init="random"),
            engine=EngineConfig(precision="fp32"),
        )
        engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=600)
        inputs = load_training_inputs(config, World(), ignore_event, StageTimer(time.perf_counter()))
        grown = inputs.store.splits["train"]
        small = first_rows(grown, options.texts)
        cases: dict[str, list[float]] = {"from scratch": [], "grown from scratch": [], "grown": [], "found whole": []}
        for number in range(options.rounds):
            first, second = (Path(name) / f"{kind}-{number}" for kind in ("first", "second"))
            cases["from scratch"].append(build(inputs.classifier, small, first, engine)[0])
            seconds, added, table = build(inputs.classifier, grown, first, engine)
            cases["grown"].append(seconds)
            seconds, scratch, _ = build(inputs.classifier, grown, second, engine)
            cases["grown from scratch"].append(seconds)
            cases["found whole"].append(build(inputs.classifier, grown, first, engine)[0])
            if not are_equal(added, scratch, table):
                raise SystemExit("the features of the grown corpus differ from those from scratch")
            record = {case: round(measured[-1], 3) for case, measured in cases.items()}
            sizes = {"texts": options.texts, "grown_texts": num_grown, "tokens": int(small.offsets[-1])}
            record |= sizes | {"grown_tokens": int(grown.offsets[-1]), "threads": torch.get_num_threads(), "round": number}
            if options.log:
                with options.log.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(record, allow_nan=False) + "\n")
    sizes = f"{options.texts:,} -> {num_grown:,} texts, {torch.get_num_threads()} threads"
    print(f"| {sizes} | seconds | share of a cache from scratch |")
    print("|---|---|---|")
    for case, measured in cases.items():
        print(f"| {case} | {min(measured):.2f} | {min(measured) / min(cases['from scratch']):.1%} |")


if __name__ == "__main__":
    main()
