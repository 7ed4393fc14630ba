"""Features in bf16 against features in fp32, with the package's own parts: a trained suffix on both, and training on both."""

import copy
import time
from pathlib import Path
from typing import Any, Literal

import torch

from agnews_dist.config.schema import Config, DataConfig, EngineConfig, ModelConfig, RunConfig
from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.loader import TokenTable, TrainLoader
from agnews_dist.data.batching.shares import quadratic_weight
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.evaluation.evaluator import compute_rank_logits, evaluate_split
from agnews_dist.evaluation.metrics import in_file_order
from agnews_dist.events import ignore_event
from agnews_dist.features.distinct_texts import DistinctTexts
from agnews_dist.features.filling import fill, plan_work
from agnews_dist.features.gather import CachedFeatures
from agnews_dist.model.export import load_classifier
from agnews_dist.model.prefix import Features, FeatureSource
from agnews_dist.run.setup import TrainingInputs, load_training_inputs, open_features, pad_id_of, plan_settings
from agnews_dist.training.optim import build_optimizer, learning_rate, set_lr
from agnews_dist.training.step import train_step
from agnews_dist.training.timing import StageTimer

Kind = Literal["fp32", "stored", "computed"]


class Rows:
    """The shared rows and their fp32 features, which a former run of `agnews_dist.train` left on disk."""

    def __init__(self, shared: Path, output: Path) -> None:
        torch.set_num_threads(1)
        self._config = Config(
            data=DataConfig(source=str(shared / "data" / "ag_news"), cache_dir=str(output / "cache")),
            model=ModelConfig(name=str(shared / "checkpoints" / "gpt2-mini")),
            engine=EngineConfig(feature_cache="disk"),
        )
        self._engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=600)
        sources = self._sources(0)
        self._prefix = sources.classifier.prefix.float()  # a checkpoint may be stored in bf16
        self._tables = {
            name: TokenTable(split, pad_id=pad_id_of(sources.tokenizer), device=self._engine.device)
            for name, split in sources.store.splits.items()
        }
        self._cache = open_features(self._config, sources, self._tables, self._engine, requested="disk")
        self._cache.build(ignore_event)
        assert self._cache.choice.place == "disk"

    def compare(self, run: Path, kind: Kind, split: str) -> dict[str, Any]:
        """A run's trained suffix on features of `kind` and on fp32 ones."""
        classifier = load_classifier(str(run))[0]
        table, logits = self._tables[split], []
        for features in (self.features("fp32", split), self.features(kind, split)):
            ids_N, logits_NC = compute_rank_logits(classifier, table, self._engine, features=features)
            logits.append(logits_NC[in_file_order(ids_N, len(table))])
        gaps_NC = abs(logits[1] - logits[0])
        first_N, second_N = (found.argmax(axis=1) for found in logits)
        return {
            "num_rows": len(table),
            "largest_logit_difference": float(gaps_NC.max()),
            "mean_logit_difference": float(gaps_NC.mean()),
            "logit_deviation": float(logits[0].std()),
            "flipped": int((first_N != second_N).sum()),
            "accuracy_fp32": float((first_N == table.labels_N).mean()),
            "accuracy": float((second_N == table.labels_N).mean()),
        }

    def train(self, kind: Kind, seed: int) -> dict[str, Any]:
        """The training of `agnews_dist.train` at its defaults, on features of `kind`; scored on the same kind."""
        start = time.perf_counter()
        classifier, optim = self._sources(seed).classifier, self._config.optim
        loader = TrainLoader(
            self._tables["train"],
            World(),
            plan_settings(self._config.batch, seed),
            max_tokens_per_rank=self._config.batch.max_tokens_per_rank,
            quadratic=quadratic_weight(classifier.config.n_embd),
            max_length=self._config.data.max_length,
        )
        features = {split: self.features(kind, split) for split in ("train", "validation")}
        torch.manual_seed(seed)
        optimizer = build_optimizer(classifier.suffix, lr=optim.lr, weight_decay=optim.weight_decay)
        wrapped = self._engine.prepare(classifier.suffix, optimizer, max_grad_norm=optim.max_grad_norm)
        num_steps, step, scores = loader.num_steps(optim.epochs), 0, []
        for epoch in range(optim.epochs):
            classifier.suffix.train()
            for batches in loader.steps(epoch):
                lr = learning_rate(
                    step, num_steps=num_steps, peak=optim.lr, warmup_ratio=optim.warmup_ratio, schedule=optim.schedule
                )
                set_lr(optimizer, lr)
                train_step(self._engine, features["train"], wrapped, batches)
                step += 1
            scored = evaluate_split(classifier, self._tables["validation"], self._engine, features=features["validation"])
            scores.append(scored.scores)
        return {
            "accuracy": [found.accuracy for found in scores],
            "loss": [round(found.loss, 6) for found in scores],
            "predictions": "".join(map(str, scored.predictions_N)),
            "seconds": round(time.perf_counter() - start, 1),
        }

    def features(self, kind: Kind, split: str) -> FeatureSource:
        """Of a split: as kept, rounded to bf16 (which is what storing them so would do), or computed in bf16."""
        kept = self._cache.source(split)
        if kind == "fp32":
            return kept
        return self._computed_in_bf16(split) if kind == "computed" else lambda batch: rounded(kept, batch)

    def _computed_in_bf16(self, split: str) -> CachedFeatures:
        """Weights, activations and rows in bf16, as on a GPU; for a split that is scored."""
        prefix, table = copy.deepcopy(self._prefix).bfloat16(), self._tables[split]
        texts = DistinctTexts({split: table}, one_row_per_text=prefix.one_row_per_text)
        work, cpu = plan_work(texts, [], prefix, copies=True), torch.device("cpu")
        return work.source(split, fill(work, None, prefix, memory=cpu, world=World(), emit=ignore_event))

    def _sources(self, seed: int) -> TrainingInputs:
        config = self._config.model_copy(update={"run": RunConfig(seed=seed)})
        return load_training_inputs(config, World(), ignore_event, StageTimer(time.perf_counter()))


def rounded(kept: FeatureSource, batch: Batch) -> Features:
    """Features rounded to bf16."""
    hidden_BTD, lengths_B = kept(batch)
    return Features(hidden_BTD.bfloat16(), lengths_B)
