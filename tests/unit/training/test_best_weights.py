"""The best epoch: highest accuracy, then lowest loss; restored with its weights and predictions."""

from typing import Any

import numpy as np
import pytest
import torch

from agnews_dist.evaluation.evaluator import SplitScores
from agnews_dist.events import Scores
from agnews_dist.training.best_weights import BestWeights


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
    return SplitScores(np.zeros(4, np.int64), np.arange(4) % 2, np.full((4, 2), loss), made, 1.5)


@pytest.mark.parametrize(("second", "best"), [((3, 0.9), 2), ((2, 0.4), 2), ((2, 0.5), 1), ((2, 0.6), 1), ((1, 0.1), 1)])
def test_update_keeps_the_epoch_with_higher_accuracy_or_lower_loss(second, best):
    strategy = FakeStrategy()
    epoch = BestWeights(strategy)
    assert (epoch.epoch, epoch.state_dict()) == (0, None)
    for number, (num_correct, loss) in enumerate([(2, 0.5), second], start=1):
        strategy.value = float(number)
        epoch.update(number, scores(num_correct, loss), step=10 * number)
    assert (epoch.epoch, epoch.name, epoch.weights["w"].tolist()) == (best, f"best-{10 * best:08d}", [float(best)])
    epoch.restore()
    assert strategy.loaded is epoch.weights


def test_load_state_dict_restores_scores_and_weights():
    saved, restored = (BestWeights(FakeStrategy()) for _ in range(2))
    saved.update(3, scores(2, 0.5), step=30)
    state = saved.state_dict()
    assert state is not None
    assert list(state) == ["name", "epoch", "step", "num_worse", "scores", "seconds"]
    restored.load_state_dict(state, saved.scores.tensors(), saved.weights)
    assert restored.state_dict() == state
    assert restored.weights is saved.weights
    assert restored.scores.scores == saved.scores.scores
    assert np.array_equal(restored.scores.probabilities_NC, saved.scores.probabilities_NC)
