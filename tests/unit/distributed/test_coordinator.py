"""One rank's coordinator in one process; the test writes the other rank's keys into the store."""

import re
import time
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

from agnews_dist.distributed.coordinator import CLOSED, POLL_SECONDS, STOP, TRAINING, Coordinator, Failure, silent_ranks

# They wait for a heartbeat that does not come.
pytestmark = pytest.mark.slow


@pytest.fixture
def store() -> HashStore:
    return HashStore()


@pytest.fixture
def coordinators(store: HashStore) -> Iterator[list[Coordinator]]:
    """Both ranks of a job, without the time limit that would end one of them."""
    ranks = [Coordinator(store, rank, 2, 60.0) for rank in range(2)]
    yield ranks
    for coordinator in reversed(ranks):
        coordinator.close()


def test_first_phase_decides_for_all_ranks(coordinators: list[Coordinator]) -> None:
    assert coordinators[1].enter(TRAINING) == TRAINING
    assert coordinators[0].enter(f"{STOP}SIGTERM") == TRAINING
    assert coordinators[0].enter(f"{STOP}SIGINT", force=True) == f"{STOP}SIGINT", "a second signal"
    assert coordinators[1].enter(TRAINING) == f"{STOP}SIGINT"


def test_stop_after_a_failure_is_ignored(coordinators: list[Coordinator]) -> None:
    """torchrun signals the other ranks when one has failed."""
    coordinators[1].publish(Failure(1, 1, "a bug"))
    assert coordinators[0].enter(f"{STOP}SIGTERM") == ""
    assert coordinators[0].failure == Failure(1, 1, "a bug")
    assert coordinators[0].publish(Failure(0, 0, "connection closed")) == Failure(1, 1, "a bug"), "the first one counts"


def test_roll_call_ignores_a_dead_ranks_last_heartbeat(store: HashStore) -> None:
    """The dead rank's last heartbeat is in the store and unread when this rank fails."""
    coordinator = Coordinator(store, 0, 2, 60.0)
    store.set("1", "1 ")
    # Between two polls, so that the next value is unread.
    time.sleep(2.5 * POLL_SECONDS)
    store.set("1", "2 ")
    assert coordinator.call_roll() == [1]
    failure = coordinator.explain("connection reset")
    assert failure.rank == 1
    assert re.fullmatch(r"rank 1 has sent no heartbeat for \d+ s", failure.reason)
    store.set("1", CLOSED)
    assert coordinator.call_roll() == [], "it has ended by itself"
    assert coordinator.explain("a bug") == Failure(0, 0, "a bug")
    coordinator.close()


def test_silent_ranks_are_named() -> None:
    failure = silent_ranks([2, 5], 3.4, 0)
    assert failure.text == (
        "ranks 2, 5 have sent no heartbeat for 3 s: a process or machine hangs or is gone. Check the last output there, then "
        "run the same command again to resume."
    )
    assert failure.consequence == "ranks 2, 5 have sent no heartbeat for 3 s; this rank ended with it"
