"""Stopping a run before its end: signals, time limits, a vanished launcher, dead or failed ranks.

The main thread reads `PreemptionHandler.is_stopping` at every step, where all ranks vote, save and exit. It may be busy for
long in a collective, a compiler or an import. So a second thread receives the signals, and a third one (coordinator.py) informs
the other ranks.

before the first step   all ranks exit as soon as each of them knows: there is nothing to save
during training         the main thread has the grace time to save and exit; then the process is ended
at a second signal      all ranks exit at once
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import NoReturn

from agnews_dist.distributed.coordinator import (
    HOST_GONE,
    SILENCE_SECONDS,
    STOP,
    TRAINING,
    Coordinator,
    Failure,
    Store,
    silent_ranks,
)
from agnews_dist.distributed.world import LAUNCHER_VARIABLES, World, print_line

SIGNALS = tuple(signal.Signals[f"SIG{name}"] for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2"))
TICK_SECONDS = 0.2
"""Interval between two checks of the launcher, the deadline and the other ranks."""
REPEAT_SECONDS = 2.0
"""Age of the first signal from which another one counts: a terminal sends Ctrl-C directly and through the launcher."""
FAILURE_GRACE_SECONDS = 5.0
"""Time for the main thread to end by itself after another rank failed."""
CALLBACK_SECONDS = 3.0
"""Time for `before_exit`."""
LAUNCHER_GONE = "the launcher is gone"
EXIT_TEMPFAIL = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""


def preempted_exit_code(environ: Mapping[str, str]) -> int:
    """Return the exit code of a stopped process: 75, or 0 under torchrun, which treats every other code as a failure."""
    return 0 if "TORCHELASTIC_RUN_ID" in environ else EXIT_TEMPFAIL


class PreemptionHandler:
    """The process's handler of stops and failures, from `start()` to `close()`; both are called in the main thread."""

    def __init__(self, environ: Mapping[str, str], *, grace_seconds: float = 25.0, begin_time: float | None = None) -> None:
        """Prepare. Call `start` next.

        `grace_seconds`: time for the main thread to save and exit; torchrun kills after 30 s. `begin_time`: Unix time at which
        the run began, for its own time limit; None: with the process.
        """
        self.begin_time = begin_time
        rank, size = (environ.get(name, "") for name in LAUNCHER_VARIABLES[:2])
        self._environ, self._grace_seconds = environ, grace_seconds
        self._num_ranks = int(size) if size.isdecimal() else 1
        # Without a launcher a run may outlive the shell that started it.
        self._launcher = os.getppid() if rank else None
        self.before_exit: Callable[[str, str], None] | None = None
        """Called as before_exit(state, reason) before this handler ends the process; state: preempted or failed."""
        self.stop_reason: str | None = None
        """Reason of the stop that this rank knows of: `SIGTERM`, `the launcher is gone`, or the deadline's."""
        self._coordinator: Coordinator | None = None
        self._phase = ""
        """The phase before `connect`; see coordinator.py."""
        self._deadline, self._deadline_reason = float("inf"), ""
        self._stopping_since, self._failed_since, self._signalled_at = float("inf"), float("inf"), float("inf")
        self._is_exiting, self._has_failed, self._is_closed, self._must_exit_now = False, False, False, False
        self._is_ending_process = False
        self._lock = threading.Lock()
        self._restore_signals = ExitStack()

    def start(self) -> None:
        """Receive signals from now on."""
        self._receiver, self._sender = socket.socketpair()
        self._receiver.settimeout(TICK_SECONDS)
        self._sender.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            # Python calls a handler only between two instructions of the main thread; the wakeup fd gets numbers at once.
            previous_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
            self._restore_signals.callback(signal.set_wakeup_fd, previous_fd)
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup: the run outlives its terminal
                previous = signal.signal(number, lambda _number, _frame: None)
                self._restore_signals.callback(signal.signal, number, signal.SIG_DFL if previous is None else previous)
                # Many libraries do not expect a system call to be interrupted.
                signal.siginterrupt(number, False)
        self._thread = threading.Thread(target=self._run, name="preemption", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Restore the previous signal handlers: the command has ended by itself."""
        self._is_closed = True
        if self._coordinator is not None:
            self._coordinator.close()
        self._restore_signals.close()
        self._wake()
        self._thread.join()
        self._receiver.close()
        self._sender.close()

    @property
    def is_stopping(self) -> bool:
        """True once the run is to stop."""
        return self.stop_reason is not None

    def set_deadline(self, seconds_from_now: float, reason: str) -> None:
        """Request a stop at a later time; the earliest of several deadlines counts."""
        deadline = (time.monotonic() + seconds_from_now, reason)
        self._deadline, self._deadline_reason = min((self._deadline, self._deadline_reason), deadline)

    def connect(self, store: Store, rank: int, num_ranks: int, timeout_seconds: float) -> None:
        """Exchange stops and failures with the other ranks from now on; every rank calls this. See `Coordinator`."""
        self._num_ranks = num_ranks
        with self._lock:
            self._coordinator = Coordinator(store, rank, num_ranks, timeout_seconds, self._wake)

    def begin_training(self) -> None:
        """Leave a stop to the main thread from now on: it saves and exits at a step, together with all ranks."""
        if self._enter(TRAINING).startswith(STOP):
            self._wait_for_end()

    def begin_exit(self) -> None:
        """Note that the main thread saves and exits together with all ranks: the grace time runs."""
        self._is_exiting = True
        self._stopping_since = min(self._stopping_since, time.monotonic())

    def report_failure(self, error_text: str, *, is_own: bool) -> str | None:
        """Report that this rank ends with an error to the other ranks; return the one-line message to print instead of it.

        None: print the error in full, as it was the job's first or the other ranks cannot be reached. `is_own`: no other rank's
        end can be its cause.
        """
        self._has_failed, coordinator = True, self._coordinator
        if coordinator is None:
            return None
        own = Failure(coordinator.rank, coordinator.rank, error_text)
        failure = own if is_own else coordinator.explain(error_text)
        # The others may have exited because of a stop, which looks like a failure from here.
        if not coordinator.phase.startswith(STOP):
            failure = coordinator.publish(failure)
        if self._is_ending_process or coordinator.phase.startswith(STOP):
            if is_own:
                self._print(f"error: {error_text}")
            self._has_failed = False  # the second thread need not leave this one time to exit
            self._wait_for_end()
        if failure.reported_by != coordinator.rank:
            return failure.consequence
        if failure.rank == coordinator.rank:
            return None
        return f"error: {failure.text} (Here it ended with {error_text})"

    def _print(self, text: str) -> None:
        rank = self._coordinator.rank if self._coordinator is not None else 0
        print_line(f"{World(rank=rank, num_ranks=self._num_ranks).label} {text}")

    def _wait_for_end(self) -> NoReturn:
        """Block the main thread: the second one ends the process."""
        while True:
            time.sleep(1.0)

    def _enter(self, phase: str) -> str:
        """Enter a phase of the job; return the one that it is in."""
        with self._lock:
            if self._coordinator is None:
                self._phase = self._phase or phase
                return self._phase
        return self._coordinator.enter(phase)

    def _request_stop(self, reason: str) -> None:
        """Record a stop, which `_run` spreads. The first reason counts; a launcher's signal after a failure is not a stop."""
        coordinator = self._coordinator
        if self.stop_reason is not None or (coordinator is not None and coordinator.failure is not None):
            return
        self._stopping_since = min(self._stopping_since, time.monotonic())
        self.stop_reason = reason

    def _wake(self) -> None:
        with suppress(OSError):  # the pipe is full or closed: the thread is awake
            self._sender.send(b"\0")

    def _run(self) -> None:
        """Receive and enforce until `close`. The body of the second thread."""
        last_round = time.monotonic()
        while not self._is_closed:
            numbers = b""
            with suppress(TimeoutError):
                numbers = self._receiver.recv(4096)
            now = time.monotonic()
            self._read_signals(numbers, now)
            if now >= self._deadline:
                self._request_stop(self._deadline_reason)
            if self._launcher is not None and os.getppid() != self._launcher:
                self._request_stop(LAUNCHER_GONE)
            coordinator = self._coordinator
            if coordinator is not None:
                coordinator.count_tick(now - last_round)
                if coordinator.phase.startswith(STOP):
                    self._request_stop(coordinator.phase.removeprefix(STOP))
                elif self.stop_reason is not None and not coordinator.phase:
                    coordinator.enter(STOP + self.stop_reason)
            last_round = now
            if not self._is_closed:
                self._enforce(now)

    def _read_signals(self, numbers: bytes, now: float) -> None:
        for number in numbers:
            if number not in SIGNALS:
                continue  # a signal that other code handles, or a wake-up
            if self._signalled_at == float("inf"):
                self._signalled_at = now
            elif now - self._signalled_at >= REPEAT_SECONDS:
                self._must_exit_now = True
            self._request_stop(signal.Signals(number).name)

    def _enforce(self, now: float) -> None:
        """End the process if the main thread must not, or does not, do so itself."""
        coordinator, reason = self._coordinator, self.stop_reason or ""
        is_overdue = self._must_exit_now or now - self._stopping_since > self._grace_seconds
        if coordinator is None:
            # If the launcher is gone, the other ranks see that themselves; the store ended with it.
            is_alone = self._num_ranks == 1 or self.stop_reason == LAUNCHER_GONE
            if is_overdue or (is_alone and self.is_stopping and self._enter(STOP).startswith(STOP)):
                self._end_process("preempted" if is_alone else "failed", reason)
        elif coordinator.failure is not None:
            self._enforce_failure(coordinator, coordinator.failure, now)
        elif coordinator.phase.startswith(STOP):
            # A launcher also sends signals because a rank is dead.
            if silent := coordinator.call_roll():
                coordinator.publish(silent_ranks(silent, SILENCE_SECONDS, coordinator.rank))
            elif coordinator.failure is None:
                self._end_process("preempted", reason)
        elif is_overdue and not coordinator.enter(STOP + reason, force=True) and coordinator.failure is None:
            self._end_process("failed", f"{reason}, and rank 0 does not answer")

    def _enforce_failure(self, coordinator: Coordinator, failure: Failure, now: float) -> None:
        self._failed_since = min(self._failed_since, now)
        is_reporter = failure.reported_by == coordinator.rank
        is_about_other = is_reporter and failure.rank != coordinator.rank
        grace = self._grace_seconds if self._has_failed or self._is_exiting else FAILURE_GRACE_SECONDS
        if is_about_other and failure.text != HOST_GONE and not self._has_failed:
            grace = 0.0  # a rank is silent: the main thread may wait for it for ever
        if self._must_exit_now or now - self._failed_since >= grace:
            # The main thread prints an error that it has reported itself.
            own = None if self._has_failed else f"error: {failure.text}"
            self._end_process("failed", failure.reason, own if is_reporter else failure.consequence)

    def _end_process(self, state: str, reason: str, message: str | None = None) -> NoReturn:
        """End the process now, wherever its main thread is."""
        self._is_ending_process = True
        code = preempted_exit_code(self._environ) if state == "preempted" else 1

        def report() -> None:
            if message is not None:
                self._print(message)
            try:
                if self.before_exit is not None:
                    self.before_exit(state, reason)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()

        try:
            # In a thread of its own: it may hang in a lock that the main thread holds.
            reporter = threading.Thread(target=report, daemon=True)
            reporter.start()
            reporter.join(CALLBACK_SECONDS)
            if self._coordinator is not None:
                # After a stop rank 0 prints the last message of the job: a launcher may end the job with the first rank.
                self._coordinator.leave(after_main=state == "preempted")
        finally:
            os._exit(code)
