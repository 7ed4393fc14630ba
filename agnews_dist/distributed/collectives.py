"""The only door to torch.distributed: sums, gathers and votes. With one rank each is the identity.

The process group itself is made by engine.py (accelerate does it) and closed here.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from agnews_dist.distributed.heartbeat import Store
from agnews_dist.errors import SharedError, UserError

T = TypeVar("T")


def is_distributed() -> bool:
    """True once there is a process group."""
    return dist.is_available() and dist.is_initialized()


def all_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sum over ranks, in float64."""
    if not is_distributed():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def average_in_bf16(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]  # DDP insists on this type
) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: gradients are rounded to bf16, averaged over the ranks in it, and given back in fp32."""
    # torch's own, but under its own name DDP takes it on NCCL alone; gloo can do it too.
    return bf16_compress_hook(group, bucket)


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, on every rank, in place of what is there."""
    if is_distributed():
        dist.broadcast(tensor, src=0)
    return tensor


def all_gather(value: T) -> list[T]:
    """Every rank's value (any picklable object), in rank order, on every rank."""
    if not is_distributed():
        return [value]
    gathered: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered  # pyright: ignore[reportReturnType]  # every slot was filled


def exchange(sent: Tensor, received: Tensor, peer: int) -> None:
    """Send to `peer` and fill `received` with what it sends, at the same time; both must call it, after an `all_reduce` of all
    ranks on such a device: NCCL then uses the same communicator again."""
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]):
        work.wait()


def all_reduce(tensor: Tensor) -> Tensor:
    """The element-wise sum over ranks, in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def side_channel(timeout_seconds: float) -> Store:
    """This rank's client of a key-value store that rank 0 hosts while it holds its own. Collective.

    Not the process group's own store: a launcher hosts that, and what the ranks have to say when it dies would die with it.
    """
    host, timeout, is_host = os.environ["MASTER_ADDR"], timedelta(seconds=timeout_seconds), dist.get_rank() == 0
    connect = partial(dist.TCPStore, host, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]  # documented as public
    hosted = connect(0, is_master=True, wait_for_workers=False) if is_host else None
    port = all_gather(hosted.port if hosted is not None else 0)[0]
    return hosted or connect(port)


def catch(work: Callable[[], T]) -> T | UserError:
    """Run `work`; an error is returned, so that it can be voted on instead of leaving the other ranks waiting."""
    try:
        return work()
    except UserError as error:
        return error
    except OSError as error:
        # A full disk or a vanished mount is the user's to mend, and often one rank's alone.
        return UserError(
            f"{error.filename or 'a file'} failed with {error.strerror or error}: what the run needs or leaves there is lost. "
            "Check the disk's space and permissions."
        )


def raise_if_any_failed(outcome: T | UserError) -> T:
    """Vote on what `attempt` returned.

    Raises:
        SharedError: on all ranks, if any rank failed, with the message of the lowest such rank.
    """
    failure = (str(outcome), outcome.exit_code) if isinstance(outcome, UserError) else None
    for rank, failed in enumerate(all_gather(failure)):
        if failed is not None:
            raise SharedError(failed[0], rank, failed[1])
    assert not isinstance(outcome, UserError)
    return outcome


def check_equal(fingerprints: Mapping[str, str]) -> None:
    """Make sure that every rank starts from the same things.

    Raises:
        SharedError: on all ranks, naming what differs and the first rank that has another one than rank 0.
    """
    gathered = all_gather(dict(fingerprints))
    for rank, theirs in enumerate(gathered):
        differing = [name for name, value in gathered[0].items() if theirs.get(name) != value]
        if differing:
            raise SharedError(
                f"rank {rank} has another {' and '.join(differing)} than rank 0: the ranks would train different models, and "
                "no figure would show it. Give every rank the same configuration, data and model files.",
                rank,
            )


# Long enough for a thread that waits for the interpreter lock; a rank that never leaves costs the whole job.
SETTLING_SECONDS = 0.1


def close() -> None:
    """Leave the process group, so that a normal end prints no warning about leaked resources."""
    if is_distributed():
        # gloo's thread drops the tensors of the last collective only after it has woken us, and needs the interpreter lock for
        # that; DDP's reducer, when it outlives the group, joins that thread while holding the lock (pytorch#56297). Without a
        # pause that releases it the two wait for ever: torch 2.13, one of three runs that ended right after a collective.
        time.sleep(SETTLING_SECONDS)
        dist.destroy_process_group()
