"""Control messages between ranks: stop requests, the first failure, heartbeats.

They go through a store that rank 0 hosts, and each rank uses it in a thread of its own. The main thread may be in a collective
that never ends, and a store whose host hangs blocks its callers for ever.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from agnews_dist.distributed.heartbeat import HOST_GONE, Heartbeats, Store, format_silence

T = TypeVar("T")

POLL_SECONDS = 0.5
BUSY_POLL_SECONDS = 0.1
"""Poll interval while a stop or a failure is being spread."""
ANSWER_SECONDS = 5.0
"""Time for every rank to answer a stop request if nothing is lost by ending without its answer."""
SILENCE_SECONDS = 3.0
"""Silence after which a rank counts as dead once another rank has failed; threads wait less for the interpreter lock."""
PAUSE_SECONDS = 1.5
"""Gap between two polls that shows that this process was suspended."""
EXIT_SECONDS = 4.0
"""Time for which rank 0 keeps the store for the others; above SILENCE_SECONDS, which one of them may be waiting out."""


@dataclass(frozen=True)
class Failure:
    """The first failure of the job."""

    rank: int
    reported_by: int
    """The same rank, or one that received no heartbeat from it."""
    text: str

    @property
    def consequence(self) -> str:
        """The message of another rank that ends because of it."""
        what = "failed first" if self.rank == self.reported_by else "sends no heartbeat"
        return f"rank {self.rank} {what}; this rank ended with it"

    @property
    def reason(self) -> str:
        """The short form for status.json."""
        return f"rank {self.rank}: {self.text}" if self.rank == self.reported_by else self.text.split(":")[0]


class Coordinator:
    """One rank's end of the control messages; polls the store from its creation on."""

    def __init__(
        self,
        store: Store,
        rank: int,
        num_ranks: int,
        timeout_seconds: float,
        *,
        can_exit_now: Callable[[], bool],
        on_news: Callable[[], None],
    ) -> None:
        """Start the thread.

        `store`: this rank's client of a store that rank 0 hosts and nothing else uses. A rank silent for `timeout_seconds` has
        failed. `can_exit_now` is called once, when a stop is requested: may this rank exit without saving? The answer is
        binding. `on_news` is called in the thread after every change of the attributes.
        """
        self._store, self.rank, self._num_ranks = store, rank, num_ranks
        self.timeout_seconds, self._can_exit_now, self._on_news = timeout_seconds, can_exit_now, on_news
        self.stop_reason: str | None = None
        """Reason of the stop that some rank requested."""
        self.failure: Failure | None = None
        self.all_answered = threading.Event()
        """Set once every rank knows of the stop."""
        self.all_can_exit = False
        """All ranks can exit without saving."""
        self.is_exit_requested = False
        """Some rank requested that all exit at once."""
        self.detects_failures = True
        """Silence counts as failure."""
        self.is_closed = False
        self._has_news, self._has_left, self._answer = False, False, None
        self._heartbeats, self._polled_at = Heartbeats(store, rank, num_ranks), time.monotonic()
        self._store_answered_at = self._polled_at
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._thread.start()

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to stop."""
        self._tasks.put(lambda: self._publish("stop", reason))

    def request_exit(self) -> None:
        """Ask all ranks to exit at once."""
        self.is_exit_requested = True
        self._tasks.put(lambda: self._publish("exit", "1"))

    def report_failure(self, text: str) -> Failure | None:
        """Report that this rank failed; return the job's first failure, or None if the store does not answer."""

        def work() -> Failure | None:
            self._read_news()
            if self.failure is None:
                self._publish_failure(Failure(self.rank, self.rank, text))
                self._heartbeats.monitor_all()
                # Reads the last heartbeat of a rank that has died: read later, it would look like a sign of life.
                self._heartbeats.read()
            return self.failure

        return self._run_in_thread(work, SILENCE_SECONDS) or self.failure

    def record_failure(self, failure: Failure) -> None:
        """Record a failure unless there was one before."""
        if self.failure is None:
            self.failure = failure
            self._on_news()

    @property
    def is_exit_cancelled(self) -> bool:
        """True once this rank must not exit without saving, whatever it answered: another rank saves, or has failed."""
        return (self.all_answered.is_set() or self.failure is not None) and not self.all_can_exit

    def measure_host_silence(self) -> float:
        """Return the seconds since the store answered last."""
        return 0.0 if self.is_closed else time.monotonic() - self._store_answered_at

    def find_silent_ranks(self) -> tuple[list[int], float]:
        """Return (ranks without a heartbeat in SILENCE_SECONDS from now, seconds since the oldest of their last ones)."""
        begun_at = time.monotonic()
        while not self.is_closed:
            if self.measure_host_silence() > SILENCE_SECONDS:
                return [0], self.measure_host_silence()
            elapsed = time.monotonic() - begun_at
            pending = {rank: s for rank, s in self._heartbeats.measure_silence().items() if s >= elapsed}
            silent = {rank: seconds for rank, seconds in pending.items() if seconds > SILENCE_SECONDS}
            if len(silent) == len(pending):
                return sorted(silent), max(silent.values(), default=0.0)
            time.sleep(0.05)
        return [], 0.0

    def discount_pause(self, seconds: float) -> None:
        """Exclude the time for which this process was suspended from the store's silence."""
        self._store_answered_at += seconds

    def enter_barrier(self) -> None:
        """Wait on rank 0 until all ranks are about to exit; a rank that exits earlier looks failed to the others."""
        self._run_in_thread(lambda: self._store.add("ready", 1), 1.0)
        if self.rank == 0:
            self._wait_until(lambda: self._store.add("ready", 0) >= self._num_ranks)

    def leave_barrier(self) -> None:
        """Exit after rank 0 has printed the job's last message: it releases the other ranks."""
        if self.rank == 0:
            self._run_in_thread(lambda: self._store.set("release", "1"), 1.0)
            self.wait_for_others()
        else:
            self._wait_until(lambda: self._store.check(["release"]), 2 * EXIT_SECONDS)
            self._run_in_thread(self._leave, 1.0)
            time.sleep(POLL_SECONDS)

    def wait_for_others(self) -> None:
        """Keep the store, on rank 0, until the other ranks have left."""
        if self.rank == 0:
            self._run_in_thread(self._leave, 1.0)
            silence = self._heartbeats.measure_silence().values()
            num_alive = self._num_ranks - sum(seconds > SILENCE_SECONDS for seconds in silence)
            self._wait_until(lambda: self._store.add("left", 0) >= num_alive)

    def close(self) -> None:
        """End this rank's part, with consent to any stop."""
        self._run_in_thread(self._leave, 1.0)
        self.wait_for_others()
        self.is_closed = True
        self._tasks.put(None)
        self._thread.join(1.0)

    def _leave(self) -> None:
        """Mark this rank as ended, once; rank 0 continues to serve the others."""
        if self._has_left:
            return
        self._has_left, self.detects_failures = True, False
        if self.failure is None:
            self._send_answer()
        self._heartbeats.close()
        for counter in ("ready", "left"):
            self._store.add(counter, 1)
        self.is_closed = self.rank != 0

    def _run_in_thread(self, work: Callable[[], T], seconds: float) -> T | None:
        """Run `work` in the thread and return its result; None if it raised or took longer than `seconds`."""
        if self.is_closed:
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

    def _wait_until(self, condition: Callable[[], bool], seconds: float = EXIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_closed and time.monotonic() < deadline and not self._run_in_thread(condition, 1.0):
            time.sleep(0.05)

    def _run(self) -> None:
        """Run tasks, and poll in between. The body of the thread."""
        next_poll = 0.0
        try:
            while not self.is_closed:
                try:
                    task = self._tasks.get(timeout=max(0.0, next_poll - time.monotonic()))
                except queue.Empty:
                    self._poll()
                    is_busy = self.failure is not None or (self.stop_reason is not None and not self.all_answered.is_set())
                    next_poll = time.monotonic() + (BUSY_POLL_SECONDS if is_busy else POLL_SECONDS)
                    continue
                if task is None:
                    return
                task()
        except RuntimeError:
            # torch's store raises this when its host is gone. On rank 0 that happens only while the process ends.
            self.is_closed = True
            if self.rank != 0 and not self._heartbeats.has_ended(0):
                self.record_failure(Failure(0, self.rank, HOST_GONE))

    def _poll(self) -> None:
        gap = time.monotonic() - self._polled_at
        self._polled_at += gap
        if gap > PAUSE_SECONDS:
            self._heartbeats.discount_pause(gap)
        if not self._has_left:
            self._heartbeats.send()
        self._read_news()
        self._store_answered_at = time.monotonic()
        if self.failure is not None or not self.detects_failures:
            return
        is_waiting_to_exit = self._answer and not self.all_answered.is_set()
        limit = min(ANSWER_SECONDS, self.timeout_seconds) if is_waiting_to_exit else self.timeout_seconds
        silent = {rank: seconds for rank, seconds in self._heartbeats.measure_silence().items() if seconds > limit}
        if silent:
            text = format_silence(sorted(silent), max(silent.values()))
            self._publish_failure(Failure(min(silent), self.rank, text))

    def _publish(self, key: str, value: str) -> None:
        """Set a key for all ranks; the first value stays."""
        self._store.compare_set(key, "", value)
        self._store.set("news", "1")

    def _publish_failure(self, failure: Failure) -> None:
        self._publish("failure", f"{failure.rank} {failure.reported_by}\n{failure.text}")
        self._read_news()

    def _read_news(self) -> None:
        store = self._store
        if not self._has_news:
            self._has_news = store.check(["news"])
            if not self._has_news:
                return
        if self.stop_reason is None and store.check(["stop"]):
            self.stop_reason = store.get("stop").decode()
            self._on_news()
        if self.failure is None and store.check(["failure"]):
            ranks, text = store.get("failure").decode().split("\n", 1)
            rank, reported_by = map(int, ranks.split())
            self.record_failure(Failure(rank, reported_by, text))
        if self.failure is not None and self.failure.reported_by != self.rank != 0:
            self._leave()
        elif self.stop_reason is not None:
            self._send_answer()
            self._read_answers()

    def _send_answer(self) -> None:
        """Count this rank among those that can exit without saving, or among those that cannot."""
        if self._answer is None:
            self._answer = self._can_exit_now()
            self._store.add("can exit" if self._answer else "must save", 1)

    def _read_answers(self) -> None:
        store = self._store
        if not self.all_answered.is_set() and self.failure is None:
            num_exiting, num_saving = store.add("can exit", 0), store.add("must save", 0)
            if num_exiting + num_saving >= self._num_ranks:
                self.all_can_exit = num_saving == 0
                self.all_answered.set()
                self._on_news()
        if not self.is_exit_requested and store.check(["exit"]):
            self.is_exit_requested = True
            self._on_news()
