"""The console: live on a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol

import rich.console

from agnews_dist.events import Event, Warned
from agnews_dist.report.plain import PlainLines
from agnews_dist.report.terminal import TerminalDisplay


def draws(out: rich.console.Console) -> bool:
    """Whether it is a terminal that can move the cursor and has the characters to draw with."""
    return out.is_terminal and not out.is_dumb_terminal and out.encoding.startswith("utf")


class Console:
    """Sink that shows events to a person; a context manager, so that an exception finds the terminal in order.

    A terminal gets panels, tables and a live progress line; a file, a pipe, a dumb terminal or one without Unicode
    gets plain lines (see `PlainLines` for how many). `out` is where to, default standard output. `NO_COLOR` switches
    the colours off.
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
            # FORCE_COLOR, set for other tools, must not put cursor movements into a log file.
            out = rich.console.Console(file=sys.stdout, force_terminal=sys.stdout.isatty())
        if draws(out):
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
        """End the live display and give the terminal back; further calls do nothing."""
        self._sink.close()

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Sink(Protocol):
    """Consumes events until it is closed."""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        ...

    def close(self) -> None:
        """Release what the sink holds."""
        ...


class Sinks:
    """Passes every event to each sink, in the order they were added; with none it is silent (ranks other than 0).

    A sink that cannot write, to a full disk for example, does not end the run: the others are told, once.
    """

    def __init__(self) -> None:
        self._sinks: list[Callable[[Event], None]] = []
        self._stack = ExitStack()
        self._failing: set[int] = set()

    def add(self, sink: Sink) -> None:
        """From now on `sink` gets every event; it is closed with this object."""
        self._sinks.append(sink)
        self._stack.callback(sink.close)

    def __call__(self, event: Event) -> None:
        for number, sink in enumerate(self._sinks):
            try:
                sink(event)
            except OSError as error:
                if number not in self._failing:
                    self._failing.add(number)
                    self._tell_others(number, error)
            else:
                self._failing.discard(number)

    def _tell_others(self, failing: int, error: OSError) -> None:
        message = (
            f"{error.filename or type(self._sinks[failing]).__name__} cannot be written ({error.strerror or error}): what the "
            "run says now is kept in memory and written when it can be. Free some space there."
        )
        for number, sink in enumerate(self._sinks):
            if number not in self._failing:
                sink(Warned(message=message))

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
