"""Control messages between ranks: the phase of the job, the first failure, heartbeats.

They go through a store that rank 0 hosts, and each rank uses it in a thread of its own. The main thread may be in a collective
that never ends, and a store whose host hangs blocks its callers for ever.

phase    empty, "training" or "stop REASON". The first rank that writes it decides for all: a stop before the training ends
         all ranks at once; in the training the main threads vote on it.
failure  the first failure of the job
RANK     heartbeat: a number that grows, and where the main thread is; "closed" once that rank has ended by itself
"""

import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.5
"""Interval between two heartbeats."""
SILENCE_SECONDS = 3.0
"""Silence after which a rank counts as dead when all are called; threads wait less for the interpreter lock."""
EXIT_SECONDS = 4.0
"""Time for which rank 0 keeps the store for the others; above SILENCE_SECONDS, which one of them may be waiting out."""
PAUSE_SECONDS = 1.0
"""Longest silence that one round counts: this process may have been suspended, and the others with it."""
TRAINING, STOP, CLOSED = "training", "stop ", "closed"

_FIX = "Check the last output there, then run the same command again to resume."
HOST_GONE = f"rank 0 exited without an error message: it was killed (out of memory?) or its machine is gone. {_FIX}"


class Store(Protocol):
    """The methods used of torch's `TCPStore`. `get` and `multi_get` block until the keys exist."""

    def set(self, key: str, value: str, /) -> None: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


@dataclass(frozen=True)
class Failure:
    """The first failure of the job."""

    rank: int
    reported_by: int
    """The same rank, or one that waited for it in vain."""
    text: str

    @property
    def reason(self) -> str:
        """The short form for status.json."""
        return f"rank {self.rank}: {self.text}" if self.rank == self.reported_by else self.text.split(":")[0]

    @property
    def consequence(self) -> str:
        """The message of another rank that ends because of it."""
        what = f"rank {self.rank} failed first" if self.rank == self.reported_by else self.reason
        return f"{what}; this rank ended with it"


def silent_ranks(ranks: Sequence[int], seconds: float, reported_by: int) -> Failure:
    """Return the failure of ranks that are dead or hang."""
    who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
    text = f"{who} sent no heartbeat for {seconds:.0f} s: a process or machine hangs or is gone. {_FIX}"
    return Failure(ranks[0], reported_by, text)


class Coordinator:
    """One rank's end of the control messages. From its creation on it sends heartbeats. See the module for the keys."""

    def __init__(
        self, store: Store, rank: int, num_ranks: int, timeout_seconds: float, on_news: Callable[[], None] = lambda: None
    ) -> None:
        """Start the thread.

        `store`: this rank's client of a store that rank 0 hosts and nothing else uses. A rank silent for `timeout_seconds` has
        failed. `on_news` is called in the thread after a change of phase or failure.
        """
        self._store, self.rank, self.timeout_seconds, self._on_news = store, rank, timeout_seconds, on_news
        self._others = [other for other in range(num_ranks) if other != rank]
        # Rank 0 monitors all, the others rank 0: the number of messages grows with the ranks, not with their square.
        self._monitored = self._others if rank == 0 else [0]
        self.phase = ""
        self.failure: Failure | None = None
        self.is_closed, self._has_left = False, False
        self._count, self._polled_at = 0, time.monotonic()
        self._beats = dict.fromkeys(self._others, "")
        self._silence = dict.fromkeys(self._others, 0.0)
        self._host_silence, self._count_at_tick = 0.0, -1
        if rank == 0:
            for key in ("phase", "failure", *map(str, range(num_ranks))):
                store.compare_set(key, "", "")
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._thread.start()

    def enter(self, phase: str, *, force: bool = False) -> str:
        """Bring the job into `phase` if it is in none yet, with `force` in any case; return the phase that it is in.

        Empty: the store does not answer, or the job has failed: a stop is then the launcher's reaction.
        """

        def work() -> str:
            self._read()
            if self.failure is not None:
                return ""
            if force:
                self._store.set("phase", phase)
            self.phase = self._store.compare_set("phase", "", phase).decode()
            self._on_news()
            return self.phase

        return self._run_in_thread(work, SILENCE_SECONDS) or ""

    def publish(self, failure: Failure) -> Failure:
        """Make `failure` the job's first, unless there is one; return the first."""

        self._run_in_thread(lambda: self._write(failure), SILENCE_SECONDS)
        self._record(failure)  # if the store does not answer
        return self.failure or failure

    def explain(self, error_text: str) -> Failure:
        """Return the failure that an error of a collective is due to: a dead or late rank's, or else this rank's own."""
        if silent := self.call_roll():
            return silent_ranks(silent, max(SILENCE_SECONDS, *(self._silence[rank] for rank in silent)), self.rank)
        late = {rank: place for rank, beat in self._beats.items() if (place := beat.partition(" ")[2])}
        if self.failure is None and late and re.search(r"timed? ?out", error_text, re.IGNORECASE):
            rank, place = min(late.items())
            text = (
                f"rank {rank} hangs or is slow, in {place}: rank {self.rank} waited {self.timeout_seconds:g} s for it. {_FIX}"
            )
            return Failure(rank, self.rank, text)
        return Failure(self.rank, self.rank, error_text)

    def call_roll(self) -> list[int]:
        """Return the ranks without a sign of life in SILENCE_SECONDS from now; soon if there is none, or a failure is known."""

        def read() -> dict[int, str]:
            self._read()  # a stop or a failure that explains the silence
            values = self._store.multi_get([str(rank) for rank in self._others])
            self._beats.update(zip(self._others, (value.decode() for value in values), strict=True))
            return dict(self._beats)

        deadline = time.monotonic() + SILENCE_SECONDS
        # Not the values of the last poll: a dead rank's last heartbeat, read later, would look like a sign of life.
        first = self._run_in_thread(read, SILENCE_SECONDS)
        missing = self._others if first else [0]
        while missing and first and self.failure is None and time.monotonic() < deadline:
            time.sleep(0.1)
            latest = self._run_in_thread(read, SILENCE_SECONDS)
            missing = [rank for rank in self._others if latest[rank] == first[rank] != CLOSED] if latest else [0]
        return [] if self.failure is not None or self.is_closed else missing

    def count_tick(self, seconds: float) -> None:
        """Count the time without an answer of the store, of which its users cannot tell; called at intervals of `seconds`."""
        self._host_silence = 0.0 if self._count != self._count_at_tick else self._host_silence + min(seconds, PAUSE_SECONDS)
        self._count_at_tick = self._count
        if self.rank != 0 and self._host_silence > self.timeout_seconds and not self._has_left:
            self._record(silent_ranks([0], self._host_silence, self.rank))

    def leave(self, *, after_main: bool = False) -> None:
        """End this rank's part; rank 0 keeps the store until the others end. `after_main`: they wait for rank 0 first."""
        if after_main and self.rank != 0:
            self._wait_for_end([0])
        self._run_in_thread(self._leave, 1.0)
        if self.rank == 0:
            self._wait_for_end(rank for rank in self._others if self._silence[rank] < SILENCE_SECONDS)

    def close(self) -> None:
        """End this rank's part and the thread."""
        self.leave()
        self.is_closed = True
        self._tasks.put(None)
        self._thread.join(1.0)

    def _leave(self) -> None:
        self._has_left = True
        self._store.set(str(self.rank), CLOSED)

    def _wait_for_end(self, ranks: Iterable[int]) -> None:
        keys, deadline = [str(rank) for rank in ranks], time.monotonic() + EXIT_SECONDS
        while keys and not self.is_closed and time.monotonic() < deadline:
            values = self._run_in_thread(lambda: self._store.multi_get(keys), 1.0)
            if values is not None and {value.decode() for value in values} == {CLOSED}:
                return
            time.sleep(0.05)

    def _run_in_thread(self, work: Callable[[], T], seconds: float) -> T | None:
        """Run `work` in the thread and return its result; None if it raised, took longer than `seconds`, or cannot begin."""
        if self.is_closed or self._host_silence > SILENCE_SECONDS:
            return None
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)
                raise  # `_run` handles it

        self._tasks.put(task)
        deadline = time.monotonic() + seconds
        while not future.done() and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        return future.result() if future.done() and future.exception() is None else None

    def _run(self) -> None:
        """Run tasks, and poll in between. The body of the thread."""
        next_poll = 0.0
        try:
            # After a failure there is nothing more to ask: rank 0 need not keep the store for this rank.
            while not self.is_closed and (self.rank == 0 or self.failure is None):
                try:
                    task = self._tasks.get(timeout=max(0.0, next_poll - time.monotonic()))
                except queue.Empty:
                    self._poll()
                    next_poll = time.monotonic() + POLL_SECONDS
                    continue
                if task is None:
                    return
                task()
            self._leave()
            self.is_closed = True
        except RuntimeError:
            # torch's store raises this when its host is gone. On rank 0 that happens only while the process ends.
            self.is_closed = True
            if self.rank != 0 and self._beats[0] != CLOSED and not self._has_left:
                self._record(Failure(0, self.rank, HOST_GONE))

    def _poll(self) -> None:
        self._count += 1
        if not self._has_left:
            self._store.set(str(self.rank), f"{self._count} {_locate_main_thread()}")
        self._read()
        silent = {rank: seconds for rank, seconds in self._silence.items() if seconds > self.timeout_seconds}
        if silent and self.failure is None and not self._has_left:
            self._write(silent_ranks(sorted(silent), max(silent.values()), self.rank))

    def _write(self, failure: Failure) -> None:
        self._store.compare_set("failure", "", f"{failure.rank} {failure.reported_by} {failure.text}")
        self._read()

    def _read(self) -> None:
        """Read phase, failure and the monitored heartbeats."""
        keys = ["phase", "failure", *map(str, self._monitored)]
        phase, failure, *beats = (value.decode() for value in self._store.multi_get(keys))
        # Measured in rounds, not by the clock alone: a suspended process must not take its own absence for the others' silence.
        now = time.monotonic()
        gap, self._polled_at = min(now - self._polled_at, PAUSE_SECONDS), now
        for rank, beat in zip(self._monitored, beats, strict=True):
            self._silence[rank] = self._silence[rank] + gap if beat == self._beats[rank] != CLOSED else 0.0
            self._beats[rank] = beat
        if failure:
            rank, reported_by, text = failure.split(" ", 2)
            self._record(Failure(int(rank), int(reported_by), text))
        if phase != self.phase:
            self.phase = phase
            self._on_news()

    def _record(self, failure: Failure) -> None:
        if self.failure is None:
            self.failure = failure
            self._on_news()


def _locate_main_thread() -> str:
    """Return where in this package the main thread is, as `data/tokens.py line 120`; empty in a collective."""
    ident = threading.main_thread().ident
    frame = sys._current_frames().get(ident or 0)  # pyright: ignore[reportPrivateUsage]  # documented for debuggers
    while frame is not None:
        _, package, path = frame.f_code.co_filename.rpartition("/agnews_dist/")
        if package:
            # Collectives are called in these two folders alone.
            return "" if path.startswith(("distributed/", "engine/")) else f"{path} line {frame.f_lineno}"
        frame = frame.f_back
    return ""
