"""What one rank learns of the others through their store, in one process: the other rank is written by the test."""

import time

from torch.distributed import HashStore

from agnews_dist.distributed.coordinator import LIFE_SECONDS, ROUND_SECONDS, Coordinator
from agnews_dist.distributed.heartbeat import CLOSED


def test_a_dead_ranks_last_beat_is_no_sign_of_life():
    """It may be in the store unread when this rank fails: torchrun's own timing is not needed to see that."""
    store = HashStore()
    peers = Coordinator(store, 0, 2, 60.0, is_early=lambda: False, wake=lambda: None)
    store.set("beat/1", "1")
    # Between two rounds, so that what follows is unread.
    time.sleep(2.5 * ROUND_SECONDS)
    store.set("beat/1", "2")
    peers.fail("connection reset")
    ranks, seconds = peers.look_for_life()
    peers.close()
    assert ranks == [1]
    assert LIFE_SECONDS < seconds < 2 * LIFE_SECONDS


def test_of_two_that_fail_at_once_the_second_has_ended_by_itself():
    """Else the first would take it for dead."""
    store = HashStore()
    store.compare_set("failure", "", "0 0\nfirst")
    peers = Coordinator(store, 1, 2, 60.0, is_early=lambda: False, wake=lambda: None)
    failure = peers.fail("second")
    assert failure is not None
    assert (failure.by, failure.text) == (0, "first")
    assert store.get("beat/1") == CLOSED
