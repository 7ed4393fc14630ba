"""One rank's coordinator in one process; the test writes the other rank's keys into the store."""

import time

import pytest
from torch.distributed import HashStore

from agnews_dist.distributed.coordinator import POLL_SECONDS, SILENCE_SECONDS, Coordinator
from agnews_dist.distributed.heartbeat import CLOSED

# They wait for a heartbeat that does not come.
pytestmark = pytest.mark.slow


def make_coordinator(store: HashStore, rank: int) -> Coordinator:
    return Coordinator(store, rank, 2, 60.0, can_exit_now=lambda: False, on_news=lambda: None)


def test_find_silent_ranks_ignores_a_dead_ranks_last_heartbeat():
    """The dead rank's last heartbeat is in the store and unread when this rank fails."""
    store = HashStore()
    coordinator = make_coordinator(store, 0)
    store.set("heartbeat/1", "1")
    # Between two polls, so that the next value is unread.
    time.sleep(2.5 * POLL_SECONDS)
    store.set("heartbeat/1", "2")
    coordinator.report_failure("connection reset")
    ranks, seconds = coordinator.find_silent_ranks()
    coordinator.close()
    assert ranks == [1]
    assert SILENCE_SECONDS < seconds < 2 * SILENCE_SECONDS


def test_report_failure_marks_the_second_of_two_failing_ranks_as_ended():
    """Otherwise the first rank would report the second one as dead."""
    store = HashStore()
    store.compare_set("failure", "", "0 0\nfirst")
    coordinator = make_coordinator(store, 1)
    failure = coordinator.report_failure("second")
    assert failure is not None
    assert (failure.reported_by, failure.text) == (0, "first")
    assert store.get("heartbeat/1") == CLOSED
