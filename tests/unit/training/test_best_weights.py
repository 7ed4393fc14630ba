"""The best weights: chosen by any metric, ties by the loss; restored with their scores, predictions and counter."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.events import Scores
from agnews_dist.training.best_weights import BestWeights
from agnews_dist.training.checkpoint import read_checkpoint, write_checkpoint


class FakeStrategy:
    """Trainable part of one weight."""

    value, loaded = 0.0, None

    def gather_weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the weight."""
        return {"w": torch.tensor([self.value])}

    def load_weights(self, weights: Any) -> None:
        """Record the weights."""
        self.loaded = weights


def scores(num_correct: int, loss: float, macro_f1: float = 0.5) -> SplitScores:
    """Return the scores of four examples."""
    confusion = ((num_correct, 4 - num_correct), (0, 0))
    made = Scores(
        num_examples=4, num_correct=num_correct, accuracy=num_correct / 4, macro_f1=macro_f1, loss=loss, confusion=confusion
    )
    return SplitScores(np.zeros(4, np.int64), np.arange(4) % 2, np.full((4, 2), loss, np.float32), made, 1.5)


@pytest.mark.parametrize(
    ("metric", "second", "best"),
    [
        # The first evaluation has 2 correct, loss 0.5 and macro F1 0.5.
        *(("accuracy", (3, 0.9, 0.1), 2), ("accuracy", (2, 0.4, 0.1), 2), ("accuracy", (2, 0.5, 0.9), 1)),
        *(("accuracy", (2, 0.6, 0.9), 1), ("accuracy", (1, 0.1, 0.9), 1), ("accuracy", (3, math.nan, 0.9), 1)),
        *(("macro_f1", (1, 0.9, 0.6), 2), ("macro_f1", (4, 0.1, 0.4), 1), ("macro_f1", (1, 0.4, 0.5), 2)),
        *(("macro_f1", (4, 0.5, 0.5), 1), ("loss", (1, 0.4, 0.1), 2), ("loss", (4, 0.5, 0.9), 1)),
        *(("loss", (4, math.nan, 0.9), 1), ("loss", (4, math.inf, 0.9), 1), ("macro_f1", (4, math.nan, 0.9), 1)),
    ],
)
def test_update_keeps_the_weights_that_are_better_by_the_metric(metric, second, best):
    strategy = FakeStrategy()
    kept = BestWeights(strategy, metric)
    assert (kept.epoch, kept.num_worse, kept.state_dict()) == (0, 0, None)
    for number, made in enumerate([(2, 0.5, 0.5), second], start=1):
        strategy.value = float(number)
        kept.update(number, scores(*made), step=10 * number)
    assert (kept.epoch, kept.step, kept.name) == (best, 10 * best, f"best-{10 * best:08d}")
    assert (kept.weights["w"].tolist(), kept.num_worse) == ([float(best)], 2 - best)
    kept.restore()
    assert strategy.loaded is kept.weights


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "loss"])
def test_any_finite_loss_is_better_than_none(metric):
    kept = BestWeights(FakeStrategy(), metric)
    kept.update(1, scores(2, math.nan), step=1)
    kept.update(2, scores(1, 9.0), step=2)
    assert (kept.epoch, kept.num_worse) == (2, 0)
    kept.update(3, scores(4, math.nan, 1.0), step=3)
    assert (kept.epoch, kept.num_worse) == (2, 1), "NaN logits predict the first class, which may be a frequent one"


def test_evaluations_without_improvement_are_counted_from_the_best_one():
    kept, counts = BestWeights(FakeStrategy()), list[int]()
    for step, num_correct in enumerate([1, 1, 0, 2, 2, 3, 1, 2], start=1):
        kept.update(1, scores(num_correct, 0.5), step=step)
        counts.append(kept.num_worse)
    assert counts == [0, 1, 2, 0, 1, 0, 1, 2]


def test_load_state_dict_restores_scores_and_weights():
    saved, restored = (BestWeights(FakeStrategy()) for _ in range(2))
    saved.update(3, scores(2, 0.5), step=30)
    saved.update(4, scores(1, 0.5), step=40)
    state = saved.state_dict()
    assert state is not None
    assert list(state) == ["name", "epoch", "step", "num_worse", "scores", "seconds"]
    restored.load_state_dict(state, saved.scores.tensors(), saved.weights)
    assert restored.state_dict() == state
    assert restored.weights is saved.weights
    assert (restored.epoch, restored.step, restored.num_worse) == (3, 30, 1)
    assert restored.scores.scores == saved.scores.scores
    assert np.array_equal(restored.scores.probabilities_NK, saved.scores.probabilities_NK)
    assert restored.scores.classes_NK is None


def test_state_of_a_checkpoint_without_a_counter_is_read():
    saved, restored = (BestWeights(FakeStrategy()) for _ in range(2))
    saved.update(3, scores(2, 0.5), step=30)
    state = saved.state_dict()
    assert state is not None
    del state["num_worse"]
    restored.load_state_dict(state, saved.scores.tensors(), saved.weights)
    assert (restored.step, restored.num_worse) == (30, 0)


def test_scores_of_many_classes_survive_a_checkpoint(tmp_path: Path):
    """Check the tensors and the JSON part, with a loss that is not finite and no confusion matrix."""
    made = Scores(num_examples=2, num_correct=0, accuracy=0.0, macro_f1=0.0, loss=math.nan, confusion=None)
    arrays = [np.array(values) for values in ([3, 400], [9_999, 0], [[0.5, 0.25], [0.75, 0.125]], [[9_999, 7], [0, 1]])]
    best = BestWeights(FakeStrategy())
    best.update(1, SplitScores(*arrays[:2], arrays[2].astype(np.float32), made, 1.5, arrays[3]), step=10)
    path = tmp_path / best.name
    write_checkpoint(path, {"scored": best.scores.tensors()}, best.state_dict() or {})
    found, restored = read_checkpoint(path), BestWeights(FakeStrategy())
    restored.load_state_dict(found.state, found.tensors["scored"], {})
    assert restored.scores.scores is not None
    assert math.isnan(restored.scores.scores.loss)
    assert replace(restored.scores.scores, loss=1.0) == replace(made, loss=1.0)
    for name, array in zip(("labels_N", "predictions_N", "probabilities_NK", "classes_NK"), arrays, strict=True):
        assert np.array_equal(getattr(restored.scores, name), array)
