"""Creation of the process group, under store keys that no earlier attempt of the job has written.

torchrun keeps one store for all attempts of a job, and the keys of a process group are the same in each (torch 2.13;
pytorch#135712, pytorch#167288). A rank that restarts sooner than another would read that one's old address there, and fail.
TORCHELASTIC_RESTART_COUNT does not help: an agent that is restarted counts from 0.
"""

import os
import secrets
import socket
import time
from contextlib import AbstractContextManager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import DistError  # pyright: ignore[reportPrivateImportUsage]  # documented as public

from agnews_dist.distributed.coordinator import Store
from agnews_dist.distributed.world import SPEAK_SECONDS, World, announced, print_line, unless_done_in
from agnews_dist.errors import UserError

POLL_INTERVAL_SECONDS = 0.02
MARGIN_SECONDS = 30.0
"""Time for imports and devices, besides the time limits of the rendezvous, until a process that is stuck in it ends."""


def end_if_stuck(world: World, timeout_seconds: float) -> AbstractContextManager[None]:
    """End this process if the `with` block never returns. It connects the ranks, so no other rank can end this one yet.

    The block waits up to three times for other ranks, each time for `timeout_seconds`.
    """
    seconds = 3 * timeout_seconds + MARGIN_SECONDS

    def end() -> None:
        print_line(
            f"{world.label} error: not connected to the other ranks after {seconds:.0f} s: a call to the network or the device "
            "hangs. Check this machine, then run the same command again."
        )
        os._exit(1)

    return unless_done_in(seconds, end)


def open_process_group(world: World, backend: str, timeout_seconds: int) -> None:
    """Create the process group from the launcher's variables; its collectives time out after `timeout_seconds`.

    Raises:
        UserError: a rank did not come, the launcher's address cannot be used, or the ranks cannot connect to each other.
    """
    timeout = timedelta(seconds=timeout_seconds)
    levels = dist.DebugLevel  # pyright: ignore[reportPrivateImportUsage]  # documented as public
    if backend == "gloo" and dist.get_debug_level() == levels.DETAIL:  # pyright: ignore[reportPrivateImportUsage]
        # DDP's constructor crashes with gloo under it (torch 2.13): SIGSEGV without any message.
        dist.set_debug_level(levels.INFO)  # pyright: ignore[reportPrivateImportUsage]
        if world.is_main:
            print_line("warning: TORCH_DISTRIBUTED_DEBUG=DETAIL crashes on CPUs, so this run takes INFO.")
    # torch's own rendezvous: it knows whether the launcher or rank 0 hosts the store.
    rendezvous = dist.rendezvous  # pyright: ignore[reportPrivateImportUsage]  # documented as public
    prefixed = dist.PrefixStore  # pyright: ignore[reportPrivateImportUsage]  # documented as public
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    missing = ["the other ranks" if world.is_main else "rank 0"]
    with announced(world, lambda: f"for {missing[-1]} at {address}, at most {timeout_seconds} s"):
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _check_agent()
        try:
            store, rank, num_ranks = next(rendezvous("env://", timeout=timeout))
        except DistError as error:
            raise UserError(
                f"rendezvous at {address} failed ({_first_line(error)}): the ranks cannot train together. "
                "Check other ranks' errors, that rank 0 runs there, the port and firewalls."
            ) from error
        try:
            prefix = _share_prefix(prefixed("agnews_dist", store), world, timeout_seconds, missing)
            dist.init_process_group(backend, store=prefixed(prefix, store), rank=rank, world_size=num_ranks, timeout=timeout)
        except RuntimeError as error:  # raised by the store, gloo and NCCL
            raise UserError(
                f"the ranks met at {address} but could not connect ({_first_line(error)}): they cannot train together. "
                "Check other ranks' errors, firewalls, and set GLOO_SOCKET_IFNAME."
            ) from error


def _check_agent() -> None:
    """Raise a UserError if the agent of torchrun has ended while this process began: torch would wait for its store."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        socket.create_connection((host, int(port)), timeout=SPEAK_SECONDS).close()
    except ConnectionRefusedError as error:
        raise UserError(
            f"{host}:{port} refuses connections: torchrun, which listens there before it starts ranks, has ended. Look for "
            "its error above, then start the job again."
        ) from error
    except (OSError, ValueError):
        pass  # torch's own attempts explain it


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


def _share_prefix(store: Store, world: World, timeout_seconds: int, missing: list[str]) -> str:
    """Return a random key prefix that rank 0 has chosen; rank 0 writes into `missing` who has not come. Collective.

    Keys may be left from an earlier attempt. So each rank sends a random token, and rank 0 replies under that token, until
    every rank has confirmed this very prefix.
    """
    token, deadline = secrets.token_hex(16), time.monotonic() + timeout_seconds
    if not world.is_main:
        store.set(f"request/{world.rank}", token)
        reply = f"reply/{token}"
        while not store.check([reply]):
            _sleep(deadline, "rank 0", timeout_seconds)
        prefix = store.get(reply).decode()
        store.set(f"joined/{prefix}/{world.rank}", "")
        return prefix
    absent = set(range(1, world.num_ranks))
    while absent:
        for rank in sorted(absent):
            if store.check([f"joined/{token}/{rank}"]):
                absent.discard(rank)
            elif store.check([f"request/{rank}"]):
                store.set(f"reply/{store.get(f'request/{rank}').decode()}", token)
        missing[:] = [f"rank(s) {', '.join(map(str, sorted(absent)))}"]
        _sleep(deadline, missing[0], timeout_seconds)
    return token


def _sleep(deadline: float, missing: str, timeout_seconds: int) -> None:
    """Sleep for one poll interval, or raise a UserError if the deadline has passed."""
    if time.monotonic() > deadline:
        raise UserError(
            f"{missing} did not come within {timeout_seconds} s: the ranks cannot train together. Look for its error above, or "
            "raise --engine.timeout_seconds if nodes start that far apart."
        )
    time.sleep(POLL_INTERVAL_SECONDS)
