"""Collectives: gathers, broadcasts and votes over all ranks. With one rank each is the identity.

What a training gathers or broadcasts is verified: a bit that flips on the way is an error, never another result. rendezvous.py
creates the process group; `close` here destroys it.
"""

import os
import pickle
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from agnews_dist.distributed.coordinator import Store
from agnews_dist.distributed.world import SPEAK_SECONDS, print_line
from agnews_dist.errors import AlreadyFinished, SharedError, UserError

T = TypeVar("T")

SMALL_BYTES = 248
"""Size of a pickled value up to which one collective gathers it."""
_MEET_SECONDS = 0.25
"""Interval between two collectives while rank 0 works alone; far below every time limit."""
REPEAT_SECONDS = 30.0
"""Interval between two lines about the same wait."""


def is_distributed() -> bool:
    """Return whether there is a process group, and this rank works with the others."""
    return dist.is_available() and dist.is_initialized() and not _Solo.is_on


class _Solo:
    """State of `without_others`, one per process like torch's process group."""

    is_on = False


@contextmanager
def without_others() -> Generator[None]:
    """Make every collective of the block the identity: each rank does work of its own, as if it were the only one."""
    before, _Solo.is_on = _Solo.is_on, True
    try:
        yield
    finally:
        _Solo.is_on = before


def gather_numbers(values: Sequence[float]) -> list[tuple[float, ...]]:
    """Return every rank's numbers in rank order; each rank gives the same count of them. One collective: fit for every step.

    Sums of them have the same order on all ranks, so equal bits. Raises UserError: a bit has flipped on the way.
    """
    if not is_distributed():
        return [tuple(values)]
    form = f"<{len(values)}d"
    return [struct.unpack(form, part) for part in _gather_bytes(struct.pack(form, *values))]


def average_in_bf16(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]  # DDP checks this annotation
) -> torch.futures.Future[Tensor]:
    """Average gradients over the ranks in bf16 and return them in fp32: a communication hook for DDP."""
    # A wrapper: DDP accepts torch's own function only with NCCL, although gloo can run it.
    return bf16_compress_hook(group, bucket)


def broadcast(tensor: Tensor) -> Tensor:
    """Overwrite a tensor with rank 0's, in place. `check_replicas` verifies it."""
    if is_distributed():
        dist.broadcast(tensor, src=0)
    return tensor


def all_gather(value: T) -> list[T]:
    """Return every rank's value (any picklable object), in rank order. Raises UserError: a bit has flipped on the way."""
    if not is_distributed():
        return [value]
    sent = pickle.dumps(value)
    # Small values come with their sizes, in a single collective.
    parts = _gather_bytes(len(sent).to_bytes(8, "little") + sent[:SMALL_BYTES].ljust(SMALL_BYTES, b"\0"))
    sizes, parts = [int.from_bytes(part[:8], "little") for part in parts], [part[8:] for part in parts]
    if max(sizes) > SMALL_BYTES:
        parts = _gather_bytes(sent.ljust(max(sizes), b"\0"))
    return [pickle.loads(part[:size]) for part, size in zip(parts, sizes, strict=True)]


def _gather_bytes(sent: bytes) -> list[memoryview]:
    """Return every rank's bytes in rank order, after a check of their checksums; all ranks send equally many."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    own = torch.frombuffer(bytearray(sent + _checksum(sent)), dtype=torch.uint8).to(device)
    received = own.new_empty(dist.get_world_size(), len(own))
    dist.all_gather(list(received), own)
    parts = [memoryview(row) for row in received.cpu().numpy()]
    damaged = [rank for rank, part in enumerate(parts) if _checksum(part[: len(sent)]) != bytes(part[len(sent) :])]
    if damaged:
        raise UserError(
            f"data from {_format_ranks(damaged)} to rank {dist.get_rank()}: bits have flipped on the way. Check memory and "
            "network of both machines, then run the same command again to resume."
        )
    return [part[: len(sent)] for part in parts]


def _checksum(content: bytes | memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def _format_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def sum_bits(tensors: Iterable[Tensor]) -> int:
    """Return a 64-bit checksum of tensors on one device. Any one flipped bit changes it; it costs one read of the memory."""
    sums: list[Tensor] = []
    for tensor in tensors:
        content = tensor.detach().reshape(-1).view(torch.uint8)
        end = content.numel() // 8 * 8
        # As 64-bit words: bytes would be summed 25 times slower on a CPU. The sum wraps around.
        sums += [content[:end].view(torch.int64).sum(), content[end:].sum(dtype=torch.int64)]
    total = 0
    for part in torch.stack(sums).tolist() if sums else []:
        # The multiplier is odd: no difference in one sum is lost, and exchanged tensors differ.
        total = (total * 0x5851F42D4C957F2D + part) % 2**64
    return total


def check_replicas(checksum: int, what: str) -> None:
    """Check that all ranks have the same `sum_bits` of their tensors, which `what` names in the error. Collective.

    Raises:
        SharedError: on all ranks; it names the ranks that differ from the majority, or from rank 0 where there is none.
    """
    if not is_distributed():
        return
    sums = [bytes(part) for part in _gather_bytes(checksum.to_bytes(8, "little"))]
    common = Counter(sums).most_common(1)[0][0]
    differing = [rank for rank, value in enumerate(sums) if value != common]
    if differing:
        raise SharedError(
            f"{what} on {_format_ranks(differing)}: other bits than on rank {sums.index(common)}. A memory, device or "
            "network is faulty: check these machines, then run the same command again to resume.",
            differing[0],
        )


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


def wait_for_main(what: str | None) -> None:
    """Wait until rank 0 calls this too, without a time limit. Collective; nothing to do before `connect_store`.

    Call it before a collective that rank 0 may reach late because of its files or console. A collective has a time limit that
    would blame another rank. The coordinator ends the ranks that wait here if rank 0 dies or hangs. `what` completes "rank 0
    ...", for the line about a long wait; None: no line, as rank 0's console shows the work.
    """
    store = _Turnstile.store
    if store is None or not is_distributed():
        return
    _Turnstile.num_passed += 1
    key = f"main/{_Turnstile.num_passed}"
    if dist.get_rank() == 0:
        store.set(key, "")
        return
    wait = _WaitForMain(f"rank 0 ({_Turnstile.process}) {what}")
    while not store.check([key]):
        if what is not None:
            wait.print_if_long()
        time.sleep(min(0.1, 0.002 + wait.seconds / 20))


class _WaitForMain:
    """A wait for rank 0, which rank 1 reports."""

    def __init__(self, what: str) -> None:
        self._what, self._begin, self._next_line = what, time.monotonic(), SPEAK_SECONDS

    @property
    def seconds(self) -> float:
        """Time since the wait began."""
        return time.monotonic() - self._begin

    def print_if_long(self) -> None:
        """Print a line if the last one is long ago."""
        if dist.get_rank() == 1 and self.seconds > self._next_line:
            self._next_line = self.seconds + REPEAT_SECONDS
            label = f"[rank 1/{dist.get_world_size()}]"
            print_line(f"{label} waits {self.seconds:.0f} s so far: {self._what}; no time limit while it lives")


def catch_on_main(work: Callable[[], T], what: str) -> T | UserError | None:
    """Return on rank 0 what `catch(work)` returns, on the others None, once it has ended. Collective.

    For commands without a coordinator: `work` may take longer than the time limit of a collective. Meanwhile a second thread
    meets the other ranks, so a rank 0 that dies or hangs as a whole is still noticed. `what`: as of `wait_for_main`.
    """
    if not is_distributed():
        return catch(work)
    if dist.get_rank() != 0:
        wait = _WaitForMain(f"rank 0 {what}")
        while not all_gather(False)[0]:
            wait.print_if_long()
        return None
    is_done, errors = threading.Event(), list[Exception]()

    def meet() -> None:
        try:
            while not is_done.wait(_MEET_SECONDS):
                all_gather(False)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    try:
        outcome = catch(work)
    finally:
        is_done.set()
    thread.join()
    if errors:
        raise errors[0]
    all_gather(True)
    return outcome


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
    failure = (str(outcome), outcome.exit_code, _class_of(outcome)) if isinstance(outcome, UserError) else None
    for rank, failed in enumerate(all_gather(failure)):
        if failed is not None:
            message, exit_code, kind = failed
            raise SharedError(message, rank, exit_code, kind)
    assert not isinstance(outcome, UserError)
    return outcome


def _class_of(error: UserError) -> type[UserError] | None:
    """Return the class of an error that its message alone can make again."""
    if isinstance(error, SharedError) and not isinstance(error, AlreadyFinished):
        return error.kind
    return type(error)


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


def close(*, destroys_group: bool = True) -> None:
    """Destroy the process group, so that a normal end prints no warning about leaked resources.

    `destroys_group` False: it was there before the run, and only what belongs to the run ends.
    """
    _Turnstile.store = None
    if destroys_group and is_distributed():
        # gloo's thread drops the tensors of the last collective after it has woken us, and needs the interpreter lock for that.
        # DDP's reducer, if it outlives the group, joins that thread while it holds the lock (pytorch#56297). The pause releases
        # the lock. Without it one of three runs that ended right after a collective hung (torch 2.13).
        time.sleep(0.1)
        dist.destroy_process_group()
