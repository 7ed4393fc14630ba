"""Collectives: sums, gathers, broadcasts and votes over all ranks. With one rank each is the identity.

rendezvous.py creates the process group; `close` here destroys it.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from agnews_dist.distributed.coordinator import Store
from agnews_dist.distributed.world import SPEAK_SECONDS, print_line
from agnews_dist.errors import SharedError, UserError

T = TypeVar("T")

REPEAT_SECONDS = 30.0
"""Interval between two lines about the same wait."""


def is_distributed() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def all_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the element-wise sum over ranks, in float64."""
    if not is_distributed():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def average_in_bf16(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]  # DDP checks this annotation
) -> torch.futures.Future[Tensor]:
    """Average gradients over the ranks in bf16 and return them in fp32: a communication hook for DDP."""
    # A wrapper: DDP accepts torch's own function only with NCCL, although gloo can run it.
    return bf16_compress_hook(group, bucket)


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrite a tensor with rank 0's, in place."""
    if is_distributed():
        dist.broadcast(tensor, src=0)
    return tensor


def all_gather(value: T) -> list[T]:
    """Return every rank's value (any picklable object), in rank order."""
    if not is_distributed():
        return [value]
    gathered: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered  # pyright: ignore[reportReturnType]  # every slot was filled


def exchange(sent: Tensor, received: Tensor, peer: int) -> None:
    """Send a tensor to `peer` and receive one from it at the same time; both ranks must call this.

    All ranks must have called `all_reduce` on such a device before: NCCL then reuses its communicator.
    """
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]):
        work.wait()


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor element-wise over ranks, in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def connect_store(timeout_seconds: float) -> Store:
    """Return this rank's client of a new key-value store, which rank 0 hosts while its client exists. Collective.

    The launcher hosts the process group's own store. This one lets the ranks communicate after the launcher has died.
    `wait_for_main` works from here on.
    """
    host, timeout, is_host = os.environ["MASTER_ADDR"], timedelta(seconds=timeout_seconds), dist.get_rank() == 0
    connect = partial(dist.TCPStore, host, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]  # documented as public
    hosted = connect(0, is_master=True, wait_for_workers=False) if is_host else None
    own = (hosted.port if hosted is not None else 0, f"process {os.getpid()} on {socket.gethostname()}")
    port, _Turnstile.process = all_gather(own)[0]
    # A second connection: the first one's user may be blocked in it.
    _Turnstile.store, _Turnstile.num_passed = connect(port), 0
    return hosted or connect(port)


class _Turnstile:
    """State of `wait_for_main`, one per process like torch's process group; `connect_store` and `close` set it."""

    store: Store | None = None
    num_passed = 0
    process = ""


def wait_for_main(what: str) -> None:
    """Wait until rank 0 calls this too, without a time limit. Collective; nothing to do before `connect_store`.

    Call it before a collective that rank 0 may reach late because of its files or console. A collective has a time limit that
    would blame another rank. The coordinator ends the ranks that wait here if rank 0 dies or hangs. `what` completes "rank 0
    ...", for the line that tells of a long wait.
    """
    store = _Turnstile.store
    if store is None or not is_distributed():
        return
    _Turnstile.num_passed += 1
    rank, key = dist.get_rank(), f"main/{_Turnstile.num_passed}"
    if rank == 0:
        store.set(key, "")
        return
    begin = time.monotonic()
    next_line = begin + SPEAK_SECONDS
    while not store.check([key]):
        now = time.monotonic()
        if rank == 1 and now > next_line:
            next_line = now + REPEAT_SECONDS
            print_line(
                f"[rank 1/{dist.get_world_size()}] waits {now - begin:.0f} s so far: rank 0 ({_Turnstile.process}) {what}; "
                "no time limit while it lives"
            )
        time.sleep(min(0.1, 0.002 + (now - begin) / 20))


def catch(work: Callable[[], T]) -> T | UserError:
    """Run `work` and return its result or error, to vote on instead of leaving the other ranks waiting."""
    try:
        return work()
    except UserError as error:
        return error
    except OSError as error:
        # A full disk or a lost mount is the user's to fix, and often one rank's alone.
        return UserError(f"{error.filename or 'a file'}: {error.strerror or error}. Check the disk's space and permissions.")


def raise_if_any_failed(outcome: T | UserError) -> T:
    """Vote on what `catch` returned. Collective.

    Raises:
        SharedError: on all ranks, if any rank failed; it has the message of the lowest such rank.
    """
    failure = (str(outcome), outcome.exit_code) if isinstance(outcome, UserError) else None
    for rank, failed in enumerate(all_gather(failure)):
        if failed is not None:
            raise SharedError(failed[0], rank, failed[1])
    assert not isinstance(outcome, UserError)
    return outcome


def check_equal(fingerprints: Mapping[str, str]) -> None:
    """Check that all ranks have the same fingerprints. Collective.

    Raises:
        SharedError: on all ranks; it names what differs and the first rank that differs from rank 0.
    """
    gathered = all_gather(dict(fingerprints))
    for rank, theirs in enumerate(gathered):
        differing = [name for name, value in gathered[0].items() if theirs.get(name) != value]
        if differing:
            raise SharedError(
                f"rank {rank} has another {' and '.join(differing)} than rank 0: the ranks would train different models. "
                "Give every rank the same configuration, data and model files.",
                rank,
            )


def close() -> None:
    """Destroy the process group, so that a normal end prints no warning about leaked resources."""
    _Turnstile.store = None
    if is_distributed():
        # gloo's thread drops the tensors of the last collective after it has woken us, and needs the interpreter lock for that.
        # DDP's reducer, if it outlives the group, joins that thread while it holds the lock (pytorch#56297). The pause releases
        # the lock. Without it one of three runs that ended right after a collective hung (torch 2.13).
        time.sleep(0.1)
        dist.destroy_process_group()
