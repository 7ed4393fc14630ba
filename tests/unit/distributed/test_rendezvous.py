"""Key prefixes in a store that outlives attempts. Threads play the ranks."""

import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from agnews_dist.distributed import rendezvous, world
from agnews_dist.distributed.node_resources import free_port
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError

# Processes that meet, or wait for ranks that do not come.
pytestmark = pytest.mark.slow


def share_prefix(store: dist.Store, num_ranks: int, late: int = 0) -> list[str]:
    """Return the prefix that each rank received; rank `late` comes last."""
    others = threading.Event()

    def play(rank: int) -> str:
        if rank == late:
            others.wait(0.3)
        return rendezvous._share_prefix(store, World(rank=rank, num_ranks=num_ranks), 20, [""])

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(play, range(num_ranks)))


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_every_attempt_has_its_own_prefix_in_any_order_of_ranks(num_ranks):
    store, prefixes = dist.HashStore(), set()
    for late in range(num_ranks):
        found = share_prefix(store, num_ranks, late)
        assert len(set(found)) == 1, "the same prefix on all ranks"
        prefixes |= set(found)
    assert len(prefixes) == num_ranks, "another prefix at every attempt"


def test_attempts_may_have_different_numbers_of_ranks():
    store = dist.HashStore()
    prefixes = [share_prefix(store, num_ranks) for num_ranks in (3, 2, 4, 3)]
    assert [len(set(found)) for found in prefixes] == [1, 1, 1, 1]
    assert len({found[0] for found in prefixes}) == 4


def test_keys_of_an_attempt_that_was_killed_are_ignored():
    """Its ranks sent requests, rank 0 replied, and all were killed."""
    store = dist.HashStore()
    for rank in (1, 2):
        store.set(f"request/{rank}", "old token")
    store.set("reply/old token", "old prefix")
    store.set("joined/old prefix/1", "")
    (prefix,) = set(share_prefix(store, 3, late=1))
    assert prefix != "old prefix"


@pytest.mark.parametrize(("rank", "missing"), [(0, r"rank\(s\) 1, 2"), (1, "rank 0")])
def test_missing_ranks_are_named_after_the_timeout(rank, missing):
    with pytest.raises(UserError, match=rf"^{missing} did not come within 1 s: the ranks cannot train together\. Look"):
        rendezvous._share_prefix(dist.HashStore(), World(rank=rank, num_ranks=3), 1, [""])


@pytest.mark.parametrize(
    ("local_rank", "waits"),
    [(0, r"\[rank 0/2\] waits for (rank\(s\) 1|the other ranks) at 127\.0\.0\.1:\d+, at most 8 s\n"), (1, "")],
)
def test_long_wait_is_reported_once_per_node(local_rank, waits, address, monkeypatch, capfd):
    monkeypatch.setattr(world, "SPEAK_SECONDS", 0.5)
    address(0)
    # The other rank's connection to the store is all that it does.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(dist.TCPStore, "127.0.0.1", int(os.environ["MASTER_PORT"]), 2, timeout=timedelta(seconds=60))
        with pytest.raises(UserError, match=r"^rank\(s\) 1 did not come within 8 s"):
            rendezvous.open_process_group(World(rank=0, num_ranks=2, local_rank=local_rank, ranks_per_node=2), "gloo", 8)
    assert re.fullmatch(waits, "".join(line for line in capfd.readouterr().err.splitlines(keepends=True) if "waits" in line))


@pytest.fixture
def address(monkeypatch):
    """Sets a launcher's variables for a free address; call it with the rank."""
    port = free_port()

    def give(rank: int) -> int:
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": 2}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        return port

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return give


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_alone_at_the_address_names_it(address, rank):
    """The other rank died of an error, or waits at another address."""
    port = address(rank)
    with pytest.raises(
        UserError, match=rf"^rendezvous at 127\.0\.0\.1:{port} failed \(.*[^.]\): the ranks cannot train together"
    ):
        rendezvous.open_process_group(World(rank=rank, num_ranks=2), "gloo", 1)


def test_port_in_use_is_named(address):
    port = address(0)
    with (
        socket.create_server(("", port)),
        pytest.raises(UserError, match=rf"^rendezvous at 127\.0\.0\.1:{port} failed \(.*EADDRINUSE.*the port and firewalls"),
    ):
        rendezvous.open_process_group(World(rank=0, num_ranks=2), "gloo", 5)
