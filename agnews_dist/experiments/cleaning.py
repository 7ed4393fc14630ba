"""Probable label errors by the classifier itself, out of fold, and what leaving them out changes.

The training rows are divided into folds. For each fold, a member trains on the others' features and gives the fold's rows their
probabilities: so no row is judged by a model that has seen its label. The frozen part is computed once for all of them.
"""

import numpy as np
from numpy.typing import NDArray

from agnews_dist.config.fields import replace_values
from agnews_dist.config.schema import Config
from agnews_dist.data.rows import Ints
from agnews_dist.errors import UserError
from agnews_dist.events import Progress
from agnews_dist.experiments.ensemble import MeanProbabilities
from agnews_dist.experiments.feature_group import FeatureGroup
from agnews_dist.experiments.member_training import MemberTraining, build_shared_loader, train_in_lock_step
from agnews_dist.experiments.members import Member
from agnews_dist.training.loop import Monitors

FOLD_SETTINGS = {"optim.epochs": 1, "optim.max_steps": None, "optim.patience": None, "model.freeze_schedule": None}
"""One epoch: of 2 % planted errors in AG News, more epochs found no more, at several times the cost."""
LAST_STEP_ONLY = 10**9
"""Steps between evaluations so that only the end is evaluated: the scores of a fold choose nothing."""


def answer_out_of_fold(
    group: FeatureGroup, config: Config, fold_N: NDArray[np.int64], *, worker: tuple[int, int], monitors: Monitors
) -> list[tuple[Ints, NDArray[np.float32]]]:
    """Train this worker's folds; return (rows, their probabilities) of each. For one rank alone.

    Raises:
        UserError: a member diverged.
    """
    found: list[tuple[Ints, NDArray[np.float32]]] = []
    num_folds, (position, num_workers) = int(fold_N.max()) + 1, worker
    if config.optim.solver == "adamw":
        config = replace_values(config, {**FOLD_SETTINGS, "optim.evaluate_every": LAST_STEP_ONLY})
    for fold in range(position, num_folds, num_workers):
        monitors.emit(Progress(task="train folds", done=fold, total=num_folds, unit="folds"))
        rows_N, others_N = np.flatnonzero(fold_N == fold), np.flatnonzero(fold_N != fold)
        part = group.select({"train": ("train", others_N), "validation": ("train", rows_N)})
        training = train_member(part, config, monitors)
        # All probabilities, whatever the number of classes.
        answers = MeanProbabilities(len(rows_N), len(group.inputs.class_names))
        answers.add([training.classifier], part.tables["validation"], part.engine, part.features("validation"))
        found.append((rows_N, np.exp(answers.log_NC)))
    monitors.emit(Progress(task="train folds", done=num_folds, total=num_folds, unit="folds"))
    return found


def train_member(group: FeatureGroup, config: Config, monitors: Monitors) -> MemberTraining:
    """Train one member as `train` would; its best weights are loaded.

    Raises:
        UserError: it diverged.
    """
    training = MemberTraining(Member(0, 0, {}, config), group, build_shared_loader(group, config), monitors)
    train_in_lock_step([training], after_step=lambda: None)
    result = training.result("finished")
    if result.state == "diverged":
        raise UserError(f"clean: a training diverged ({result.reason}). Lower optim.lr or optim.max_grad_norm.")
    training.trainer.restore_best()
    return training
