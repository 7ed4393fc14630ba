"""Console: live display on a terminal, plain lines elsewhere. `Sinks` passes events to console and event log."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol

import rich.console

from agnews_dist.events import Event, Warned
from agnews_dist.report.formatting import can_draw, create_output
from agnews_dist.report.plain import PlainLines
from agnews_dist.report.terminal import TerminalDisplay


class Console:
    """Sink that shows events to a person. As a context manager it restores the terminal after an exception.

    A terminal gets panels, tables and a live display. A file, a pipe, a dumb terminal or one without Unicode gets the lines
    of `PlainLines`. `out`: default standard output. `NO_COLOR` turns colours off.
    """

    def __init__(
        self,
        out: rich.console.Console | None = None,
        *,
        every_step: bool = False,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if out is None:
            out = create_output(sys.stdout)
        if can_draw(out):
            self._sink = TerminalDisplay(out, every_step=every_step, clock=clock)
        else:
            self._sink = PlainLines(
                out.file,  # pyright: ignore[reportArgumentType] # IO[str] with an encoding is a TextIO
                every_step=every_step,
                seconds_between_lines=seconds_between_lines,
                clock=clock,
            )

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self._sink(event)

    def close(self) -> None:
        """End the live display and restore the terminal. Further calls do nothing."""
        self._sink.close()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Sink(Protocol):
    """Consumer of events."""

    def __call__(self, event: Event) -> None:
        """Consume one event."""
        ...

    def close(self) -> None:
        """Release files and the terminal."""
        ...


class Sinks:
    """Sink that passes every event to its sinks, in the order they were added. Only rank 0 adds any.

    If a sink cannot write, for example to a full disk, the run continues, and the other sinks get one warning.
    """

    def __init__(self) -> None:
        self._sinks: list[Callable[[Event], None]] = []
        self._stack = ExitStack()
        self._failing: set[int] = set()

    def add(self, sink: Sink) -> None:
        """Add a sink. It gets every later event and is closed with this object."""
        self._sinks.append(sink)
        self._stack.callback(sink.close)

    def __call__(self, event: Event) -> None:
        for number, sink in enumerate(self._sinks):
            try:
                sink(event)
            except OSError as error:
                if number not in self._failing:
                    self._failing.add(number)
                    self._warn_others(number, error)
            else:
                self._failing.discard(number)

    def _warn_others(self, failing: int, error: OSError) -> None:
        message = (
            f"{error.filename or type(self._sinks[failing]).__name__} cannot be written ({error.strerror or error}): "
            "events are kept in memory until it can be. Free space there."
        )
        for number, sink in enumerate(self._sinks):
            if number not in self._failing:
                sink(Warned(message=message))

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
