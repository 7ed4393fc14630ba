"""The feature cache of a run, in one process: places, progress, failures, reuse of files."""

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.toy import toy_classifier, toy_split

from agnews_dist.data.batching.loader import TokenTable, evaluation_batches
from agnews_dist.distributed.world import World
from agnews_dist.engine.engine import Engine
from agnews_dist.events import Event, Progress, Warned
from agnews_dist.features import keys
from agnews_dist.features.manager import CacheSettings, FeatureCache
from agnews_dist.model import prefix as prefix_module
from agnews_dist.model.gpt2 import Classifier
from agnews_dist.storage import capacity

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_calls(monkeypatch):
    """Make calls so small that a split takes many segments."""
    monkeypatch.setitem(prefix_module.CALL_TOKENS, "cpu", 64)
    monkeypatch.setattr("agnews_dist.data.batching.loader.EVALUATION_TOKENS", 300)


def open_cache(
    classifier: Classifier, directory: Path, requested: Any, *, limit_bytes: int = 10**9, sizes: Sequence[int] = (50, 40, 30)
) -> FeatureCache:
    """Open the cache of a run whose splits have the first texts of 50, 40 and 30."""
    rng = np.random.default_rng(4)
    lengths = {name: rng.integers(1, 40, size).tolist() for name, size in (("train", 50), ("validation", 40), ("test", 30))}
    tables = {
        name: TokenTable(replace(toy_split(lengths[name][:size]), name=name), pad_id=0, device=CPU)
        for name, size in zip(lengths, sizes, strict=True)
    }
    settings = CacheSettings(
        requested=requested,
        num_epochs=2,
        directory=directory,
        limit_bytes=limit_bytes,
        reserved_bytes=0,
        frozen_weights="a fingerprint",
        model_name="toy",
    )
    engine = Engine(World(), device="cpu", precision="fp32", allow_tf32=False, timeout_seconds=60)
    return FeatureCache(classifier, tables, engine, settings)


def build(cache: FeatureCache) -> list[Event]:
    """Build a cache; return its events."""
    events: list[Event] = []
    cache.build(events.append)
    return events


def warnings_of(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Warned)]


def progress_of(events: list[Event]) -> list[int]:
    return [event.done for event in events if isinstance(event, Progress)]


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_feature_cache_gives_the_bits_of_uncached_features_in_evaluation(tmp_path, place):
    cached, uncached = (open_cache(toy_classifier(), tmp_path, requested) for requested in (place, "off"))
    assert warnings_of(build(cached) + build(uncached)) == []
    assert (cached.choice.place, uncached.choice.place) == (place, "off")
    lengths = np.random.default_rng(4).integers(1, 40, 90)[50:].tolist()
    table = TokenTable(toy_split(lengths), pad_id=0, device=CPU)
    assert len(evaluation_batches(table)) > 3
    for ids in evaluation_batches(table):
        found, expected = (cache.source("validation")(table.batch(ids)) for cache in (cached, uncached))
        assert torch.equal(found.lengths_B, expected.lengths_B)
        for row, length in enumerate(found.lengths_B.tolist()):
            assert torch.equal(found.hidden_BTD[row, :length], expected.hidden_BTD[row, :length])


def test_feature_cache_reports_progress_without_features_of_an_earlier_run(tmp_path):
    first, second = (build(open_cache(toy_classifier(), tmp_path, "disk")) for _ in range(2))
    done = progress_of(first)
    num_tokens = done[-1]
    assert (done[0], num_tokens) == (0, first[0].total)
    assert done == sorted(done)
    assert set(progress_of(second)) == {num_tokens}, "all were there at the start"
    assert {(event.total, event.unit) for event in first + second} == {(num_tokens, "tokens")}


@pytest.mark.slow
def test_feature_cache_of_another_format_is_computed_again_and_left_alone(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(keys, "FORMAT", keys.FORMAT - 1)
        build(open_cache(toy_classifier(), tmp_path, "disk"))
    old = {path: path.read_bytes() for path in tmp_path.glob("*/rows.bin")}
    assert progress_of(build(open_cache(toy_classifier(), tmp_path, "disk")))[0] == 0, "nothing old was used"
    assert len(list(tmp_path.glob("*/rows.bin"))) == 2 * len(old) == 2
    assert {path: path.read_bytes() for path in old} == old
    assert progress_of(build(open_cache(toy_classifier(), tmp_path, "disk")))[0] > 0, "the control: the new ones are"


def test_space_that_a_killed_builder_had_reserved_is_free_for_its_successor(tmp_path, monkeypatch):
    cache = open_cache(toy_classifier(), tmp_path, "auto")
    num_bytes = cache.num_bytes
    cache._reserve(cache._plan())
    cache.close()
    # Less than the features need, as the file system counts what is reserved.
    monkeypatch.setattr(capacity, "free_disk_bytes", lambda _: num_bytes // 4)
    assert open_cache(toy_classifier(), tmp_path, "auto").choice.place == "disk"
    assert open_cache(toy_classifier(), tmp_path / "other", "auto").choice.place == "host"


def test_feature_cache_moves_to_the_next_place_when_the_disk_is_full(tmp_path, monkeypatch):
    """The space ends at the new piece: one warning, the next place, and only the whole piece of the earlier run is left."""
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system reserves no space in advance")
    build(open_cache(toy_classifier(), tmp_path / "features", "disk", sizes=(9, 4, 3)))
    (earlier,) = (tmp_path / "features").iterdir()

    def fail(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    cache = open_cache(toy_classifier(), tmp_path / "features", "disk")
    assert (cache.choice.place, cache.choice.refusal) == ("disk", None)
    events = build(cache)
    (warning,) = warnings_of(events)
    assert warning.startswith("features cannot be cached in disk (No space left on device): now host, ")
    assert warning.endswith("Free some space, or set another --data.cache_dir or --engine.feature_cache.")
    assert cache.choice.place == "host"
    assert cache.choice.refusal == "disk failed. Features are cached in host"
    assert progress_of(events)[0] > 0, "the host takes what is on disk"
    assert list((tmp_path / "features").iterdir()) == [earlier]


def test_feature_cache_moves_to_the_next_place_when_its_directory_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = open_cache(toy_classifier(), tmp_path / "file" / "features", "disk")
    (warning,) = warnings_of(build(cache))
    assert "features cannot be cached in disk (Not a directory)" in warning
    assert cache.choice.place == "host"


def test_feature_cache_warns_if_the_requested_place_is_refused(tmp_path):
    (warning,) = warnings_of(build(open_cache(toy_classifier(), tmp_path, "disk", limit_bytes=1000)))
    assert warning.startswith("engine.feature_cache disk: ")
    assert warning.endswith("exceed engine.feature_cache_gigabytes (1 kB). Features are cached in host.")


@pytest.mark.parametrize(
    ("trainable_blocks", "fast_path", "reason"),
    [(1, False, "the plain path computes features at every use"), (3, True, "only the embeddings are frozen")],
)
def test_feature_cache_is_off_if_caching_cannot_help(tmp_path, trainable_blocks, fast_path, reason):
    classifier = toy_classifier(trainable_blocks)
    classifier.use_fast_path(fast_path)
    cache = open_cache(classifier, tmp_path, "auto")
    assert (cache.choice.place, cache.choice.reason) == ("off", reason)
    build(cache)
    assert cache.owner_N is None
    assert not list(tmp_path.iterdir())
