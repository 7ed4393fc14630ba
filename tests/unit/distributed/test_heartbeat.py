"""One rank's heartbeats in one process; the test writes the other ranks' keys into the store."""

from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from agnews_dist.distributed import heartbeat
from agnews_dist.distributed.heartbeat import CLOSED, Heartbeats, format_silence


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Replaces the clock of `Heartbeats`; holds its time."""
    now = [100.0]
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_silence_ends_with_a_new_heartbeat_but_not_with_the_first(clock):
    store = HashStore()
    heartbeats = Heartbeats(store, 0, 3)
    clock[0] += 5
    store.set("heartbeat/1", "1")
    heartbeats.read()
    assert heartbeats.measure_silence() == {1: 5, 2: 5}, "rank 1 may have died after its first heartbeat"
    store.set("heartbeat/1", "2")
    heartbeats.read()
    assert heartbeats.measure_silence() == {1: 0, 2: 5}


def test_rank_0_monitors_all_and_the_others_monitor_rank_0(clock):
    assert set(Heartbeats(HashStore(), 0, 3).measure_silence()) == {1, 2}
    heartbeats = Heartbeats(HashStore(), 2, 3)
    clock[0] += 5
    assert heartbeats.measure_silence() == {0: 5}
    heartbeats.monitor_all()
    assert heartbeats.measure_silence() == {0: 5, 1: 0}


def test_rank_that_ended_by_itself_is_not_monitored():
    store = HashStore()
    own, other = Heartbeats(store, 0, 2), Heartbeats(store, 1, 2)
    other.send()
    other.close()
    own.read()
    assert own.has_ended(1)
    assert own.measure_silence() == {}
    assert store.get("heartbeat/1") == CLOSED


def test_discount_pause_excludes_the_time_of_a_suspension(clock):
    heartbeats = Heartbeats(HashStore(), 0, 2)
    clock[0] += 60
    heartbeats.discount_pause(58)
    assert heartbeats.measure_silence() == {1: 2}


def test_format_silence_names_the_ranks():
    assert format_silence([1], 3.2).startswith("rank 1 has sent no heartbeat for 3 s: ")
    assert format_silence([1, 4], 3.2).startswith("ranks 1, 4 have sent no heartbeat for 3 s: ")
    assert len(format_silence([1], 3.2)) <= 160
