"""The mean of several classifiers, and one classifier distilled from it.

An ensemble's probabilities are the mean of its members'. Distillation trains one more member on these probabilities for the
training rows in place of the labels (Hinton, Vinyals, Dean 2015, at temperature 1). A temperature that is fitted on validation
then divides its logits: `out_head` divided by it has these logits exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError
from agnews_dist.evaluation.calibration import calibration_curve, expected_calibration_error, fit_temperature
from agnews_dist.evaluation.evaluator import SplitScores, map_rank_logits
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.model.prefix import FeatureSource
from agnews_dist.model.suffix import SuffixList
from agnews_dist.storage.capacity import free_host_bytes, gigabytes

TARGET_SHARE = 0.25
"""Largest share of the free memory for the probabilities of all training rows."""


class Ensemble(SuffixList):
    """Several suffixes as one, whose logits are the logarithms of the mean probabilities."""

    def forward(self, *features: Tensor) -> Tensor:
        """Compute log-probabilities in the place of logits_BC, in float64."""
        logs = [logits_BC.double().log_softmax(dim=1) for logits_BC in self.each(*features)]
        return torch.stack(logs).logsumexp(dim=0) - np.log(len(logs))


def combine(classifiers: Sequence[Classifier]) -> Classifier:
    """Combine classifiers that share their frozen part."""
    return replace(classifiers[0], suffix=cast(Any, Ensemble([each.suffix for each in classifiers])))


def compute_targets(ensemble: Classifier, table: TokenTable, engine: Engine, features: FeatureSource) -> Tensor:
    """Compute the probabilities of a split's rows, targets_NC in float32 on the CPU. For one rank alone.

    Raises:
        UserError: they do not fit in memory.
    """
    num_classes = ensemble.suffix.out_head.out_features
    num_bytes, free = 4 * len(table) * num_classes, free_host_bytes()
    if num_bytes > TARGET_SHARE * free:
        raise UserError(
            f"--distil: the targets of {len(table):,} rows and {num_classes:,} classes take {gigabytes(num_bytes)}, and "
            f"{gigabytes(free)} are free. Leave out --distil, or use a machine with more memory."
        )
    targets_NC = np.empty((len(table), num_classes), np.float32)

    def keep(ids_B: NDArray[np.int64], log_BC: NDArray[np.float32]) -> None:
        targets_NC[ids_B] = np.exp(log_BC)

    map_rank_logits(keep, ensemble, table, engine, features=features)
    return torch.from_numpy(targets_NC)


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
