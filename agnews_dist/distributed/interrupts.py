"""Stopping a run inside of another program, such as a notebook: the process is not the run's, and nothing here ends it."""

import signal
import threading
import time
from types import FrameType

from agnews_dist.distributed.coordinator import TRAINING
from agnews_dist.distributed.preemption import PreemptionHandler
from agnews_dist.distributed.world import print_line


class InterruptHandler(PreemptionHandler):
    """Handler for one rank without a launcher: Ctrl-C, or a notebook's interrupt, asks the training to save and stop.

    A second one, or one before the first step, raises KeyboardInterrupt at once. Other signals are the program's. No thread
    watches. Outside of the main thread no signal handler can be installed, and only the time limits count.
    """

    def __init__(self) -> None:
        super().__init__({}, begin_time=time.time())

    def start(self) -> None:
        """Receive interrupts from now on."""
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if previous not in (None, signal.SIG_IGN):
                signal.signal(signal.SIGINT, self._interrupt)
                self._restore_signals.callback(signal.signal, signal.SIGINT, previous)

    def close(self) -> None:
        """Restore the previous signal handler."""
        self._restore_signals.close()

    @property
    def is_stopping(self) -> bool:
        """True once the run is to stop."""
        if self.stop_reason is None and time.monotonic() >= self._deadline:
            self.stop_reason = self._deadline_reason
        return self.stop_reason is not None

    @property
    def is_interrupted(self) -> bool:
        """True if Ctrl-C asked for the stop."""
        return self.stop_reason == signal.SIGINT.name

    def _interrupt(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._phase != TRAINING or self.stop_reason is not None:
            raise KeyboardInterrupt
        self.stop_reason = signal.SIGINT.name
        print_line("interrupted: the training saves a checkpoint and stops; interrupt it again to stop at once")
