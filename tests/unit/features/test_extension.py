"""Features extended by blocks that a training freezes: the same bits kept in memory and computed at every use."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.toy import toy_classifier, toy_split
from torch import Tensor

from agnews_dist.data.batching.batch import Batch
from agnews_dist.data.batching.loader import TokenTable
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.events import Event, Warned
from agnews_dist.features.extension import GrowingFeatures
from agnews_dist.features.manager import CacheSettings, FeatureCache
from agnews_dist.model import prefix as prefix_module
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.storage import capacity

CPU = torch.device("cpu")
LENGTHS = np.random.default_rng(4).integers(1, 40, 50).tolist()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> TokenTable:
    """Tokens of a split that takes many calls."""
    monkeypatch.setitem(prefix_module.CALL_TOKENS, "cpu", 64)
    return TokenTable(replace(toy_split(LENGTHS), name="train"), pad_id=0, device=CPU)


def batches(table: TokenTable) -> list[Batch]:
    """Return batches of some sizes, the last without an example."""
    return [table.batch(ids) for ids in (np.arange(50), np.array([7]), np.array([3, 9, 3, 40]), np.empty(0, np.int64))]


def build(classifier: Classifier, table: TokenTable, directory: Path, requested: str) -> tuple[FeatureCache, list[Event]]:
    """Build the cache of the features below the suffix."""
    settings = CacheSettings(
        requested=requested,  # pyright: ignore[reportArgumentType]
        num_epochs=2,
        directory=directory,
        limit_bytes=10**9,
        reserved_bytes=0,
        frozen_weights="a fingerprint",
        model_name="toy",
    )
    engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    other = TokenTable(replace(toy_split(LENGTHS[:20]), name="validation"), pad_id=0, device=CPU)
    cache, events = FeatureCache(classifier, {"train": table, "validation": other}, engine, settings), list[Event]()
    cache.build(events.append)
    return cache, events


def logits(classifier: Classifier, features: GrowingFeatures, batch: Batch) -> Tensor:
    with torch.no_grad():
        return classifier.suffix(*features(batch))


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(("blocks", "place"), [(2, "host"), (2, "disk"), (3, "host")])
def test_extended_features_have_the_same_bits_when_kept(table, tmp_path, pooling, blocks, place):
    classifier = toy_classifier(blocks, pooling=pooling)
    # With three blocks only the embeddings are below, and nothing is kept.
    cache, _ = build(classifier, table, tmp_path, place)
    kept, computed = (GrowingFeatures(classifier, cache.source("train"), each) for each in (cache, None))
    whole = [logits(classifier, kept, batch) for batch in batches(table)]
    for num_frozen in range(1, blocks + 1):
        classifier.suffix.freeze(num_frozen)
        for features in (kept, computed):
            features.extend()
        for batch, expected in zip(batches(table), whole, strict=True):
            found, other = (logits(classifier, features, batch) for features in (kept, computed))
            is_real = batch.weights_B > 0
            assert torch.equal(found[is_real], other[is_real])
            torch.testing.assert_close(found[is_real], expected[is_real], rtol=0, atol=1e-5)
    assert (kept(batches(table)[0]).hidden_BTD.shape[1] == 1) == (blocks == num_frozen)
    with classifier.suffix.whole():
        assert torch.equal(logits(classifier, GrowingFeatures(classifier, cache.source("train")), batches(table)[0]), whole[0])


def test_extended_features_are_those_of_the_weights_at_the_freezing(table, tmp_path):
    classifier = toy_classifier(2)
    cache, _ = build(classifier, table, tmp_path, "host")
    features, batch = GrowingFeatures(classifier, cache.source("train")), batches(table)[0]
    for weight in classifier.suffix.freeze(1):
        torch.nn.init.constant_(weight, 0.01)
    features.extend()
    before = logits(classifier, features, batch)
    for weight in classifier.suffix.freeze(1):
        torch.nn.init.constant_(weight, 0.5)
    assert torch.equal(logits(classifier, features, batch), before)
    assert not torch.equal(features(batch).hidden_BTD, cache.source("train")(batch).hidden_BTD)


def test_extended_features_without_room_are_computed_at_every_use(table, tmp_path, monkeypatch):
    classifier = toy_classifier(2)
    cache, events = build(classifier, table, tmp_path, "disk")
    files = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(capacity, "free_host_bytes", lambda: 1000)
    features = GrowingFeatures(classifier, cache.source("train"), cache)
    classifier.suffix.freeze(1)
    features.extend()
    [message] = [event.message for event in events if isinstance(event, Warned)]
    assert message.startswith("model.freeze_schedule: output of frozen blocks is computed at every use: ")
    assert "of the free host memory" in message
    assert message.endswith("Free some memory to keep it.")
    assert "disk" not in message
    assert sorted(tmp_path.rglob("*")) == files, "nothing is left on disk"
    assert logits(classifier, features, batches(table)[0]).isfinite().all()


def test_closed_cache_is_freed_at_once(table, tmp_path):
    """Its tables may hold the features below: a reference cycle would keep them until a collection, which may never come."""
    cache, _ = build(toy_classifier(2), table, tmp_path, "disk")
    cache.close()
    reference = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert reference() is None
    finally:
        gc.enable()


def test_plain_path_extends_padded_features(table):
    classifier = toy_classifier(2)
    plain = toy_classifier(2)
    plain.use_fast_path(False)
    found = list[Tensor]()
    for each in (classifier, plain):
        features = GrowingFeatures(each, prefix_module.uncached_features(each.prefix))
        each.suffix.freeze(1)
        features.extend()
        found.append(logits(each, features, batches(table)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
