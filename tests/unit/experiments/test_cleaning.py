"""Answers out of fold: no row is judged by a model that has seen its label."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import small_run

from agnews_dist.api.named_settings import NamedSettings
from agnews_dist.config.fields import replace_values
from agnews_dist.config.schema import Config
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import UserError
from agnews_dist.evaluation.evaluator import evaluate_split
from agnews_dist.evaluation.label_errors import assign_folds, count_label_issues
from agnews_dist.events import ignore_event
from agnews_dist.experiments.cleaning import answer_out_of_fold, train_member
from agnews_dist.experiments.feature_group import FeatureGroup, open_feature_group
from agnews_dist.storage import capacity
from agnews_dist.training.loop import Monitors
from agnews_dist.training.timing import StageTimer

MONITORS = Monitors(ignore_event, StageTimer(0.0), PreemptionHandler({}))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    places = {"data.cache_dir": str(tmp_path_factory.mktemp("cache")), "run.dir": str(tmp_path_factory.mktemp("runs"))}
    named = NamedSettings()
    for key, value in (small_run.settings() | places | {"data.limit_train": 120, "optim.epochs": 2}).items():
        named.add(key, value, key)
    return named.build()


@pytest.fixture(scope="module")
def group(config: Config):
    engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    with ExitStack() as stack:
        yield open_feature_group(config, engine, MONITORS, stack, num_trainings=5)


def test_trainings_do_not_share_features_that_fit_nowhere(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    config = replace_values(config, {"engine.feature_cache_gigabytes": 0.0})
    monkeypatch.setattr(capacity, "free_host_bytes", lambda: 1000)
    with ExitStack() as stack:
        sizes = r"features of 2 trainings would be computed at every use: \d+ MB fit nowhere \(.* host memory \(1 kB\)\)"
        with pytest.raises(UserError, match=sizes):
            open_feature_group(config, engine, MONITORS, stack, num_trainings=2)
        # One training computes them as `train` does, and `off` accepts the time.
        assert open_feature_group(config, engine, MONITORS, stack, num_trainings=1).kept.startswith("off: computed at every")
        accepted = replace_values(config, {"engine.feature_cache": "off"})
        assert open_feature_group(accepted, engine, MONITORS, stack, num_trainings=2).kept.startswith("off: as requested")


def with_labels(group: FeatureGroup, labels_N: np.ndarray) -> FeatureGroup:
    store = group.inputs.store
    splits = {**store.splits, "train": replace(store.splits["train"], labels=labels_N)}
    return replace(group, inputs=replace(group.inputs, store=replace(store, splits=splits)))


def answers(group: FeatureGroup, config: Config, fold_N: np.ndarray, worker: tuple[int, int] = (0, 1)) -> np.ndarray:
    found = np.full((len(fold_N), 4), np.nan)
    for rows_N, probabilities_NC in answer_out_of_fold(group, config, fold_N, worker=worker, monitors=MONITORS):
        found[rows_N] = probabilities_NC
    return found


def test_answers_do_not_depend_on_the_labels_of_their_fold(group: FeatureGroup, config: Config) -> None:
    labels_N = group.inputs.store.splits["train"].labels
    fold_N = np.arange(len(labels_N)) % 3
    before = answers(group, config, fold_N)
    assert np.isfinite(before).all()
    np.testing.assert_allclose(before.sum(axis=1), 1, atol=1e-5)
    changed = np.where(fold_N == 1, (labels_N + 1) % 4, labels_N)
    after = answers(with_labels(group, changed), config, fold_N)
    assert np.array_equal(after[fold_N == 1], before[fold_N == 1])
    assert not np.array_equal(after[fold_N == 0], before[fold_N == 0]), "the others have learnt from them"


def test_workers_share_the_folds(group: FeatureGroup, config: Config) -> None:
    fold_N = np.arange(120) % 3
    whole = answers(group, config, fold_N)
    halves = [answers(group, config, fold_N, (position, 2)) for position in (0, 1)]
    assert np.array_equal(np.where(np.isnan(halves[0]), halves[1], halves[0]), whole)
    assert (np.isnan(halves[0]) != np.isnan(halves[1])).all()


def test_selected_rows_train_as_a_data_set_of_their_own(group: FeatureGroup, config: Config, tmp_path: Path) -> None:
    """The rows that are kept have the numbers, batches and masks that a training without the others gives them."""
    rows_N = np.flatnonzero(np.arange(120) % 7 != 0)
    part = group.select({"train": ("train", rows_N), "validation": ("validation", np.arange(150))})
    split = group.inputs.store.splits["train"]
    for new, old in enumerate(rows_N[:20].tolist()):
        begin, end = part.inputs.store.splits["train"].offsets[old : old + 2]
        expected = np.asarray(split.tokens[begin:end])
        batch = part.tables["train"].batch(np.array([new]))
        assert batch.tokens_BT[0].tolist() == expected.tolist()
        assert batch.ids_B.tolist() == [new]
        own, whole = (part.features("train")(batch), group.features("train")(group.tables["train"].batch(rows_N[[new]])))
        assert own.hidden_BTD.equal(whole.hidden_BTD)
    classifier = train_member(part, config, MONITORS).classifier
    scores = evaluate_split(classifier, part.tables["validation"], part.engine, features=part.features("validation")).scores
    assert scores is not None
    assert scores.num_examples == 150


def test_folds_keep_equal_texts_together_and_leave_rare_classes_out() -> None:
    texts = [f"text {i // 2}" for i in range(40)] + ["rare"]
    labels_N = np.array([i // 2 % 2 for i in range(40)] + [2])
    fold_N = assign_folds(texts, labels_N, 5, 0)
    assert fold_N[-1] == -1
    assert (fold_N[0:40:2] == fold_N[1:40:2]).all()
    assert np.bincount(fold_N[:40]).tolist() == [8] * 5


def test_number_of_wrong_labels_is_estimated() -> None:
    generator = np.random.default_rng(0)
    truth_N = generator.integers(0, 3, 600)
    given_N = np.where(generator.random(600) < 0.1, (truth_N + 1) % 3, truth_N)
    probabilities_NC = np.full((600, 4), 0.02, np.float32)
    probabilities_NC[np.arange(600), truth_N] = 0.94
    assert 0.8 * (given_N != truth_N).sum() <= count_label_issues(given_N, probabilities_NC) <= 1.2 * (given_N != truth_N).sum()
    assert count_label_issues(np.zeros(5, np.int64), probabilities_NC[:5]) == 0
