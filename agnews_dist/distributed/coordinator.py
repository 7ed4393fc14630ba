"""What the ranks tell each other beside their collectives: who was asked to stop, who failed first, who is still alive.

Through a store that rank 0 hosts, in a thread of its own: the main thread may be in a collective that never ends, and a store
whose host hangs lets its callers wait for ever.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from agnews_dist.distributed.heartbeat import HOST_GONE, Heartbeats, Store, silence_message

T = TypeVar("T")

ROUND_SECONDS = 0.5
BUSY_ROUND_SECONDS = 0.1
"""Between two rounds when there is something that all shall learn."""
ANSWER_SECONDS = 5.0
"""Within which every rank answers to a stop, where nothing is lost by ending without it."""
LIFE_SECONDS = 3.0
"""Without a beat, while somebody asks: longer than our threads wait for the interpreter lock."""
AWAY_SECONDS = 1.5
"""A thread of ours that was not run for so long belongs to a process that was suspended."""
PARTING_SECONDS = 4.0
"""How long the host of the store stays for the others: one of them may be looking for signs of life."""


@dataclass(frozen=True)
class Failure:
    """The first one of the job."""

    rank: int
    """Which failed."""
    by: int
    """Who says so: the rank itself, or one that has heard nothing of it."""
    text: str

    @property
    def consequence(self) -> str:
        """What a rank says that ends because of it."""
        what = "failed first" if self.rank == self.by else "gives no sign of life"
        return f"rank {self.rank} {what}; this rank ended with it"

    @property
    def reason(self) -> str:
        """In short, for status.json."""
        return f"rank {self.rank}: {self.text}" if self.rank == self.by else self.text.split(":")[0]


class Coordinator:
    """One rank's part of the conversation, which begins with its creation."""

    def __init__(
        self,
        store: Store,
        rank: int,
        num_ranks: int,
        timeout_seconds: float,
        *,
        is_early: Callable[[], bool],
        wake: Callable[[], None],
    ) -> None:
        """A rank silent for `timeout_seconds` has failed. `is_early`: asked once, when a stop is known, whether this rank may
        end at once; `wake`: called after news, in the thread.
        """
        self._store, self.rank, self._num_ranks = store, rank, num_ranks
        self.timeout_seconds, self._is_early, self._wake = timeout_seconds, is_early, wake
        self.reason: str | None = None
        """Of the stop that all are asked for."""
        self.failure: Failure | None = None
        self.all_know = threading.Event()
        """Set once every rank knows of the stop."""
        self.all_early, self.is_hurried = False, False
        """All may end at once; all shall."""
        self.judges = True
        """Whether silence is a failure."""
        self.is_over = False
        """Nobody is asked or answers any more."""
        self._has_news, self._has_parted, self._answered_early = False, False, None
        self._heartbeats, self._begun_at = Heartbeats(store, rank, num_ranks), time.monotonic()
        self._answered_at = self._begun_at
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def stop(self, reason: str) -> None:
        """Let all know that they are to stop."""
        self._tasks.put(lambda: self._publish("reason", reason))

    def hurry(self) -> None:
        """Let all end at once."""
        self.is_hurried = True
        self._tasks.put(lambda: self._publish("hurry", "1"))

    def fail(self, text: str) -> Failure | None:
        """Claim to be the first that failed; the failure that was. None: nobody can be asked."""

        def work() -> Failure | None:
            self._read_news()
            if self.failure is None:
                self._publish_failure(Failure(self.rank, self.rank, text))
                self._heartbeats.hear_all()
                # A dead rank's last beat, read only after this, would be taken for a sign of life.
                self._heartbeats.hear()
            return self.failure

        return self._ask(work, LIFE_SECONDS) or self.failure

    def note(self, failure: Failure) -> None:
        """A failure that this rank knows of."""
        if self.failure is None:
            self.failure = failure
            self._wake()

    @property
    def agreement_is_off(self) -> bool:
        """Whether the ranks do not end at once after all: one has something to save, or one has failed."""
        return (self.all_know.is_set() or self.failure is not None) and not self.all_early

    def host_silence(self) -> float:
        """Seconds since the store answered last."""
        return 0.0 if self.is_over else time.monotonic() - self._answered_at

    def look_for_life(self) -> tuple[list[int], float]:
        """(ranks that give no sign of it, seconds since the last), found out within LIFE_SECONDS."""
        asked_at = time.monotonic()
        while not self.is_over:
            if self.host_silence() > LIFE_SECONDS:
                return [0], self.host_silence()
            since = time.monotonic() - asked_at
            waiting = {rank: seconds for rank, seconds in self._heartbeats.silences().items() if seconds >= since}
            silent = {rank: seconds for rank, seconds in waiting.items() if seconds > LIFE_SECONDS}
            if len(silent) == len(waiting):
                return sorted(silent), max(silent.values(), default=0.0)
            time.sleep(0.05)
        return [], 0.0

    def forgive(self, seconds: float) -> None:
        """This process was away: that is not the host's silence."""
        self._answered_at += seconds

    def gather(self) -> None:
        """Before all end together: until rank 0 has spoken nobody leaves, as to its main thread that would be a failure."""
        self._ask(lambda: self._store.add("ready", 1), 1.0)
        if self.rank == 0:
            self._wait(lambda: self._store.add("ready", 0) >= self._num_ranks)

    def disperse(self) -> None:
        """Rank 0 has spoken, and leaves first."""
        if self.rank == 0:
            self._ask(lambda: self._store.set("spoken", "1"), 1.0)
            self.see_off()
        else:
            self._wait(lambda: self._store.check(["spoken"]), 2 * PARTING_SECONDS)
            self._ask(self._goodbye, 1.0)
            time.sleep(ROUND_SECONDS)

    def see_off(self) -> None:
        """On rank 0: stay for the others, with the store, until they have ended or know why they shall."""
        if self.rank == 0:
            self._ask(self._goodbye, 1.0)
            present = self._num_ranks - sum(seconds > LIFE_SECONDS for seconds in self._heartbeats.silences().values())
            self._wait(lambda: self._store.add("gone", 0) >= present)

    def close(self) -> None:
        """This rank has ended by itself, and agrees to whatever comes."""
        self._ask(self._goodbye, 1.0)
        self.see_off()
        self.is_over = True
        self._tasks.put(None)
        self._thread.join(1.0)

    def _goodbye(self) -> None:
        """Once. Only rank 0 talks on, with those that have not said it."""
        if self._has_parted:
            return
        self._has_parted, self.judges = True, False
        if self.failure is None:
            self._answer()
        self._heartbeats.close()
        for counter in ("ready", "gone"):
            self._store.add(counter, 1)
        self.is_over = self.rank != 0

    def _ask(self, work: Callable[[], T], seconds: float) -> T | None:
        """Have the thread do `work`; None: it could not in time."""
        if self.is_over:
            return None
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)
                raise

        self._tasks.put(task)
        deadline = time.monotonic() + seconds
        while not future.done() and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        # What an exception means is the thread's to know.
        return future.result() if future.done() and future.exception() is None else None

    def _wait(self, condition: Callable[[], bool], seconds: float = PARTING_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_over and time.monotonic() < deadline and not self._ask(condition, 1.0):
            time.sleep(0.05)

    def _run(self) -> None:
        next_round = 0.0
        try:
            while not self.is_over:
                try:
                    task = self._tasks.get(timeout=max(0.0, next_round - time.monotonic()))
                except queue.Empty:
                    self._round()
                    is_busy = self.failure is not None or (self.reason is not None and not self.all_know.is_set())
                    next_round = time.monotonic() + (BUSY_ROUND_SECONDS if is_busy else ROUND_SECONDS)
                    continue
                if task is None:
                    return
                task()
        except RuntimeError:
            # All that torch's store raises is one: its host is gone. On rank 0 it ends with the process only.
            self.is_over = True
            if self.rank != 0 and not self._heartbeats.has_closed(0):
                self.note(Failure(0, self.rank, HOST_GONE))

    def _round(self) -> None:
        away = time.monotonic() - self._begun_at
        self._begun_at += away
        if away > AWAY_SECONDS:
            self._heartbeats.forgive(away)
        if not self._has_parted:
            self._heartbeats.beat()
        self._read_news()
        self._answered_at = time.monotonic()
        if self.failure is not None or not self.judges:
            return
        waits = self._answered_early and not self.all_know.is_set()
        limit = min(ANSWER_SECONDS, self.timeout_seconds) if waits else self.timeout_seconds
        silent = {rank: seconds for rank, seconds in self._heartbeats.silences().items() if seconds > limit}
        if silent:
            text = silence_message(sorted(silent), max(silent.values()))
            self._publish_failure(Failure(min(silent), self.rank, text))

    def _publish(self, key: str, value: str) -> None:
        """The first one stays."""
        self._store.compare_set(key, "", value)
        self._store.set("news", "1")

    def _publish_failure(self, failure: Failure) -> None:
        self._publish("failure", f"{failure.rank} {failure.by}\n{failure.text}")
        self._read_news()

    def _read_news(self) -> None:
        store = self._store
        if not self._has_news:
            self._has_news = store.check(["news"])
            if not self._has_news:
                return
        if self.reason is None and store.check(["reason"]):
            self.reason = store.get("reason").decode()
            self._wake()
        if self.failure is None and store.check(["failure"]):
            ranks, text = store.get("failure").decode().split("\n", 1)
            rank, by = map(int, ranks.split())
            self.note(Failure(rank, by, text))
        if self.failure is not None and self.failure.by != self.rank != 0:
            self._goodbye()
        elif self.reason is not None:
            self._answer()
            self._read_answers()

    def _answer(self) -> None:
        if self._answered_early is None:
            self._answered_early = self._is_early()
            self._store.add("early" if self._answered_early else "late", 1)

    def _read_answers(self) -> None:
        store = self._store
        if not self.all_know.is_set() and self.failure is None:
            early, late = store.add("early", 0), store.add("late", 0)
            if early + late >= self._num_ranks:
                self.all_early = late == 0
                self.all_know.set()
                self._wake()
        if not self.is_hurried and store.check(["hurry"]):
            self.is_hurried = True
            self._wake()
