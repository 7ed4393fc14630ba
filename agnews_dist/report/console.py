"""Console: live display on a terminal, plain lines elsewhere. `Sinks` passes events to console and event log."""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Literal, Protocol

import rich.console

from agnews_dist.events import DataChecked, Emit, EvalDone, Event, NonFinite, Predicted, RunDone, Warned
from agnews_dist.report.formatting import can_draw, create_output
from agnews_dist.report.plain import PlainLines
from agnews_dist.report.terminal import TerminalDisplay

Verbosity = Literal["quiet", "normal", "verbose"]
TICK_SECONDS = 1.0
"""Time between two looks whether the console has been silent for too long."""


def create_console(
    out: rich.console.Console | None = None,
    *,
    verbosity: Verbosity = "normal",
    every_step: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> "Console":
    """Create the sink that shows events to a person. `close` it, also after an exception, to restore the terminal.

    A terminal gets panels, tables and a live display. A file, a pipe, a notebook, a dumb terminal, one without Unicode, or any
    with `NO_COLOR` gets plain lines without control codes.

    Args:
        out: default standard output.
        verbosity: `quiet`: warnings and results alone; `verbose`: every fact, parameter, class and checkpoint.
        every_step: print every step.
        clock: seconds, in tests.
    """
    out = out or create_output(sys.stdout)
    is_verbose = verbosity == "verbose"
    if can_draw(out) and not out.no_color:
        display = TerminalDisplay(out, is_verbose=is_verbose, every_step=every_step, clock=clock)
    else:
        file = out.file
        display = PlainLines(file, is_verbose=is_verbose, every_step=every_step, clock=clock)  # pyright: ignore[reportArgumentType] # IO[str] is a TextIO
    return Console(display, is_quiet=verbosity == "quiet")


class Console:
    """Sink that shows events to a person, from any thread.

    A thread looks once a second whether the display has something to show without an event, so that long work is not silent.
    It draws nothing while events come.
    """

    def __init__(self, display: PlainLines | TerminalDisplay, *, is_quiet: bool = False) -> None:
        self.display = display
        self._is_quiet = is_quiet
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._is_closed = threading.Event()

    def show_memory(self, measure_memory: Callable[[], int]) -> None:
        """Show the bytes that `measure_memory` returns. By default they are the resident memory of this process."""
        self.display.measure_memory = measure_memory

    def __call__(self, event: Event) -> None:
        """Show one event. A quiet console shows warnings, and results outside of a training."""
        if self._is_quiet and not is_essential(event):
            return
        with self._lock:
            self.display(event)
        if self._thread is None and not self._is_quiet:
            self._thread = threading.Thread(target=self._tick_until_closed, name="console", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Restore the terminal. Further calls do nothing."""
        self._is_closed.set()
        with self._lock:
            self.display.close()
        if self._thread is not None:
            # With a limit, as a signal handler may close the console while the frame below it holds the lock.
            self._thread.join(1.0)

    def _tick_until_closed(self) -> None:
        while not self._is_closed.wait(TICK_SECONDS):
            with self._lock, suppress(OSError):
                if not self._is_closed.is_set():
                    self.display.tick()


def is_essential(event: Event) -> bool:
    """Return whether also a quiet console shows an event: a warning, or a result that no later one repeats."""
    is_result = isinstance(event, RunDone | Predicted) or (isinstance(event, EvalDone) and not event.epoch)
    return is_result or isinstance(event, Warned | DataChecked | NonFinite)


class Sink(Protocol):
    """Consumer of events. `close` releases files and the terminal."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Sinks(ExitStack):
    """Sink that passes every event to its sinks, in the order they were added, and closes them. Only rank 0 adds any.

    If a sink cannot write, for example to a full disk, the run continues, and the other sinks get one warning.
    """

    def __init__(self, *sinks: Sink | None) -> None:
        super().__init__()
        self._sinks: list[Sink] = []
        self._failing: set[Sink] = set()
        for sink in sinks:
            if sink is not None:
                self.add(sink)

    def add(self, sink: Sink) -> None:
        """Add a sink. It gets every later event."""
        self._sinks.append(sink)
        self.callback(sink.close)

    def __call__(self, event: Event) -> None:
        for sink in self._sinks:
            try:
                sink(event)
            except OSError as error:
                if sink not in self._failing:
                    self._failing.add(sink)
                    self._warn_others(error)
            else:
                self._failing.discard(sink)

    def _warn_others(self, error: OSError) -> None:
        message = (
            f"{error.filename or 'standard output'} cannot be written ({error.strerror or error}): "
            "events are kept in memory until it can be. Free space there."
        )
        for sink in self._sinks:
            if sink not in self._failing:
                sink(Warned(message=message))


class Observer:
    """Sink of a caller's function. An error in it does not end the training: the other sinks get one warning."""

    def __init__(self, function: Emit, emit: Emit) -> None:
        """`emit`: gets the warning."""
        self._function, self._emit, self._has_failed = function, emit, False

    def __call__(self, event: Event) -> None:
        try:
            self._function(event)
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                name = getattr(self._function, "__qualname__", type(self._function).__name__)
                reason = f"{type(error).__name__}: {error} at {type(event).__name__}"
                self._emit(Warned(message=f"sinks: {name} raised {reason}. The run continues, and it still gets every event."))

    def close(self) -> None:
        """Do nothing: the function belongs to the caller."""
