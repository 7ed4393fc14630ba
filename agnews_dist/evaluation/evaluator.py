"""Evaluation of a split over all ranks: every example once, results in file order, equal on every rank.

Micro-batches depend on the text lengths alone and are never divided. So an example's logits come from the same matrix products
on any number of ranks. With equal thread counts they are equal to the last bit.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agnews_dist.data.batching.loader import TokenTable, evaluation_batches
from agnews_dist.distributed import collectives
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import Stopped
from agnews_dist.evaluation.metrics import compute_scores, confusion_matrix, in_file_order
from agnews_dist.events import Emit, EvalDone, Progress, Scores, ignore_event
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import FeatureSource, uncached_features


@dataclass(frozen=True)
class SplitScores:
    """Scores of a split and the predictions behind them, rows in file order."""

    labels_N: NDArray[np.int64]
    predictions_N: NDArray[np.int64]
    probabilities_NC: NDArray[np.float64]
    scores: Scores
    seconds: float

    def tensors(self) -> dict[str, Tensor]:
        """Return the arrays as tensors, for a checkpoint."""
        return {
            "labels": torch.from_numpy(self.labels_N),
            "predictions": torch.from_numpy(self.predictions_N),
            "probabilities": torch.from_numpy(self.probabilities_NC),
        }

    def state_dict(self) -> dict[str, object]:
        """Return the JSON part of the state: scores and seconds."""
        return {"scores": asdict(self.scores), "seconds": self.seconds}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> "SplitScores":
        """Restore from `tensors()` and `state_dict()`."""
        scores = dict[str, Any](state["scores"])
        scores["confusion"] = tuple(tuple(row) for row in scores["confusion"])
        names = ("labels", "predictions", "probabilities")
        labels_N, predictions_N, probabilities_NC = (tensors[name].numpy() for name in names)
        return cls(labels_N, predictions_N, probabilities_NC, Scores(**scores), state["seconds"])

    def to_event(self, split: str, epoch: int, class_names: tuple[str, ...], *, step: int = 0) -> EvalDone:
        """Return the event that reports these scores."""
        return EvalDone(split=split, epoch=epoch, step=step, scores=self.scores, class_names=class_names, seconds=self.seconds)


def log_softmax_NC(logits_NC: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute log-probabilities in float64. Shifting by the largest logit prevents overflow."""
    wide_NC = logits_NC.astype(np.float64)
    wide_NC -= wide_NC.max(axis=1, keepdims=True)
    return wide_NC - np.log(np.exp(wide_NC).sum(axis=1, keepdims=True))


def compute_rank_logits(
    classifier: Classifier,
    table: TokenTable,
    engine: Engine,
    *,
    features: FeatureSource | None = None,
    emit: Emit = ignore_event,
    is_stopping: Callable[[], bool] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Compute this rank's share of a split: (ids, logits_NC), in computing order, without dropout.

    `features`: None: the classifier's frozen part computes them. `is_stopping`: asked before every batch.

    Raises:
        Stopped: `is_stopping` returned True here, or on any rank if a forward pass is collective.
    """
    features = features or uncached_features(classifier.prefix)
    ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    logits: list[NDArray[np.float32]] = [np.empty((0, classifier.suffix.out_head.out_features), np.float32)]
    was_training = classifier.suffix.training
    classifier.suffix.eval()
    batches, num_ranks = evaluation_batches(table), engine.world.num_ranks
    plan = batches[engine.world.rank :: num_ranks]
    num_done, num_rows = 0, sum(map(len, plan))
    with torch.no_grad():
        for ids_B in plan:
            _raise_if_stopping(engine, is_stopping)
            batch = table.batch(ids_B)
            ids.append(ids_B)
            logits.append(classifier.suffix(*features(batch)).float().cpu().numpy())
            num_done += len(ids_B)
            emit(Progress(task=f"score {table.name}", done=num_done, total=num_rows))
        if engine.is_forward_collective and len(plan) < -(-len(batches) // num_ranks):
            # The other ranks compute one more batch, and cannot gather the weights without this rank.
            _raise_if_stopping(engine, is_stopping)
            classifier.suffix(*features(table.batch(batches[0])))
    classifier.suffix.train(was_training)
    return np.concatenate(ids), np.concatenate(logits)


def _raise_if_stopping(engine: Engine, is_stopping: Callable[[], bool] | None) -> None:
    must_stop = is_stopping is not None and is_stopping()
    if engine.is_forward_collective:
        # All ranks must make the forward pass, or none.
        must_stop = collectives.all_sum([float(must_stop)], engine.device)[0] > 0
    if must_stop:
        raise Stopped


def evaluate_split(
    classifier: Classifier,
    table: TokenTable,
    engine: Engine,
    *,
    features: FeatureSource | None = None,
    emit: Emit = ignore_event,
    is_stopping: Callable[[], bool] | None = None,
) -> SplitScores:
    """Evaluate a split over all ranks. Collective. The loss is a float64 sum in file order. See `compute_rank_logits`.

    Raises:
        Stopped: on all ranks, if `is_stopping` returned True on any rank.
    """
    start = time.perf_counter()
    try:
        local = compute_rank_logits(classifier, table, engine, features=features, emit=emit, is_stopping=is_stopping)
    except Stopped:
        local = None
    parts = [part for part in collectives.all_gather(local) if part is not None]
    if len(parts) < engine.world.num_ranks:
        raise Stopped
    ids_N, logits_NC = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    log_probabilities_NC = log_softmax_NC(logits_NC[in_file_order(ids_N, len(table))])
    labels_N = table.labels_N
    predictions_N = log_probabilities_NC.argmax(axis=1)
    losses_N = -log_probabilities_NC[np.arange(len(labels_N)), labels_N]
    confusion_CC = confusion_matrix(labels_N, predictions_N, num_classes=logits_NC.shape[1])
    scores = compute_scores(confusion_CC, float(losses_N.sum()))
    return SplitScores(labels_N, predictions_N, np.exp(log_probabilities_NC), scores, seconds=time.perf_counter() - start)
