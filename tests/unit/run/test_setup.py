"""The objects of a training: what each rank keeps, and the loader after a change of the features' place."""

import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.toy import toy_classifier, toy_split

from agnews_dist.config.schema import BatchConfig, Config, OptimConfig
from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.errors import DataError
from agnews_dist.model.weight_files import WeightFiles
from agnews_dist.run.setup import TrainingInputs, _check_classes, build_features, build_loader, estimate_epochs, place_inputs
from agnews_dist.run.summary import loss_text
from agnews_dist.training.loop import Monitors
from agnews_dist.training.timing import StageTimer


class FakeFeatureCache:
    """A cache in device memory, sharded over ranks, that falls back to host memory while it is built."""

    def __init__(self) -> None:
        self.owner_N = np.array([0, 1, 0])

    def build(self, emit) -> None:
        """Take the next place."""
        emit("taken")
        time.sleep(0.002)
        self.owner_N = None


@pytest.mark.parametrize("rank", [0, 1])
def test_place_inputs_keeps_the_frozen_weights_for_the_export_on_rank_0_only(monkeypatch, rank):
    engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    monkeypatch.setattr(engine, "world", World(rank=rank, num_ranks=2, local_rank=rank, ranks_per_node=2))
    classifier, tokenizer = toy_classifier(), SimpleNamespace(pad_token_id=96)
    store = SimpleNamespace(splits={"train": toy_split([3, 1]), "test": toy_split([2])}, class_names=("a", "b"))
    inputs = TrainingInputs(classifier, tokenizer, store, {}, {}, {}, WeightFiles({}, are_copied=True))
    frozen = set(classifier.frozen_state)
    assert frozen
    tables = place_inputs(Config(), inputs, engine)
    assert set(classifier.frozen_state) == (frozen if rank == 0 else set())
    assert {name: table.lengths_N.tolist() for name, table in tables.items()} == {"train": [3, 1], "test": [2]}
    assert tables["train"].batch(np.array([1, 0])).tokens_BT.shape == (2, 3)
    assert inputs.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("max_steps", "batch", "num_epochs"),
    [
        (None, {}, 3),
        # Three texts of 12 tokens together; two steps per epoch.
        *((max_steps, {"global_batch_size": 2}, num_epochs) for max_steps, num_epochs in ((1, 1), (2, 1), (3, 2), (30, 15))),
        *((max_steps, {"global_token_budget": 256}, num_epochs) for max_steps, num_epochs in ((1, 22), (2, 43))),
    ],
)
def test_estimate_epochs_counts_those_that_the_steps_take(max_steps, batch, num_epochs):
    config = Config(optim=OptimConfig(max_steps=max_steps), batch=BatchConfig(**batch))
    assert estimate_epochs(config, np.array([5, 4, 3])) == num_epochs


def test_loader_gets_balanced_weights_from_the_training_labels():
    classifier, split = toy_classifier(), toy_split([5, 4, 3, 2, 1])
    table = TokenTable(split, pad_id=0, device=torch.device("cpu"))
    config = Config(optim=OptimConfig(class_weights="balanced"))
    loader = build_loader(config, classifier, table, World())
    counts_C = np.bincount(split.labels, minlength=4)
    assert loader.class_weights_C.tolist() == [5 / (4 * count) if count else 1.0 for count in counts_C.tolist()]
    low, high = loader.class_weights_C.min(), loader.class_weights_C.max()
    assert loss_text(config.optim, loader) == f"cross-entropy, balanced class weights {low:.3g} to {high:.3g}"
    plain = OptimConfig(label_smoothing=0.1)
    assert (
        loss_text(plain, build_loader(Config(optim=plain), classifier, table, World())) == "cross-entropy, label smoothing 0.1"
    )


def test_build_features_updates_the_owners_after_a_fallback():
    features, events = FakeFeatureCache(), []
    timer = StageTimer(time.perf_counter() - 5.0)
    timer.seconds["tokenize"] = 2.0
    loader = SimpleNamespace(owner_N=features.owner_N)
    build_features(features, loader, Monitors(events.append, timer, None))
    assert loader.owner_N is None
    assert events == ["taken"]
    assert 3.0 <= timer.seconds["setup"] < 4.0, "everything before, except tokenising"
    assert 0.002 <= timer.seconds["prefix"] < 1.0


@pytest.mark.parametrize(
    ("of_data", "of_model", "message"),
    [
        ("ab", "ba", "x has the classes a, b, the model b, a: labels would not match"),
        ("ab", "abc", "x has the classes a, b, the model a, b, c: labels"),
        ("abcdefghijklmn", "abcdefghi", "classes a, b, c, d, e and 9 more, the model a, b, c, d, e and 4 more: labels"),
        (
            "abcdefghijklmn",
            "abcdefghXjklmn",
            "classes ..., i, j, k, l, m and 1 more, the model ..., X, j, k, l, m and 1 more: labels",
        ),
    ],
)
def test_classes_that_differ_from_the_models_are_named(of_data, of_model, message):
    with pytest.raises(DataError, match=re.escape(message)):
        _check_classes("x", tuple(of_data), tuple(of_model))
    _check_classes("x", tuple(of_model), tuple(of_model))
    _check_classes("x", tuple(of_model), tuple(f"LABEL_{i}" for i in range(len(of_model))))
