"""The frozen part's cost when a corpus grows: from scratch, grown from an earlier run's cache, and found whole.

    OMP_NUM_THREADS=2 PYTHONPATH=. python tests/bench/growing_data.py --shared DIR [--texts 256] [--mini_texts 4000]

The texts are AG News', fp32, on a CPU: few of them through random weights of GPT-2 small's shape, and more through the shared
small checkpoint. `--shared` is the directory with `data/ag_news`, `tokenizers/gpt2` and `checkpoints/gpt2-mini`. 0 texts leave
a model out. Each round has a new directory. Prints tables; `--log` gets one JSON line per round. The features of the grown
corpus must equal those from scratch to the last bit, or the script fails.

New texts cost whole calls of 512 tokens, each on one thread. So 1 % of few texts costs more than 1 %.
"""

import argparse
import json
import shutil
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
from agnews_dist.run.setup import TrainingInputs, load_training_inputs
from agnews_dist.training.timing import StageTimer


def first_rows(split: TokenSplit, num_rows: int) -> TokenSplit:
    """Return the first rows of a split."""
    offsets = split.offsets[: num_rows + 1]
    return replace(split, tokens=split.tokens[: offsets[-1]], offsets=offsets, labels=split.labels[:num_rows])


def build(inputs: TrainingInputs, split: TokenSplit, directory: Path, engine: Engine) -> tuple[float, FeatureCache, TokenTable]:
    """Fill or open a cache on disk; return its seconds."""
    table = TokenTable(split, pad_id=0, device=engine.device)
    sizes = {"limit_bytes": 10**12, "reserved_bytes": 0}
    settings = CacheSettings("disk", 3, directory, **sizes, frozen_weights="fixed", model_name="bench")
    begin = time.perf_counter()
    cache = FeatureCache(inputs.classifier, {"train": table}, engine, settings)
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


def measure(model: ModelConfig, what: str, num_texts: int, options: argparse.Namespace) -> None:
    """Measure one model on `num_texts` rows and their growth; print a table.

    Raises:
        SystemExit: the features of the grown corpus differ from those from scratch.
    """
    num_grown = num_texts + max(1, round(num_texts * options.percent / 100))
    cases: dict[str, list[float]] = {"from scratch": [], "grown from scratch": [], "grown": [], "found whole": []}
    with tempfile.TemporaryDirectory(prefix="growing-data-") as name:
        config = Config(
            data=DataConfig(source=str(options.shared / "data" / "ag_news"), cache_dir=name, limit_train=num_grown),
            model=model,
            engine=EngineConfig(precision="fp32"),
        )
        engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=600)
        inputs = load_training_inputs(config, World(), ignore_event, StageTimer(time.perf_counter()))
        grown = inputs.store.splits["train"]
        small = first_rows(grown, num_texts)
        sizes = {"model": what, "texts": num_texts, "grown_texts": num_grown, "tokens": int(small.offsets[-1])}
        sizes |= {"grown_tokens": int(grown.offsets[-1]), "threads": torch.get_num_threads()}
        for number in range(options.rounds):
            first, second = (Path(name) / f"{kind}-{number}" for kind in ("first", "second"))
            cases["from scratch"].append(build(inputs, small, first, engine)[0])
            seconds, added, table = build(inputs, grown, first, engine)
            cases["grown"].append(seconds)
            seconds, scratch, _ = build(inputs, grown, second, engine)
            cases["grown from scratch"].append(seconds)
            cases["found whole"].append(build(inputs, grown, first, engine)[0])
            if not are_equal(added, scratch, table):
                raise SystemExit("the features of the grown corpus differ from those from scratch")
            record = {case: round(measured[-1], 3) for case, measured in cases.items()} | sizes | {"round": number}
            if options.log:
                with options.log.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(record, allow_nan=False) + "\n")
            for directory in (first, second):
                shutil.rmtree(directory)
    new_tokens = (sizes["grown_tokens"] - sizes["tokens"]) / sizes["tokens"]
    header = f"{what}: {num_texts:,} -> {num_grown:,} texts, {new_tokens:.1%} more tokens, {sizes['threads']} threads"
    print(f"| {header} | seconds | share of a cache from scratch |\n|---|---|---|")
    for case, measured in cases.items():
        print(f"| {case} | {min(measured):.2f} | {min(measured) / min(cases['from scratch']):.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the features of a growing corpus cost.")
    parser.add_argument("--shared", type=Path, required=True, help="Directory with the data, the tokenizer and the checkpoint.")
    parser.add_argument("--texts", type=int, default=256, help="Rows for GPT-2 small's shape before the growth.")
    parser.add_argument("--mini_texts", type=int, default=4000, help="Rows for the shared checkpoint before the growth.")
    parser.add_argument("--percent", type=float, default=1.0, help="Growth.")
    parser.add_argument("--rounds", type=int, default=2, help="The tables have the least seconds of them.")
    parser.add_argument("--log", type=Path, help="File for the measurements, one JSON object per line.")
    options = parser.parse_args()
    small = ModelConfig(name=str(options.shared / "tokenizers" / "gpt2"), init="random")
    mini = ModelConfig(name=str(options.shared / "checkpoints" / "gpt2-mini"))
    for model, what, num_texts in ((small, "GPT-2 small's shape", options.texts), (mini, "gpt2-mini", options.mini_texts)):
        if num_texts:
            measure(model, what, num_texts, options)


if __name__ == "__main__":
    main()
