"""When a run has to end before its end, and that it does: signals, a vanished launcher, time limits, dead or failed ranks.

The main thread asks `PreemptionHandler.is_stopping` at every step, where all ranks vote, save and leave. But it may be in a collective, a
compiler or an import for long, so a second thread receives the signals, and a third (peers.py) tells the other ranks.

before the first step   all end as soon as each of them knows: there is nothing to save
while training          the main thread has the grace time to save and leave; then it is ended
a second signal         all end at once
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from agnews_dist.distributed.coordinator import ANSWER_SECONDS, AWAY_SECONDS, Coordinator, Failure
from agnews_dist.distributed.heartbeat import HOST_GONE, Store, silence_message
from agnews_dist.distributed.world import LAUNCHER_VARIABLES, World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
TICK_SECONDS = 0.2
AGAIN_SECONDS = 2.0
"""A signal this much after the first is a second one: a terminal's Ctrl-C comes twice, directly and through the launcher."""
FAILING_SECONDS = 5.0
"""In which the main thread may end by itself after another rank failed."""
LAST_WORDS_SECONDS = 3.0
LAUNCHER_GONE = "the launcher is gone"
TRY_AGAIN_LATER = 75
"""EX_TEMPFAIL of sysexits.h."""


def preempted_exit_code(environ: Mapping[str, str]) -> int:
    """Of a process that was asked to stop: 75, but 0 under torchrun, which would take any other for a failure."""
    return 0 if "TORCHELASTIC_RUN_ID" in environ else TRY_AGAIN_LATER


def slurm_seconds_left(environ: Mapping[str, str], now: float) -> float | None:
    """Until the job's time limit, at the time `now` (Unix seconds); None: no job, or no limit that could be true."""
    try:
        left = int(environ["SLURM_JOB_END_TIME"]) - now
    except (KeyError, ValueError):
        return None
    return left if left > 0 else None


class PreemptionHandler:
    """One per process, from `start()` to `close()`; both are called in the main thread."""

    def __init__(self, environ: Mapping[str, str], *, grace_seconds: float = 25.0) -> None:
        """`grace_seconds`: what the main thread has to save and leave; torchrun kills after 30."""
        rank, size = (environ.get(name, "") for name in LAUNCHER_VARIABLES[:2])
        self._environ, self._grace_seconds = environ, grace_seconds
        self._num_ranks = int(size) if size.isdecimal() else 1
        # Without a launcher a run may outlive the shell that started it.
        self._launcher = os.getppid() if rank else None
        self.last_words: Callable[[str, str], None] | None = None
        """Called as last_words(state, reason) before the process is ended; state: preempted or failed."""
        self.nothing_to_save = True
        """Until `saves_from_now()`."""
        self._coordinator: Coordinator | None = None
        self._asked: str | None = None
        self._deadline, self._why = float("inf"), ""
        self._known_at, self._failed_at, self._signalled_at = float("inf"), float("inf"), float("inf")
        self._is_hurried, self._is_leaving, self._is_failing, self._is_closed = False, False, False, False
        self._has_agreed, self._is_ending, self._has_told = False, False, False
        self._lock = threading.Lock()
        self._before: list[tuple[signal.Signals, Any]] = []
        self._wakeup_before: int | None = None

    def start(self) -> None:
        """Watch from now on."""
        self._receiver, self._sender = socket.socketpair()
        self._receiver.settimeout(TICK_SECONDS)
        self._sender.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            # Python tells a handler only between two instructions of the main thread; the numbers come at once.
            self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                self._before.append((number, signal.signal(number, lambda _number, _frame: None)))
                # Libraries that do not expect a system call to be interrupted are many.
                signal.siginterrupt(number, False)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The story has ended by itself: nothing is watched any more, and signals do what they did before."""
        self._is_closed = True
        if self._coordinator is not None:
            self._coordinator.close()
        for number, handler in self._before:
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._wakeup_before is not None:
            signal.set_wakeup_fd(self._wakeup_before)
        self._wake()
        self._thread.join()
        self._receiver.close()
        self._sender.close()

    @property
    def asked(self) -> str | None:
        """Why the run is to stop, once this rank knows of it: `SIGTERM`, `the launcher is gone`, or what a deadline says."""
        return self._asked

    @property
    def is_stopping(self) -> bool:
        """Whether the run is to stop."""
        return self._asked is not None

    def set_deadline(self, seconds_from_now: float, why: str) -> None:
        """Ask for a stop then, `why`; of several the earliest counts."""
        self._deadline, self._why = min((self._deadline, self._why), (time.monotonic() + seconds_from_now, why))

    def meet(self, store: Store, rank: int, num_ranks: int, timeout_seconds: float) -> None:
        """Share all from now on with the other ranks, each of which calls this with its client of a store that rank 0 hosts and
        nobody else uses; a rank silent for `timeout_seconds` has failed.
        """
        self._num_ranks = num_ranks
        coordinator = Coordinator(
            store, rank, num_ranks, timeout_seconds, is_early=self._may_end_early, wake=self._wake
        )
        with self._lock:
            self._coordinator = coordinator
            if self._asked is not None:
                coordinator.stop(self._asked)

    def saves_from_now(self) -> None:
        """Training begins: a stop is the main thread's own from now on, at a step after which all ranks leave."""
        with self._lock:
            self.nothing_to_save = False
        # If this rank has said that it may end at once, it must not begin unless another has begun.
        self._wait_if_ending()

    def leaving(self) -> None:
        """The main thread leaves, together with all others: ranks may fall silent, but the grace time goes on."""
        self._is_leaving = True
        self._known_at = min(self._known_at, time.monotonic())
        if self._coordinator is not None:
            self._coordinator.judges = False

    def failed(self, error_text: str) -> str | None:
        """What this rank is to say that ends with an error of which `error_text` is the gist; None: all about it, it is the
        first that failed, or cannot ask.
        """
        self._is_failing, coordinator = True, self._coordinator
        if coordinator is None:
            return None
        # Other ranks may have ended already because of the same stop, which looks like a failure from here.
        self._wait_if_ending()
        failure = coordinator.fail(error_text)
        if failure is not None and failure.by != coordinator.rank:
            return failure.consequence
        if failure is not None and failure.rank != coordinator.rank:
            return self._tell_once(f"error: {failure.text}") or failure.consequence
        ranks, seconds = coordinator.look_for_life()
        if not ranks:
            return None
        told = f"error: {silence_message(ranks, seconds)}"
        if seconds > coordinator.timeout_seconds / 2:
            return f"{told} (Here it ended with {error_text})"
        # Perhaps they are only slow, so the error itself is told as well.
        self._say(told)
        return None

    def _say(self, text: str) -> None:
        """In a single write: the ranks share standard error."""
        rank = self._coordinator.rank if self._coordinator is not None else 0
        sys.stderr.write(f"{World(rank=rank, num_ranks=self._num_ranks).label} {text}\n")
        sys.stderr.flush()

    def _tell_once(self, text: str) -> str | None:
        with self._lock:
            has_told, self._has_told = self._has_told, True
        return None if has_told else text

    def _may_end_early(self) -> bool:
        """What this rank answers to a stop; it keeps to it."""
        with self._lock:
            self._has_agreed = self.nothing_to_save
            return self._has_agreed

    def _wait_if_ending(self) -> None:
        while self._is_ending or (self._has_agreed and not (self._coordinator and self._coordinator.agreement_is_off)):
            time.sleep(0.02)

    def _learn(self, reason: str) -> None:
        """The first reason counts; what a launcher sends because a rank failed is none."""
        with self._lock:
            if self._asked is not None or (self._coordinator is not None and self._coordinator.failure is not None):
                return
            self._known_at = min(self._known_at, time.monotonic())
            self._asked = reason
            if self._coordinator is not None:
                self._coordinator.stop(reason)

    def _wake(self) -> None:
        with suppress(OSError):  # full, or closed: then nobody sleeps
            self._sender.send(b"\0")

    def _run(self) -> None:
        seen_at = time.monotonic()
        while not self._is_closed:
            numbers = b""
            with suppress(TimeoutError):
                numbers = self._receiver.recv(4096)
            now = time.monotonic()
            if now - seen_at > AWAY_SECONDS and self._coordinator is not None:
                self._coordinator.forgive(now - seen_at)
            seen_at = now
            self._look(numbers, now)
            if not self._is_closed:
                self._enforce(now)

    def _look(self, numbers: bytes, now: float) -> None:
        for number in numbers:
            if number not in SIGNALS:
                continue  # another program's handler
            if self._signalled_at == float("inf"):
                self._signalled_at = now
            elif now - self._signalled_at >= AGAIN_SECONDS:
                self._is_hurried = True
            self._learn(signal.Signals(number).name)
        if now >= self._deadline:
            self._learn(self._why)
        if self._launcher is not None and os.getppid() != self._launcher:
            self._learn(LAUNCHER_GONE)
        coordinator = self._coordinator
        if coordinator is None:
            return
        if coordinator.reason is not None:
            self._learn(coordinator.reason)
        if coordinator.rank != 0 and coordinator.host_silence() > coordinator.timeout_seconds and coordinator.judges:
            coordinator.note(Failure(0, coordinator.rank, silence_message([0], coordinator.host_silence())))

    def _enforce(self, now: float) -> None:
        """End the process if it is time to."""
        coordinator, waited = self._coordinator, now - self._known_at
        is_over_time = waited > self._grace_seconds
        if coordinator is None:
            # Whose launcher is gone need not meet the others: they see it too, and the store went with it.
            is_alone = self._num_ranks == 1 or self._asked == LAUNCHER_GONE
            if self._is_hurried or is_over_time or (is_alone and self._asked and self._may_end_early()):
                self._end("preempted" if is_alone else "failed", self._asked or "")
            return
        state = "preempted" if coordinator.all_know.is_set() else "failed"
        if self._is_hurried and not coordinator.is_hurried:
            coordinator.hurry()
        if coordinator.all_early:
            self._end(state, self._asked or "")
        elif coordinator.failure is not None:
            self._enforce_failure(coordinator.failure, now)
        elif coordinator.is_hurried or is_over_time:
            self._end(state, self._asked or "")
        elif self._has_agreed and not coordinator.all_know.is_set() and waited > 2 * ANSWER_SECONDS:
            self._end("failed", f"{self._asked}, which not every rank has heard of")

    def _enforce_failure(self, failure: Failure, now: float) -> None:
        assert self._coordinator is not None
        self._failed_at = min(self._failed_at, now)
        is_mine = failure.by == self._coordinator.rank
        is_verdict = is_mine and failure.rank != self._coordinator.rank
        patience = self._grace_seconds if self._is_failing or self._is_leaving else FAILING_SECONDS
        if is_verdict and failure.text != HOST_GONE and not self._is_failing:
            patience = 0.0
        if self._is_hurried or now - self._failed_at >= patience:
            told = self._tell_once(f"error: {failure.text}") if is_verdict else None if is_mine else failure.consequence
            self._end("failed", failure.reason, told)

    def _end(self, state: str, reason: str, line: str | None = None) -> NoReturn:
        """End the process here and now, wherever its main thread is."""
        self._is_ending = True
        code = preempted_exit_code(self._environ) if state == "preempted" else 1

        def speak() -> None:
            if line is not None:
                self._say(line)
            try:
                if self.last_words is not None:
                    self.last_words(state, reason)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()

        try:
            coordinator = self._coordinator
            if coordinator is not None and state == "preempted":
                coordinator.gather()
            speaker = threading.Thread(target=speak, daemon=True)
            speaker.start()
            speaker.join(LAST_WORDS_SECONDS)
            if coordinator is not None and state == "preempted":
                coordinator.disperse()
            elif coordinator is not None:
                coordinator.see_off()
        finally:
            os._exit(code)
