"""How the ranks of one attempt find each other: under keys of the store that no former attempt has written.

torchrun keeps one store for all attempts of a job, and the keys of a process group are the same in each (torch 2.13;
pytorch#135712, pytorch#167288). A rank that is started again sooner than another would find that one's old address there, and
fail. TORCHELASTIC_RESTART_COUNT is no help: an agent that comes back counts from 0.
"""

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]  # documented as public

from agnews_dist.distributed.heartbeat import Store
from agnews_dist.distributed.world import World
from agnews_dist.errors import UserError

SECONDS_BETWEEN_LOOKS = 0.02


def open_process_group(world: World, backend: str, timeout_seconds: int) -> None:
    """Make the process group of `world`, whose ranks have a launcher's variables; its collectives wait `timeout_seconds`.

    Raises:
        UserError: not all ranks came, the launcher's address is none where they could, or they cannot talk to each other.
    """
    timeout = timedelta(seconds=timeout_seconds)
    # torch's own: it knows whether the launcher or rank 0 keeps the store.
    find = dist.rendezvous  # pyright: ignore[reportPrivateImportUsage]  # documented as public
    below = dist.PrefixStore  # pyright: ignore[reportPrivateImportUsage]  # documented as public
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, num_ranks = next(find("env://", timeout=timeout))
    except DistError as error:
        raise UserError(
            f"no meeting place at {address} ({_first_line(error)}): the ranks cannot train together. If another rank says why "
            "above, mend that; else see that rank 0 runs at this address, that nothing else uses the port, and that no "
            "firewall closes it."
        ) from error
    try:
        name = _agree(below("agnews_dist", store), world, timeout_seconds)
        dist.init_process_group(backend, store=below(name, store), rank=rank, world_size=num_ranks, timeout=timeout)
    except RuntimeError as error:  # the store's, gloo's and NCCL's
        raise UserError(
            f"the ranks came to {address} and could not connect to each other ({_first_line(error)}): they cannot train "
            "together. If another rank says why above, mend that; else set GLOO_SOCKET_IFNAME to an interface that all nodes "
            "reach (launch/node.sh does), and see that no firewall stands between the nodes."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


def _agree(store: Store, world: World, timeout_seconds: int) -> str:
    """A name that rank 0 has made up, on every rank.

    Any key may be a former attempt's, so rank 0 answers whoever knocks by the number that it knocks with, made up as well,
    until every rank has said that it knows this very name.
    """
    own, deadline = secrets.token_hex(16), time.monotonic() + timeout_seconds
    if not world.is_main:
        store.set(f"knock/{world.rank}", own)
        answer = f"answer/{own}"
        while not store.check([answer]):
            _wait(deadline, "rank 0", timeout_seconds)
        name = store.get(answer).decode()
        store.set(f"joined/{name}/{world.rank}", "")
        return name
    missing = set(range(1, world.num_ranks))
    while missing:
        for rank in sorted(missing):
            if store.check([f"joined/{own}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"knock/{rank}"]):
                store.set(f"answer/{store.get(f'knock/{rank}').decode()}", own)
        _wait(deadline, f"rank(s) {', '.join(map(str, sorted(missing)))}", timeout_seconds)
    return own


def _wait(deadline: float, missing: str, timeout_seconds: int) -> None:
    if time.monotonic() > deadline:
        raise UserError(
            f"{missing} did not come within {timeout_seconds} s: the ranks cannot train together. Look for its error above, or "
            "raise --engine.timeout_seconds if nodes start that far apart."
        )
    time.sleep(SECONDS_BETWEEN_LOOKS)
