"""The mean of several classifiers, and one classifier distilled from it.

An ensemble's probabilities are the mean of its members'. Distillation trains one more member on these probabilities for the
training rows in place of the labels (Hinton, Vinyals, Dean 2015, at temperature 1). A temperature that is fitted on validation
then divides its logits: `out_head` divided by it has these logits exactly.
"""

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError
from agnews_dist.evaluation.calibration import calibration_curve, expected_calibration_error, fit_temperature
from agnews_dist.evaluation.evaluator import SplitScores, log_softmax_NC, map_logits_together
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import FeatureSource
from agnews_dist.storage.capacity import free_host_bytes, gigabytes

MEMORY_SHARE = 0.25
"""Largest share of the free memory for the probabilities of a split's rows."""


class MeanProbabilities:
    """The mean probabilities of a split's rows, over classifiers that come part by part. For one rank alone."""

    def __init__(self, num_rows: int, num_classes: int) -> None:
        """Prepare.

        Raises:
            UserError: the probabilities do not fit in memory.
        """
        num_bytes, free = 4 * num_rows * num_classes, free_host_bytes()
        if num_bytes > MEMORY_SHARE * free:
            raise UserError(
                f"probabilities of {num_rows:,} rows and {num_classes:,} classes: they take {gigabytes(num_bytes)}, and "
                f"{gigabytes(free)} are free. Set data.limit_train, or use a machine with more memory."
            )
        self.seconds = 0.0
        self._num_classifiers = 0
        self._sums_NC = np.full((num_rows, num_classes), -np.inf, np.float32)
        """Logarithms of the sums of the probabilities."""

    @property
    def log_NC(self) -> NDArray[np.float32]:
        """Logarithms of the mean probabilities, in file order."""
        return self._sums_NC - np.float32(math.log(self._num_classifiers))

    def add(
        self, classifiers: Sequence[Classifier], table: TokenTable, engine: Engine, features: FeatureSource | None = None
    ) -> None:
        """Add classifiers that share their frozen part."""
        begin = time.perf_counter()

        def keep(ids_B: NDArray[np.int64], logits_MBC: NDArray[np.float32]) -> None:
            self._sums_NC[ids_B] = np.logaddexp.reduce([self._sums_NC[ids_B], *map(log_softmax_NC, logits_MBC)])

        map_logits_together(keep, classifiers, table, engine, features=features)
        self._num_classifiers += len(classifiers)
        self.seconds += time.perf_counter() - begin


def fold_temperature(weights: Mapping[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """Return weights whose logits are those of `weights` divided by a temperature. Names may have a prefix."""
    heads = {name: weights[name] / temperature for name in weights if "out_head." in name}
    return {**weights, **heads}


def choose_temperature(validation: SplitScores) -> float:
    """Fit a temperature on validation; 1 without all probabilities or all labels. Needs scipy."""
    if validation.classes_NK is not None or (validation.labels_N < 0).any():
        return 1.0
    return fit_temperature(validation.labels_N, validation.probabilities_NK)


def calibration_error(split: SplitScores) -> float:
    """Compute the expected calibration error of a split with labels."""
    confidence_N = split.probabilities_NK.max(axis=1)
    return expected_calibration_error(calibration_curve(split.labels_N, split.predictions_N, confidence_N))
