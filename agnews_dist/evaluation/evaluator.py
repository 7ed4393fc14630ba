"""Evaluation of a split over all ranks: every example once, results in file order, equal on every rank.

Micro-batches depend on the text lengths alone and are never divided. So an example's logits come from the same matrix products
on any number of ranks. With equal thread counts they are equal to the last bit.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agnews_dist.data.batching.loader import TokenTable, evaluation_batches
from agnews_dist.distributed import collectives
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import Stopped
from agnews_dist.evaluation.metrics import (
    MAX_DENSE_CLASSES,
    are_labelled,
    choose_listed_classes,
    compute_class_scores,
    compute_scores,
    count_classes,
    in_file_order,
)
from agnews_dist.events import Emit, EvalDone, Predicted, Progress, Scores, ignore_event
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import FeatureSource, uncached_features
from agnews_dist.model.suffix import Suffix

NUM_TOP_CLASSES = 5
"""Classes whose probabilities are kept per text if there are more than MAX_DENSE_CLASSES."""
MAX_REDUCED_LOGITS = 1 << 22
"""Logits that are copied to float64 at once: a few copies of 32 MB."""

T = TypeVar("T")


@dataclass(frozen=True)
class SplitScores:
    """Predictions for a split and their scores, rows in file order."""

    labels_N: NDArray[np.int64]
    """All -1 if the split has no labels."""
    predictions_N: NDArray[np.int64]
    probabilities_NK: NDArray[np.float32]
    """Probabilities of every class in order, or of `classes_NK`."""
    scores: Scores | None
    """None without labels."""
    seconds: float
    classes_NK: NDArray[np.int64] | None = None
    """The most probable classes, the first one is the prediction; None up to MAX_DENSE_CLASSES classes."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the arrays as tensors, for a checkpoint."""
        arrays = {"labels": self.labels_N, "predictions": self.predictions_N, "probabilities": self.probabilities_NK}
        if self.classes_NK is not None:
            arrays["classes"] = self.classes_NK
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def state_dict(self) -> dict[str, object]:
        """Return the JSON part of the state: scores and seconds."""
        return {"scores": None if self.scores is None else asdict(self.scores), "seconds": self.seconds}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> "SplitScores":
        """Restore from `tensors()` and `state_dict()`."""
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        scores = None
        if state["scores"] is not None:
            fields = dict[str, Any](state["scores"])
            if fields["confusion"] is not None:
                fields["confusion"] = tuple(tuple(row) for row in fields["confusion"])
            scores = Scores(**fields)
        labels_N, predictions_N, probabilities_NK = (arrays[name] for name in ("labels", "predictions", "probabilities"))
        return cls(labels_N, predictions_N, probabilities_NK, scores, state["seconds"], arrays.get("classes"))

    def to_event(
        self, split: str, epoch: int, class_names: tuple[str, ...], *, step: int = 0, is_best: bool = False
    ) -> EvalDone | Predicted:
        """Return the event that reports these scores, or that there are none."""
        if self.scores is None:
            return Predicted(split=split, num_examples=len(self.labels_N), seconds=self.seconds)
        counts = count_classes(self.labels_N, self.predictions_N, len(class_names))
        classes = choose_listed_classes(counts)
        has_all = len(classes) == len(class_names)
        return EvalDone(
            split=split,
            epoch=epoch,
            step=step,
            scores=self.scores if has_all else replace(self.scores, confusion=None),
            class_names=class_names if has_all else None,
            num_classes=len(class_names),
            classes=compute_class_scores(counts, classes, class_names),
            seconds=self.seconds,
            is_best=is_best,
        )


class RowResults(NamedTuple):
    """The kept part of the logits of N texts."""

    ids_N: NDArray[np.int64]
    predictions_N: NDArray[np.int64]
    losses_N: NDArray[np.float64]
    """Losses of the labels; of no meaning without labels."""
    probabilities_NK: NDArray[np.float32]
    classes_NK: NDArray[np.int64]
    """Classes of the columns of `probabilities_NK`; no columns: every class in order."""

    @staticmethod
    def concatenate(parts: list["RowResults"]) -> "RowResults":
        """Join the rows of all parts, in order."""
        columns: list[Any] = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return RowResults(*columns)

    def take(self, order_N: NDArray[np.int64]) -> "RowResults":
        """Select rows, in that order."""
        columns: list[Any] = [column[order_N] for column in self]
        return RowResults(*columns)


def log_softmax_NC(logits_NC: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute log-probabilities in float64. Shifting by the largest logit prevents overflow."""
    wide_NC = logits_NC.astype(np.float64)
    wide_NC -= wide_NC.max(axis=1, keepdims=True)
    wide_NC -= np.log(np.exp(wide_NC).sum(axis=1, keepdims=True))
    return wide_NC


def reduce_logits(ids_N: NDArray[np.int64], logits_NC: NDArray[np.float32], labels_N: NDArray[np.int64]) -> RowResults:
    """Reduce logits to predictions, losses and the probabilities that are kept, in float64. Ties go to the first class."""
    (num_rows, num_classes), block = logits_NC.shape, max(1, MAX_REDUCED_LOGITS // logits_NC.shape[1])
    if num_rows > block:
        parts = [slice(begin, begin + block) for begin in range(0, num_rows, block)]
        return RowResults.concatenate([reduce_logits(ids_N[part], logits_NC[part], labels_N[part]) for part in parts])
    row_N = np.arange(num_rows)
    log_NC = log_softmax_NC(logits_NC)
    # Without labels, -1 selects the last class. That loss is not used.
    predictions_N, losses_N = log_NC.argmax(axis=1), -log_NC[row_N, labels_N]
    if num_classes <= MAX_DENSE_CLASSES:
        probabilities_NC = np.exp(log_NC).astype(np.float32)
        return RowResults(ids_N, predictions_N, losses_N, probabilities_NC, np.empty((num_rows, 0), np.int64))
    classes_NK, log_NK = np.empty((num_rows, NUM_TOP_CLASSES), np.int64), np.empty((num_rows, NUM_TOP_CLASSES))
    for k in range(NUM_TOP_CLASSES):
        # Repeated maxima: few passes are faster than sorting, and ties stay in class order.
        classes_NK[:, k] = log_NC.argmax(axis=1)
        log_NK[:, k] = log_NC[row_N, classes_NK[:, k]]
        log_NC[row_N, classes_NK[:, k]] = -np.inf
    return RowResults(ids_N, predictions_N, losses_N, np.exp(log_NK).astype(np.float32), classes_NK)


def map_rank_logits(
    reduce: Callable[[NDArray[np.int64], NDArray[np.float32]], T],
    classifier: Classifier,
    table: TokenTable,
    engine: Engine,
    *,
    features: FeatureSource | None = None,
    emit: Emit = ignore_event,
    is_stopping: Callable[[], bool] | None = None,
) -> list[T]:
    """Compute this rank's share of a split without dropout; return `reduce(ids_B, logits_BC)` of every micro-batch.

    The first result is that of no row, so that there always is one. `features`: None: the classifier's frozen part computes
    them. `is_stopping`: asked before every batch.

    Raises:
        Stopped: `is_stopping` returned True here, or on any rank if a forward pass is collective.
    """
    features = features or uncached_features(classifier.prefix)
    results = [reduce(np.empty(0, np.int64), np.empty((0, classifier.suffix.out_head.out_features), np.float32))]
    was_training = classifier.suffix.training
    classifier.suffix.eval()
    batches, num_ranks = evaluation_batches(table), engine.world.num_ranks
    plan = batches[engine.world.rank :: num_ranks]
    num_done, num_rows = 0, sum(map(len, plan))
    with torch.no_grad():
        for ids_B in plan:
            # Before the batch, so that a slow first one is not silent. The scores are the last report.
            emit(Progress(task=f"score {table.name}", done=num_done, total=num_rows, unit="rows"))
            _raise_if_stopping(engine, is_stopping)
            batch = table.batch(ids_B)
            results.append(reduce(ids_B, classifier.suffix(*features(batch)).float().cpu().numpy()))
            num_done += len(ids_B)
        if engine.is_forward_collective and len(plan) < -(-len(batches) // num_ranks):
            # The other ranks compute one more batch, and cannot gather the weights without this rank.
            _raise_if_stopping(engine, is_stopping)
            classifier.suffix(*features(table.batch(batches[0])))
    classifier.suffix.train(was_training)
    return results


def compute_rank_logits(
    classifier: Classifier, table: TokenTable, engine: Engine, *, features: FeatureSource | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Compute this rank's share of a split: (ids, logits_NC), in computing order. See `map_rank_logits`."""
    parts = map_rank_logits(lambda ids_B, logits_BC: (ids_B, logits_BC), classifier, table, engine, features=features)
    ids, logits = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(logits)


def _raise_if_stopping(engine: Engine, is_stopping: Callable[[], bool] | None) -> None:
    must_stop = is_stopping is not None and is_stopping()
    if engine.is_forward_collective:
        # All ranks must make the forward pass, or none.
        must_stop = any(votes > 0 for (votes,) in collectives.gather_numbers([float(must_stop)]))
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
    """Evaluate a split over all ranks, or predict it if it has no labels. Collective. See `map_rank_logits`.

    The loss is a float64 sum in file order. Logits are reduced batch by batch, so memory does not grow with rows x classes.

    Raises:
        Stopped: on all ranks, if `is_stopping` returned True on any rank.
    """
    start = time.perf_counter()
    labels_N, num_classes = table.labels_N, classifier.suffix.out_head.out_features
    # Before any batch: a label outside the classes is an error.
    are_labelled(labels_N, num_classes)

    def reduce(ids_B: NDArray[np.int64], logits_BC: NDArray[np.float32]) -> RowResults:
        return reduce_logits(ids_B, logits_BC, labels_N[ids_B])

    try:
        results = map_rank_logits(reduce, classifier, table, engine, features=features, emit=emit, is_stopping=is_stopping)
        local = RowResults.concatenate(results)
    except Stopped:
        local = None
    parts = [part for part in collectives.all_gather(local) if part is not None]
    if len(parts) < engine.world.num_ranks:
        raise Stopped
    return _score_rows(RowResults.concatenate(parts), labels_N, num_classes, seconds=time.perf_counter() - start)


def map_logits_together(
    reduce: Callable[[NDArray[np.int64], NDArray[np.float32]], T],
    classifiers: Sequence[Classifier],
    table: TokenTable,
    engine: Engine,
    *,
    features: FeatureSource | None = None,
    emit: Emit = ignore_event,
) -> list[T]:
    """Return `reduce(ids_B, logits_MBC)` of every micro-batch: of M classifiers that share their frozen part.

    Its output is read or computed once. For one rank alone; see `map_rank_logits`.
    """

    def reduce_together(ids_B: NDArray[np.int64], logits_BX: NDArray[np.float32]) -> T:
        return reduce(ids_B, logits_BX.reshape(len(ids_B), len(classifiers), num_classes).swapaxes(0, 1))

    num_classes = classifiers[0].suffix.out_head.out_features
    together = replace(classifiers[0], suffix=cast(Any, _Together([classifier.suffix for classifier in classifiers])))
    return map_rank_logits(reduce_together, together, table, engine, features=features, emit=emit)


def evaluate_together(
    classifiers: Sequence[Classifier],
    table: TokenTable,
    engine: Engine,
    *,
    features: FeatureSource | None = None,
    emit: Emit = ignore_event,
) -> list[SplitScores]:
    """Evaluate a split with several classifiers that share their frozen part, whose output is read or computed once.

    The scores are those of `evaluate_split`. For one rank alone.
    """
    start, labels_N = time.perf_counter(), table.labels_N

    def reduce(ids_B: NDArray[np.int64], logits_MBC: NDArray[np.float32]) -> list[RowResults]:
        return [reduce_logits(ids_B, logits_BC, labels_N[ids_B]) for logits_BC in logits_MBC]

    parts = map_logits_together(reduce, classifiers, table, engine, features=features, emit=emit)
    num_classes = classifiers[0].suffix.out_head.out_features
    seconds = (time.perf_counter() - start) / len(classifiers)
    return [
        _score_rows(RowResults.concatenate(list(of)), labels_N, num_classes, seconds=seconds) for of in zip(*parts, strict=True)
    ]


def score_logits(logits_NC: NDArray[np.float32], labels_N: NDArray[np.int64], *, seconds: float) -> SplitScores:
    """Score the logits of all rows of a split, in file order."""
    rows = reduce_logits(np.arange(len(labels_N)), logits_NC, labels_N)
    return _score_rows(rows, labels_N, logits_NC.shape[1], seconds=seconds)


class _Together(nn.Module):
    """Several suffixes in the place of one: they read the same features, and their logits come next to each other."""

    def __init__(self, suffixes: Sequence[Suffix]) -> None:
        super().__init__()
        self.suffixes = nn.ModuleList(suffixes)
        self.out_head = suffixes[0].out_head

    def forward(self, *features: Tensor) -> Tensor:
        """Compute logits_BX: all classes of the first suffix, then those of the second."""
        return torch.cat([suffix(*features).float() for suffix in self.suffixes], dim=1)


def _score_rows(rows: RowResults, labels_N: NDArray[np.int64], num_classes: int, *, seconds: float) -> SplitScores:
    """Score the rows of a split, in any order."""
    rows = rows.take(in_file_order(rows.ids_N, len(labels_N)))
    has_labels = are_labelled(labels_N, num_classes)
    scores = compute_scores(labels_N, rows.predictions_N, num_classes, float(rows.losses_N.sum())) if has_labels else None
    classes_NK = rows.classes_NK if rows.classes_NK.size else None
    return SplitScores(labels_N, rows.predictions_N, rows.probabilities_NK, scores, seconds, classes_NK)
