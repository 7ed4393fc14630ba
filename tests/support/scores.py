"""Scores of a confusion matrix written by hand, as the metrics compute them from labels and predictions."""

import numpy as np

from agnews_dist.evaluation.metrics import compute_scores
from agnews_dist.events import Scores


def list_pairs(confusion: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (rows) and predictions (columns) that the matrix counts."""
    cells = np.array(confusion)
    labels, predictions = (index.ravel().repeat(cells.ravel()) for index in np.indices(cells.shape))
    return labels, predictions


def scores_of(confusion: list[list[int]], loss_sum: float) -> Scores:
    """Return the scores of examples that the matrix counts."""
    return compute_scores(*list_pairs(confusion), len(confusion), loss_sum)
