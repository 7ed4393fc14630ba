"""Console: live display on a terminal, plain lines elsewhere. `Sinks` passes events to console and event log."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

import rich.console

from agnews_dist.events import Emit, Event, Warned
from agnews_dist.report.formatting import can_draw, create_output
from agnews_dist.report.plain import PlainLines
from agnews_dist.report.terminal import TerminalDisplay


def create_console(
    out: rich.console.Console | None = None, *, every_step: bool = False, clock: Callable[[], float] = time.monotonic
) -> PlainLines | TerminalDisplay:
    """Create the sink that shows events to a person. `close` it, also after an exception, to restore the terminal.

    A terminal gets panels, tables and a live display. A file, a pipe, a dumb terminal or one without Unicode gets plain lines.
    `out`: default standard output. `NO_COLOR` turns colours off.
    """
    out = out or create_output(sys.stdout)
    if can_draw(out):
        return TerminalDisplay(out, every_step=every_step, clock=clock)
    file = out.file
    return PlainLines(file, every_step=every_step, clock=clock)  # pyright: ignore[reportArgumentType] # IO[str] is a TextIO


class Sink(Protocol):
    """Consumer of events. `close` releases files and the terminal."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Sinks(ExitStack):
    """Sink that passes every event to its sinks, in the order they were added, and closes them. Only rank 0 adds any.

    If a sink cannot write, for example to a full disk, the run continues, and the other sinks get one warning.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sinks: list[Sink] = []
        self._failing: set[Sink] = set()

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
        """Call the function."""
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
