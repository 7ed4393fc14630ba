"""Ranks agree on a name that no former attempt can have left in the store, which outlives attempts. Threads stand for ranks."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from agnews_dist.distributed import rendezvous
from agnews_dist.distributed.node_resources import free_port
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError


def meet(store: dist.Store, num_ranks: int, late: int = 0) -> list[str]:
    """The name that every rank got; rank `late` comes last."""
    others = threading.Event()

    def rank_of(rank: int) -> str:
        if rank == late:
            others.wait(0.3)
        return rendezvous._agree(store, World(rank=rank, num_ranks=num_ranks), 20)

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(rank_of, range(num_ranks)))


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_every_attempt_has_a_name_of_its_own_whoever_comes_first(num_ranks):
    store, names = dist.HashStore(), set()
    for late in range(num_ranks):
        found = meet(store, num_ranks, late)
        assert len(set(found)) == 1, "one name for all"
        names |= set(found)
    assert len(names) == num_ranks, "another one at every attempt"


def test_fewer_or_more_ranks_than_before_meet_as_well():
    store = dist.HashStore()
    names = [meet(store, num_ranks) for num_ranks in (3, 2, 4, 3)]
    assert [len(set(found)) for found in names] == [1, 1, 1, 1]
    assert len({found[0] for found in names}) == 4


def test_ranks_of_an_attempt_that_never_met_disturb_nobody():
    """They knocked and were killed; rank 0 made a name and was killed."""
    store = dist.HashStore()
    for rank in (1, 2):
        store.set(f"knock/{rank}", "of the dead")
    store.set("answer/of the dead", "a dead name")
    store.set("joined/a dead name/1", "")
    (name,) = set(meet(store, 3, late=1))
    assert name != "a dead name"


@pytest.mark.parametrize(("rank", "missing"), [(0, r"rank\(s\) 1, 2"), (1, "rank 0")])
def test_who_does_not_come_is_named_in_time(rank, missing):
    with pytest.raises(UserError, match=rf"^{missing} did not come within 1 s: the ranks cannot train together\. Look"):
        rendezvous._agree(dist.HashStore(), World(rank=rank, num_ranks=3), 1)


@pytest.fixture
def address(monkeypatch):
    """One that nobody uses, given to this process as a launcher would."""
    port = free_port()

    def give(rank: int) -> int:
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        return port

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return give


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_alone_at_the_address_is_told_where_it_waited(address, rank):
    """The other one died of an error, or waits elsewhere."""
    port = address(rank)
    with pytest.raises(
        UserError, match=rf"^no meeting place at 127\.0\.0\.1:{port} \(.*[^.]\): the ranks cannot train together"
    ):
        rendezvous.open_process_group(World(rank=rank, num_ranks=2), "gloo", 1)


def test_a_port_that_is_taken_is_named(address):
    port = address(0)
    with (
        socket.create_server(("", port)),
        pytest.raises(
            UserError, match=rf"^no meeting place at 127\.0\.0\.1:{port} \(.*EADDRINUSE.*nothing else uses the port"
        ),
    ):
        rendezvous.open_process_group(World(rank=0, num_ranks=2), "gloo", 5)
