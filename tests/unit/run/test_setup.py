"""The objects of a training: what follows on a change of the features' place."""

import time
from types import SimpleNamespace

import numpy as np

from agnews_dist.run.setup import build_features
from agnews_dist.training.loop import Monitors
from agnews_dist.training.timing import StageTimer


class FakeFeatureCache:
    """A cache in device memory, sharded over ranks, that falls back to host memory while it is built."""

    def __init__(self) -> None:
        self.owner_N = np.array([0, 1, 0])

    def build(self, emit) -> None:
        """Fall back."""
        emit("falls back")
        time.sleep(0.002)
        self.owner_N = None


def test_build_features_updates_the_owners_after_a_fallback():
    features, events = FakeFeatureCache(), []
    timer = StageTimer(time.perf_counter() - 5.0)
    timer.seconds["tokenize"] = 2.0
    loader = SimpleNamespace(owner_N=features.owner_N)
    build_features(features, loader, Monitors(events.append, timer, None))  # pyright: ignore[reportArgumentType]
    assert loader.owner_N is None
    assert events == ["falls back"]
    assert 3.0 <= timer.seconds["setup"] < 4.0, "everything before, except tokenising"
    assert 0.002 <= timer.seconds["prefix"] < 1.0
