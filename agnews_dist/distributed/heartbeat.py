"""Which ranks are alive: each leaves a beat in a store, rank 0 reads all of them, the others rank 0's."""

import time
from collections.abc import Sequence
from typing import Protocol

CLOSED = b"closed"
"""The last beat of a rank that ended by itself."""


class Store(Protocol):
    """What is needed of torch's `TCPStore`; `get` and `multi_get` wait until the keys are there."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> None: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


class Heartbeats:
    """One rank's view of the others. Silence is measured by this rank's own clock."""

    def __init__(self, store: Store, rank: int, num_ranks: int) -> None:
        """All are alive at this moment."""
        self._store, self._rank, self._count = store, rank, 0
        self._hears_all = rank == 0
        now = time.monotonic()
        self._heard_at = {other: now for other in range(num_ranks) if other != rank}
        self._last: dict[int, bytes] = {}

    def beat(self) -> None:
        """Give a sign of life, and see who else did."""
        self._count += 1
        self._store.set(_key(self._rank), str(self._count))
        self.hear()

    def hear(self) -> None:
        """See who else gave one, without giving one."""
        ranks = self._listened()
        if not self._store.check([_key(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if self._store.check([_key(rank)])]
        heartbeats = self._store.multi_get([_key(rank) for rank in ranks]) if ranks else []
        for rank, beat in zip(ranks, heartbeats, strict=True):
            before, self._last[rank] = self._last.get(rank), beat
            # The first one may be a dead rank's last.
            if before is not None and before != beat:
                self._heard_at[rank] = time.monotonic()

    def close(self) -> None:
        """Say that this rank ends by itself."""
        self._store.set(_key(self._rank), CLOSED.decode())

    def has_closed(self, rank: int) -> bool:
        """Whether `rank` has said so."""
        return self._last.get(rank) == CLOSED

    def hear_all(self) -> None:
        """From now on listen to all ranks."""
        if not self._hears_all:
            self._hears_all = True
            self._heard_at.update({rank: time.monotonic() for rank in self._heard_at if rank})

    def silences(self) -> dict[int, float]:
        """Seconds since the last beat of every rank that is listened to."""
        now = time.monotonic()
        return {rank: now - self._heard_at[rank] for rank in self._listened()}

    def forgive(self, seconds: float) -> None:
        """This process itself was away: that is nobody's silence."""
        for rank in self._heard_at:
            self._heard_at[rank] += seconds

    def _listened(self) -> list[int]:
        return [rank for rank in self._heard_at if (self._hears_all or rank == 0) and not self.has_closed(rank)]


def _key(rank: int) -> str:
    return f"beat/{rank}"


def silence_message(ranks: Sequence[int], seconds: float) -> str:
    """The error of ranks that are dead or hang."""
    who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
    return (
        f"{who} given no sign of life for {seconds:.0f} s: a process or a machine hangs or is gone, and the others cannot go "
        "on alone. See what was written there last, then start the same command again; it goes on from the last checkpoint."
    )


HOST_GONE = (
    "rank 0 has ended without a word: it was killed, perhaps for want of memory, or its machine is gone, and the others cannot "
    "go on alone. See what was written there last, then start the same command again; it goes on from the last checkpoint."
)
