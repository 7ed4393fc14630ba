"""Scoring a split over all ranks: every example exactly once, results in file order, equal on every rank.

The micro-batches are fixed by the lengths alone and dealt out whole, so an example's logits come from the same matrix products
on any number of ranks: at equal thread counts they are equal to the last bit.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agnews_dist.data.batching.loader import TokenTable, scoring_batches
from agnews_dist.distributed import collectives
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import Stopped
from agnews_dist.evaluation.metrics import Scores, confusion_matrix, in_file_order, summarize
from agnews_dist.events import Emit, EvalDone, Progress, silent
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import FeatureSource, computed


def never() -> bool:
    """Where nobody stops."""
    return False


@dataclass(frozen=True)
class SplitScores:
    """A split's results, rows in file order."""

    labels_N: NDArray[np.int64]
    predictions_N: NDArray[np.int64]
    probabilities_NC: NDArray[np.float64]
    scores: Scores
    seconds: float

    def tensors(self) -> dict[str, Tensor]:
        """All but the scores, for a checkpoint."""
        return {
            "labels": torch.from_numpy(self.labels_N),
            "predictions": torch.from_numpy(self.predictions_N),
            "probabilities": torch.from_numpy(self.probabilities_NC),
        }

    def rest(self) -> dict[str, object]:
        """The scores and the seconds, JSON-ready."""
        return {"scores": asdict(self.scores), "seconds": self.seconds}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> "SplitScores":
        """What gave these `tensors()` and this `rest()`."""
        scores = dict[str, Any](rest["scores"])
        scores["confusion"] = tuple(tuple(row) for row in scores["confusion"])
        labels_N, predictions_N, probabilities_NC = (
            tensors[name].numpy() for name in ("labels", "predictions", "probabilities")
        )
        return cls(labels_N, predictions_N, probabilities_NC, Scores(**scores), rest["seconds"])

    def event(self, split: str, epoch: int, class_names: tuple[str, ...]) -> EvalDone:
        """What the sinks are told."""
        scores = self.scores
        return EvalDone(
            split=split,
            epoch=epoch,
            num_examples=scores.num_examples,
            num_correct=scores.num_correct,
            accuracy=scores.accuracy,
            macro_f1=scores.macro_f1,
            loss=scores.loss,
            confusion=scores.confusion,
            class_names=class_names,
            seconds=self.seconds,
        )


def log_softmax_NC(logits_NC: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities in float64, shifted by the largest logit so that nothing overflows."""
    wide_NC = logits_NC.astype(np.float64)
    wide_NC -= wide_NC.max(axis=1, keepdims=True)
    return wide_NC - np.log(np.exp(wide_NC).sum(axis=1, keepdims=True))


def rank_logits(
    classifier: Classifier,
    table: TokenTable,
    engine: Engine,
    *,
    num_classes: int,
    features: FeatureSource | None = None,
    emit: Emit = silent,
    is_stopping: Callable[[], bool] = never,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """This rank's part of a split: (ids, logits_NC), in the order computed, without dropout; `emit` hears of the progress.

    `features` of a batch come from the classifier's prefix if not from elsewhere.

    Raises:
        Stopped: `is_stopping` became true, here or, where a forward pass is collective, on any rank.
    """
    features = features or computed(classifier.prefix)
    ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    logits: list[NDArray[np.float32]] = [np.empty((0, num_classes), np.float32)]
    was_training = classifier.suffix.training
    classifier.suffix.eval()
    batches, num_ranks = scoring_batches(table), engine.world.num_ranks
    plan = batches[engine.world.rank :: num_ranks]
    num_done, num_rows = 0, sum(map(len, plan))
    with torch.no_grad():
        for ids_B in plan:
            _stop_here(engine, is_stopping)
            batch = table.batch(ids_B)
            ids.append(ids_B)
            logits.append(classifier.suffix(*features(batch)).float().cpu().numpy())
            num_done += len(ids_B)
            emit(Progress(task=f"score {table.name}", done=num_done, total=num_rows))
        if engine.gathers_weights and len(plan) < -(-len(batches) // num_ranks):
            # The other ranks score one batch more, and cannot put the weights together without this one.
            _stop_here(engine, is_stopping)
            classifier.suffix(*features(table.batch(batches[0])))
    classifier.suffix.train(was_training)
    return np.concatenate(ids), np.concatenate(logits)


def _stop_here(engine: Engine, is_stopping: Callable[[], bool]) -> None:
    stops = is_stopping()
    if engine.gathers_weights:
        # Every rank must make a forward pass or none.
        stops = collectives.all_sum([float(stops)], engine.device)[0] > 0
    if stops:
        raise Stopped


def evaluate_split(
    classifier: Classifier,
    table: TokenTable,
    engine: Engine,
    *,
    num_classes: int,
    features: FeatureSource | None = None,
    emit: Emit = silent,
    is_stopping: Callable[[], bool] = never,
) -> SplitScores:
    """Logits of every example, gathered once; counts are integers, the loss is a float64 sum in file order.

    `features` and `is_stopping`: see `rank_logits`.

    Raises:
        Stopped: on all ranks, if any rank was to stop.
    """
    start = time.perf_counter()
    try:
        local = rank_logits(
            classifier,
            table,
            engine,
            num_classes=num_classes,
            features=features,
            emit=emit,
            is_stopping=is_stopping,
        )
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
    scores = summarize(confusion_matrix(labels_N, predictions_N, num_classes), float(losses_N.sum()))
    return SplitScores(
        labels_N, predictions_N, np.exp(log_probabilities_NC), scores, seconds=time.perf_counter() - start
    )
