"""Heartbeats through a key-value store. Rank 0 monitors all ranks, the others monitor rank 0."""

import time
from collections.abc import Sequence
from typing import Protocol

CLOSED = b"closed"
"""Last heartbeat of a rank that ended by itself."""


class Store(Protocol):
    """The methods used of torch's `TCPStore`. `get` and `multi_get` block until the keys exist."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> None: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


class Heartbeats:
    """One rank's view of the others. Silence is measured by this rank's own clock."""

    def __init__(self, store: Store, rank: int, num_ranks: int) -> None:
        """Treat every rank as alive now."""
        self._store, self._rank, self._count = store, rank, 0
        self._monitors_all = rank == 0
        now = time.monotonic()
        self._last_change = {other: now for other in range(num_ranks) if other != rank}
        self._last_value: dict[int, bytes] = {}

    def send(self) -> None:
        """Write this rank's heartbeat and read the others'."""
        self._count += 1
        self._store.set(_key(self._rank), str(self._count))
        self.read()

    def read(self) -> None:
        """Read the heartbeats of the monitored ranks."""
        ranks = self._monitored()
        if not self._store.check([_key(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if self._store.check([_key(rank)])]
        values = self._store.multi_get([_key(rank) for rank in ranks]) if ranks else []
        for rank, value in zip(ranks, values, strict=True):
            before, self._last_value[rank] = self._last_value.get(rank), value
            # The first value that we read proves nothing: a rank may have died after it wrote it.
            if before is not None and before != value:
                self._last_change[rank] = time.monotonic()

    def close(self) -> None:
        """Mark this rank as ended by itself."""
        self._store.set(_key(self._rank), CLOSED.decode())

    def has_ended(self, rank: int) -> bool:
        """Return whether `rank` ended by itself."""
        return self._last_value.get(rank) == CLOSED

    def monitor_all(self) -> None:
        """Monitor all ranks from now on."""
        if not self._monitors_all:
            self._monitors_all = True
            self._last_change.update({rank: time.monotonic() for rank in self._last_change if rank})

    def measure_silence(self) -> dict[int, float]:
        """Return the seconds since the last heartbeat, by monitored rank."""
        now = time.monotonic()
        return {rank: now - self._last_change[rank] for rank in self._monitored()}

    def discount_pause(self, seconds: float) -> None:
        """Exclude the time for which this process was suspended."""
        for rank in self._last_change:
            self._last_change[rank] += seconds

    def _monitored(self) -> list[int]:
        return [rank for rank in self._last_change if (self._monitors_all or rank == 0) and not self.has_ended(rank)]


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"


_FIX = "Check the last output there, then run the same command again to resume."


def format_silence(ranks: Sequence[int], seconds: float) -> str:
    """Format the error of ranks that are dead or hang."""
    who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
    return f"{who} sent no heartbeat for {seconds:.0f} s: a process or machine hangs or is gone. {_FIX}"


HOST_GONE = f"rank 0 exited without an error message: it was killed (out of memory?) or its machine is gone. {_FIX}"
"""Error of the other ranks when the store, which rank 0 hosts, is gone."""
