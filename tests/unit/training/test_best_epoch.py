"""The best epoch: highest accuracy, then lowest loss; restored with its weights and predictions."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.events import Scores
from agnews_dist.training.best_epoch import BestEpoch
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


def scores(num_correct: int, loss: float) -> SplitScores:
    """Return the scores of four examples."""
    confusion = ((num_correct, 4 - num_correct), (0, 0))
    made = Scores(
        num_examples=4, num_correct=num_correct, accuracy=num_correct / 4, macro_f1=0.5, loss=loss, confusion=confusion
    )
    return SplitScores(np.zeros(4, np.int64), np.arange(4) % 2, np.full((4, 2), loss, np.float32), made, 1.5)


@pytest.mark.parametrize(("second", "best"), [((3, 0.9), 2), ((2, 0.4), 2), ((2, 0.5), 1), ((2, 0.6), 1), ((1, 0.1), 1)])
def test_update_keeps_the_epoch_with_higher_accuracy_or_lower_loss(second, best):
    strategy = FakeStrategy()
    epoch = BestEpoch(strategy)
    assert (epoch.epoch, epoch.state_dict()) == (0, None)
    for number, (num_correct, loss) in enumerate([(2, 0.5), second], start=1):
        strategy.value = float(number)
        epoch.update(number, scores(num_correct, loss), step=10 * number)
    assert (epoch.epoch, epoch.name, epoch.weights["w"].tolist()) == (best, f"best-{10 * best:08d}", [float(best)])
    epoch.restore()
    assert strategy.loaded is epoch.weights


def test_load_state_dict_restores_scores_and_weights():
    saved, restored = (BestEpoch(FakeStrategy()) for _ in range(2))
    saved.update(3, scores(2, 0.5), step=30)
    state = saved.state_dict()
    assert state is not None
    assert list(state) == ["name", "epoch", "step", "scores", "seconds"]
    restored.load_state_dict(state, saved.scores.tensors(), saved.weights)
    assert restored.state_dict() == state
    assert restored.weights is saved.weights
    assert restored.scores.scores == saved.scores.scores
    assert np.array_equal(restored.scores.probabilities_NK, saved.scores.probabilities_NK)
    assert restored.scores.classes_NK is None


def test_scores_of_many_classes_survive_a_checkpoint(tmp_path: Path):
    """Check the tensors and the JSON part, with a loss that is not finite and no confusion matrix."""
    made = Scores(num_examples=2, num_correct=0, accuracy=0.0, macro_f1=0.0, loss=math.nan, confusion=None)
    arrays = [np.array(values) for values in ([3, 400], [9_999, 0], [[0.5, 0.25], [0.75, 0.125]], [[9_999, 7], [0, 1]])]
    best = BestEpoch(FakeStrategy())
    best.update(1, SplitScores(*arrays[:2], arrays[2].astype(np.float32), made, 1.5, arrays[3]), step=10)
    path = tmp_path / best.name
    write_checkpoint(path, {"scored": best.scores.tensors()}, best.state_dict() or {})
    found, restored = read_checkpoint(path), BestEpoch(FakeStrategy())
    restored.load_state_dict(found.state, found.tensors["scored"], {})
    assert restored.scores.scores is not None
    assert math.isnan(restored.scores.scores.loss)
    assert replace(restored.scores.scores, loss=1.0) == replace(made, loss=1.0)
    for name, array in zip(("labels_N", "predictions_N", "probabilities_NK", "classes_NK"), arrays, strict=True):
        assert np.array_equal(getattr(restored.scores, name), array)
